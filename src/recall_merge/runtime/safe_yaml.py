"""YAML from untrusted sources: plain data only, no duplicate keys, and limits on size, depth and the expansion of aliases."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000  # with every alias expanded: nine lines can mean a billion of them
TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"
MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`


class NotYaml(ValueError):
    """A text is not YAML, or beyond the limits; the message says why, in one line."""


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, of which PyYAML silently takes the last one, and whatever is beyond the limits."""

    _depth = -1

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:  # before PyYAML reads on: its time grows with the square of the depth
            raise NotYaml(TOO_DEEP)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        _check_bounds(node)
        return super().construct_document(node)

    def construct_scalar(self, node: Any) -> Any:
        (value := super().construct_scalar(node)).encode()  # a surrogate that stands alone is no text
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        seen = set()
        for key in filter(lambda key: isinstance(key, Hashable), keys):  # PyYAML refuses the others
            if key in seen:
                raise yaml.YAMLError(f"the key '{key}' is given twice, in line {node.start_mark.line + 1} or below")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The content of YAML in a string. Raises NotYaml if it is not YAML, or beyond the limits.

    >>> parse_yaml("{a: [1, 2.5, yes]}")
    {'a': [1, 2.5, True]}
    """
    if len(text) > MAX_BYTES:
        raise NotYaml(f"it is longer than {MAX_BYTES:,} bytes")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # errors of int() and of dates pass through PyYAML
        raise error if isinstance(error, NotYaml) else NotYaml(" ".join(str(error).split())) from error


def _check_bounds(root: yaml.Node) -> None:
    """Refuse a document that contains itself, or expands to too many nodes or levels. Each node is measured once."""
    sizes: dict[int, tuple[int, int]] = {}

    def measure(node: yaml.Node) -> tuple[int, int]:
        """The node's expanded size, and its depth."""
        if id(node) not in sizes:
            sizes[id(node)] = (MAX_NODES, 0)  # for now: an alias inside the node that it names never ends
            value = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [measure(part) for pair in value for part in (pair if isinstance(node, yaml.MappingNode) else [pair])]
            sizes[id(node)] = (1 + sum(count for count, _ in parts), 1 + max((deep for _, deep in parts), default=-1))
        count, deep = sizes[id(node)]
        if count > MAX_NODES:
            raise NotYaml(f"it has more than {MAX_NODES:,} parts, or contains itself")
        if deep > MAX_DEPTH:
            raise NotYaml(TOO_DEEP)
        return count, deep

    measure(root)
