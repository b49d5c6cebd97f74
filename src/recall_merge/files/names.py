"""Names of one tensor: models are stored with different leading words, and some with module names that transformers has changed since."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from recall_merge.files.checkpoint import HEADS, Checkpoint
from recall_merge.maths.layers import Layers

RENAMED = (  # names of modules in memory today, and in files
    ("lm_head.", "embed_out."),
    (".mlp.", ".block_sparse_moe."),
    (".mlp.router.", ".block_sparse_moe.gate."),
    ("model.language_model.", "language_model.model."),
)


class Names:
    """Finds the base tensor that an adapter means; the two may differ by leading words ('transformer.h.0' for 'h.0')."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._by_tail: defaultdict[str, list[str]] = defaultdict(list)
        for name in base.tensors:
            parts = name.split(".")
            for start in range(len(parts)):
                self._by_tail[".".join(parts[start:])].append(name)

    def find(self, wanted: str) -> str | None:
        """The name in the base's files, which may be older than the one that transformers uses in memory."""
        spellings = [wanted, *(wanted.replace(new, old) for new, old in RENAMED if new in wanted)]
        return next((name for spelling in spellings if (name := self._find(spelling)) is not None), None)

    def _find(self, wanted: str) -> str | None:
        if wanted in self._base.tensors:
            return wanted
        parts = wanted.split(".")
        for start in range(len(parts) - 1):  # the longest common tail that is the whole of one of the two
            candidates = self._by_tail.get(".".join(parts[start:]), [])
            whole = candidates if start == 0 else [name for name in candidates if name == ".".join(parts[start:])]
            if len(whole) == 1:
                return whole[0]
        return None

    def is_tied_head(self, wanted: str) -> bool:
        """Whether `wanted` is a head that the base does not store because it is tied to the embedding."""
        return HEADS.search(wanted) is not None and self._base.is_tied


def named_like(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The checkpoint with the base's names, if the two differ by leading words: 'h.0.ln_1.weight' and 'transformer.h.0.ln_1.weight'.

    Some models were stored without their class's name of the decoder, and get it when they are saved again.
    """
    ours, theirs = base.layers.prefix, checkpoint.layers.prefix
    if ours.endswith(f".{theirs}"):
        lead = ours.removesuffix(theirs)
        names = {name: lead + name if lead + name in base.tensors else name for name in checkpoint.tensors}
    elif theirs.endswith(f".{ours}"):
        names = {name: name.removeprefix(theirs.removesuffix(ours)) for name in checkpoint.tensors}
    else:
        return checkpoint
    tensors = {names[name]: tensor for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, layers=Layers(ours, checkpoint.layers.blocks))
