"""The layer of each tensor, from its name: 0 for the embedding, i = 1..L for block i, L + 1 for the final norm and head."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_INPUT_SIDE = re.compile(
    r"emb|wte|wpe|position_bias|input_hidden|per_layer|altup_proj"  # of text
    r"|vision|visual|image|audio|multi_modal"  # of other inputs
)
_NORM = re.compile(r"norm|(^|[._])ln([._\d]|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|experts?\.|moe|(^|\.)fc_?\d", re.IGNORECASE)
_OUTPUT_SIDE = re.compile(r"(^|\.)(lm_head|embed_out|output_embeddings?|embedding_norm)\.|unembed")


@dataclass(frozen=True)
class Layers:
    """Where the blocks of a decoder-only model are among its tensor names.

    `prefix` is the dotted name of the list of blocks ('model.layers', 'h', ...), `blocks` their number L.

    >>> layers = Layers("model.layers", 2)
    >>> [layers.of(f"model.{name}") for name in ("embed_tokens.weight", "layers.0.mlp.weight", "layers.1.mlp.weight", "norm.weight")]
    [0, 1, 2, 3]
    """

    prefix: str
    blocks: int

    @property
    def last(self) -> int:
        """The layer of the final norm and head, L + 1."""
        return self.blocks + 1

    def of(self, name: str) -> int:
        """The layer of one tensor.

        Names of embeddings (embed_tokens, wte, word_embeddings_layernorm, ...) come before the blocks, except outputs such as embed_out
        or LFM2's embedding_norm; all others come after. A slow test compares this with the computation in every decoder of transformers.
        """
        if name.startswith(self.prefix + "."):
            number = name[len(self.prefix) + 1 :].split(".", 1)[0]
            if number.isdecimal():
                return 1 + int(number)
        return 0 if _INPUT_SIDE.search(name) and not _OUTPUT_SIDE.search(name) else self.last

    def kind_of(self, name: str) -> Literal["attention", "mlp", "norm", "embedding", "head", "other"]:
        """The kind of module that a tensor belongs to. A norm inside attention (q_norm) is a norm.

        >>> layers = Layers("h", 1)
        >>> [layers.kind_of(name) for name in ("wte.weight", "h.0.ln_1.bias", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight")]
        ['embedding', 'norm', 'attention', 'mlp']
        """
        layer = self.of(name)
        inside = name[len(self.prefix) :] if 1 <= layer <= self.blocks else name.rsplit(".", 2)[-2] if "." in name else name
        if _NORM.search(inside):
            return "norm"
        if layer in (0, self.last):
            return "embedding" if layer == 0 else "head"
        return "attention" if _ATTENTION.search(inside) else "mlp" if _MLP.search(inside) else "other"


def find_layers(names: Iterable[str], blocks: int) -> Layers:
    """Find the list of blocks among the tensor names of a checkpoint: the one prefix whose numbers are exactly 0..L-1.

    L = `blocks` is from the model's config, since a mixture of experts numbers its experts too. Refused unless one prefix fits.

    >>> find_layers(["h.0.w", "h.1.w", "h.1.experts.0.w", "h.1.experts.1.w", "norm.w"], blocks=2)
    Layers(prefix='h', blocks=2)
    """
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        first = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
        if first:  # subtle: only the first number of a name counts, so nested lists (experts) are never taken for blocks
            numbers[".".join(parts[:first])].add(int(parts[first]))
    matching = sorted(prefix for prefix, indices in numbers.items() if len(indices) == blocks == max(indices) + 1)
    if len(matching) != 1:
        lists = ", ".join(f"{prefix} ({len(indices)})" for prefix, indices in sorted(numbers.items())) or "none"
        raise ValueError(f"the config says {blocks} blocks; numbered lists among the tensor names: {lists}")
    return Layers(matching[0], blocks)
