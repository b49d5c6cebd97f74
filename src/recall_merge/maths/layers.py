"""The layer of each tensor, from its name: 0 for the embedding, i = 1..L for block i, L + 1 for the final norm and head."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_INPUT_SIDE = re.compile(
    r"emb|wte|wpe|(^|\.)w\.|position_bias|input_hidden|per_layer|altup_proj"  # of text
    r"|vision|visual|image|audio|multi_modal"  # of other inputs
)
_NORM = re.compile(r"norm|(^|[._])ln([._\d]|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|experts?\.|moe|(^|\.)fc_?\d", re.IGNORECASE)
_OUTPUT_SIDE = re.compile(r"(^|\.)(lm_head|embed_out|output_embeddings?|embedding_norm|mtp)\.|unembed")
_HEAD = re.compile(r"(^|\.)(lm_head|head|score|classifier|output_projection)\.")
_AFTER_BLOCKS = re.compile(r"(^|\.)(norm|ln|final|head|lm_|out|score|classifier|hc_)|norm\.")  # what follows the blocks of a text tower


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
    towers: bool = False  # there are other inputs than text: images, audio

    @property
    def last(self) -> int:
        """The layer of the final norm and head, L + 1."""
        return self.blocks + 1

    def of(self, name: str) -> int:
        """The layer of one tensor.

        Names of embeddings (embed_tokens, wte, word_embeddings_layernorm, ...) come before the blocks, except outputs such as embed_out
        or LFM2's embedding_norm; all others come after, as do blocks beyond L, which predict further tokens. Beside other towers (images,
        audio), what is no norm or head of the text tower brings their outputs to it, and comes before: connectors, projectors, resamplers.
        A slow test compares this with the computation in every decoder of transformers.
        """
        if name.startswith(self.prefix + "."):
            number = name[len(self.prefix) + 1 :].split(".", 1)[0]
            if number.isdecimal():
                return min(1 + int(number), self.last)
        if _OUTPUT_SIDE.search(name):
            return self.last
        return 0 if _INPUT_SIDE.search(name) or (self.towers and not self._follows_blocks(name)) else self.last

    def _follows_blocks(self, name: str) -> bool:
        root = self.prefix.rpartition(".")[0]
        inside = name.startswith(f"{root}.") or not root
        return _AFTER_BLOCKS.match(name.removeprefix(f"{root}.")) is not None if inside else _HEAD.search(name) is not None

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


def find_layers(names: Iterable[str], blocks: int, *, extra: int = 0, embedding: str = "", towers: bool = False) -> Layers:
    """Find the list of blocks among the tensor names of a checkpoint: the one prefix whose numbers are exactly 0..L-1.

    L = `blocks` is from the model's config, since a mixture of experts numbers its experts too. After them there may be up to `extra`
    blocks that predict further tokens. Where several lists have as many entries, it is the one beside the input `embedding`: the others
    belong to towers of images or audio, or hold single tensors. Refused unless one prefix fits.

    >>> find_layers(["h.0.w", "h.1.w", "h.1.experts.0.w", "h.1.experts.1.w", "norm.w"], blocks=2)
    Layers(prefix='h', blocks=2, towers=False)
    >>> find_layers(["eye.layers.0.w", "text.layers.0.w", "text.embed.w"], blocks=1, embedding="text.embed.w").prefix
    'text.layers'
    """
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    sizes: Counter[str] = Counter()  # tensors
    for name in names:
        parts = name.split(".")
        first = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
        if first:  # subtle: only the first number of a name counts, so nested lists (experts) are never taken for blocks
            numbers[".".join(parts[:first])].add(int(parts[first]))
            sizes[".".join(parts[:first])] += 1
    matching = sorted(prefix for prefix, indices in numbers.items() if blocks <= len(indices) == max(indices) + 1 <= blocks + extra)
    if len(matching) > 1 and embedding:
        tied = {prefix: (_common_words(prefix, embedding), -prefix.count(".")) for prefix in matching}
        matching = [prefix for prefix in matching if tied[prefix] == max(tied.values())]
        matching = [prefix for prefix in matching if sizes[prefix] > 2 * blocks] or matching  # a block has more than a weight and a bias
    if blocks < 1 or len(matching) != 1:
        lists = ", ".join(f"{prefix} ({len(indices)})" for prefix, indices in sorted(numbers.items())) or "none"
        raise ValueError(f"the config says {blocks} blocks; numbered lists among the tensor names: {lists}")
    return Layers(matching[0], blocks, towers)


def _common_words(one: str, other: str) -> int:
    """How many leading words two dotted names share."""
    return next((count for count, (a, b) in enumerate(zip(one.split("."), other.split("."), strict=False)) if a != b), 0)
