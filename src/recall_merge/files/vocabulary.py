"""Models with different tokenizers: the tokens of the result, and the row of each token in each model.

Rows are matched by token, never by position. A token that the base lacks gets the mean of the base's rows, as when Hugging Face resizes a
model. The row of a token is merged among the experts that have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recall_merge.files.checkpoint import AGAIN, read_json
from recall_merge.files.inert_folder import check_lengths, open_tokenizer
from recall_merge.runtime.errors import CheckpointError, Fault

if TYPE_CHECKING:
    from torch import Tensor

UNREAD = ("tekken.json", "tiktoken.model", "sentencepiece.bpe.model")  # tokenizers that only servers read, where they stand alone
Choice = Literal["base", "newest", "union"]


@dataclass(frozen=True)
class Vocabulary:
    """The result's tokens."""

    size: int  # rows of the result's token tensors
    rows: tuple[Tensor, ...]  # for the base, then each expert: (size,) its row of each token, or -1
    tokenizer: Path  # the folder of the tokenizer that the result gets, to which `added` is added
    added: tuple[str, ...] = ()  # tokens of the experts that the base lacks, in the order of the experts ('union' only)

    def align_base(self, own: Tensor) -> Tensor:
        """The base's rows in the result's order; the mean row for tokens that it lacks.    own (v, *s) -> (size, *s)"""
        rows = self.rows[0]
        aligned = own[rows.clamp(min=0)]
        aligned[rows < 0] = own.mean(0)
        return aligned

    @property
    def present(self) -> Tensor:
        """Which expert has which token: (k, size), bool."""
        import torch

        return torch.stack(self.rows[1:]) >= 0

    def align_deltas(self, base: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
        """Each expert's delta to the aligned base, 0 for tokens that it lacks.    base (size, *s), own k of (v_q, *s) -> k of (size, *s)"""
        deltas = [tensor[rows.clamp(min=0)] - base for tensor, rows in zip(own, self.rows[1:], strict=True)]
        for delta, has in zip(deltas, self.present, strict=True):
            delta[~has] = 0
        return deltas


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer; None if the folder has no tokenizer. Raises CheckpointError if it cannot be read."""
    check_lengths(folder)
    try:
        if (folder / "tokenizer.json").exists():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
        if any((folder / file).exists() for file in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")):
            return open_tokenizer(folder).get_vocab()
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise CheckpointError(f"the tokenizer cannot be read: {error}", where=folder, fix=AGAIN) from error
    return None


def plan_vocabulary(
    base: tuple[Path, int], experts: Mapping[str, tuple[Path, int]], choice: Choice | None
) -> tuple[Vocabulary | None, list[str]]:
    """The result's vocabulary, or None if every model has the base's tokens and rows; and notes for readers of the plan.

    Args:
        base: its folder, and the number of rows of its embedding.
        experts: the same by name, in the order of the run; a folder without a tokenizer shares the base's.
        choice: whose tokens; None expects all to be the same.

    Raises CheckpointError if they differ without a choice, or rows cannot be matched because a tokenizer is missing.
    """
    folder, size = base
    for path in (folder, *(path for path, _ in experts.values())):
        check_lengths(path)
    same = {name for name, (path, _) in experts.items() if _same_tokenizer(path, folder)}
    if len(same) == len(experts) and all(rows == size for _, rows in experts.values()):
        read_json(folder / "tokenizer.json")  # to refuse a damaged file
        return None, []
    tokens = read_vocabulary(folder)
    theirs = {name: tokens if name in same else read_vocabulary(path) for name, (path, _) in experts.items()}
    for name, (path, _) in experts.items():
        if tokens is None and theirs[name] is None and (file := _another_file(path, folder)):
            fix = "load both tokenizers with transformers, and save_pretrained them into the folders: then tokens can be compared"
            raise CheckpointError(f"expert '{name}' has another {file} than the base, which cannot be read here", where=path, fix=fix)
    different = {n: expert for n, expert in experts.items() if expert[1] != size or (theirs[n] is not None and theirs[n] != tokens)}
    if not different:
        return None, []
    if choice is None:
        fix = "say whose tokens the result has: `vocabulary: base`, `newest` or `union`; or align the models first"
        raise CheckpointError(Fault(_difference(n, theirs[n], rows, tokens, size), str(path), fix) for n, (path, rows) in different.items())
    without = [folder] * (tokens is None) + [path for n, (path, rows) in experts.items() if theirs[n] is None and rows != size]
    if tokens is None or without:
        fix = "put the model's tokenizer files into its folder"
        raise CheckpointError(Fault("its rows cannot be matched by token: it has no tokenizer", str(path), fix) for path in without)
    known = {n: tokens if own is None else own for n, own in theirs.items()}
    donor, target, added = folder, tokens, ()
    if choice == "newest":
        name = list(experts)[-1]
        (path, size), target = experts[name], known[name]
        donor = folder if theirs[name] is None else path
    elif choice == "union":
        added = tuple(dict.fromkeys(token for own in known.values() for token in sorted(own, key=own.__getitem__) if token not in tokens))
        target = {**tokens, **{token: row for row, token in enumerate(added, start=len(tokens))}}
        size = max(size, len(target))
    sizes = [base[1], *(rows for _, rows in experts.values())]
    rows = tuple(_rows(target, size, own, count) for own, count in zip([tokens, *known.values()], sizes, strict=True))
    notes = [f"tokenizers differ: the result has the tokens of {choice}, {len(target)} of them in {size} rows"]
    if choice != "union":
        lost = {n: len(set(own) - set(target)) for n, own in known.items()}
        notes += [f"{count} tokens of expert '{n}' are not among them and are left out" for n, count in lost.items() if count]
    return Vocabulary(size, rows, donor, added), notes


def _another_file(one: Path, other: Path) -> str | None:
    """A tokenizer's file that both folders have, with different bytes."""
    both = (name for name in UNREAD if (one / name).is_file() and (other / name).is_file())
    return next((name for name in both if (one / name).read_bytes() != (other / name).read_bytes()), None)


def _same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two folders have the same tokenizer file: comparing bytes takes a hundredth of the time of parsing."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(file.is_file() for file in files) or files[0].stat().st_size != files[1].stat().st_size:
        return False
    try:
        return files[0].read_bytes() == files[1].read_bytes()
    except OSError as error:
        fix = "check the path, your permissions and the disk"
        raise CheckpointError(f"tokenizer.json cannot be read: {error.strerror}", where=error.filename or one, fix=fix) from error


def _rows(target: Mapping[str, int], size: int, own: Mapping[str, int], count: int) -> Tensor:
    import torch

    rows = torch.full((size,), -1, dtype=torch.int64)
    for token, row in target.items():
        if own.get(token, count) < count and row < size:
            rows[row] = own[token]
    if own == target:  # padding rows have no tokens; for models with the same tokens they match by position
        spare = torch.arange(size)
        rows = torch.where((rows < 0) & (spare < count), spare, rows)
    return rows


def _difference(name: str, theirs: Mapping[str, int] | None, rows: int, tokens: Mapping[str, int] | None, size: int) -> str:
    if rows != size:
        return f"expert '{name}' has {rows} rows of tokens; the base has {size}"
    if tokens is None or theirs is None:
        return f"expert '{name}' has a tokenizer; the base has none"
    moved = next((token for token, row in theirs.items() if tokens.get(token) != row), None)
    token = moved if moved is not None else next(token for token in tokens if token not in theirs)
    return f"expert '{name}' has another tokenizer: {json.dumps(token)} is {theirs.get(token)} there and {tokens.get(token)} in the base"
