"""YAML from anybody: plain data only, no key twice, and bounds on size, depth and what aliases unfold to."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000  # once every alias is written out: nine lines can mean a billion of them

TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"
MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`


class NotYaml(ValueError):
    """The text is not YAML that is read here; the message says why, in one line."""


class _Loader(yaml.SafeLoader):
    """YAML without surprises: a key that is given twice is refused, where YAML takes the last one without a word."""

    _depth = -1

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:  # at once: the time that PyYAML takes grows with the square of the depth
            raise NotYaml(TOO_DEEP)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        seen = set()
        for key in filter(lambda key: isinstance(key, Hashable), keys):  # YAML's own refuses the others
            if key in seen:
                raise yaml.YAMLError(f"the key '{key}' is given twice, in line {node.start_mark.line + 1} or below")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        NotYaml: if it cannot be read, is not YAML, or is beyond the bounds.
    """
    try:
        if path.exists() and not path.is_file():
            raise NotYaml("it is no file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return parse_yaml(data.decode("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise NotYaml(" ".join(str(error).split())) from error


def parse_yaml(text: str) -> Any:
    """The content of YAML in a string.

    Raises:
        NotYaml: if it is not YAML, or beyond the bounds.

    >>> parse_yaml("{a: [1, 2.5, yes]}")
    {'a': [1, 2.5, True]}
    """
    if len(text) > MAX_BYTES:
        raise NotYaml(f"it is longer than {MAX_BYTES:,} bytes")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_bounds(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets through what int() and dates refuse
        raise error if isinstance(error, NotYaml) else NotYaml(" ".join(str(error).split())) from error


def _check_bounds(root: yaml.Node) -> None:
    """Refuse what contains itself, or unfolds to too much or too deep. Each node is looked at once, however often it is named."""
    known: dict[int, tuple[int, int]] = {}

    def measured(node: yaml.Node) -> tuple[int, int]:
        """How many nodes, and how deep."""
        if id(node) not in known:
            known[id(node)] = (MAX_NODES, 0)  # until it is known: an alias inside of what it names is without end
            value = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [measured(part) for pair in value for part in (pair if isinstance(node, yaml.MappingNode) else [pair])]
            known[id(node)] = (1 + sum(count for count, _ in parts), 1 + max((deep for _, deep in parts), default=-1))
        count, deep = known[id(node)]
        if count > MAX_NODES:
            raise NotYaml(f"it has more than {MAX_NODES:,} parts, or contains itself")
        if deep > MAX_DEPTH:
            raise NotYaml(TOO_DEEP)
        return count, deep

    measured(root)
