"""Whether an expert that is a whole checkpoint fits the base: the same names, settings, tensors and shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.hashing import same_weights
from recall_merge.files.names import renamed_like
from recall_merge.files.resolved_config import resolved
from recall_merge.runtime.errors import CheckpointError, Faults

HARMLESS = {  # settings of a config that may differ from the base's without changing what the weights mean
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id",
    "dtype", "embd_pdrop", "eos_token_id", "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_range", "label2id",
    "max_length", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type",
    "resid_pdrop", "return_dict", "router_aux_loss_coef", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "vocab_size",
}  # fmt: skip


def named_like(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The checkpoint with the base's names, if the two differ by leading words: 'h.0.ln_1.weight' and 'transformer.h.0.ln_1.weight'.

    Some models were stored without their class's name of the decoder, and get it when they are saved again. Other differences are
    transformers' to know.
    """
    ours, theirs = base.layers.prefix, checkpoint.layers.prefix
    if ours.endswith(f".{theirs}"):
        lead = ours.removesuffix(theirs)
        names = {name: lead + name if lead + name in base.tensors else name for name in checkpoint.tensors}
    elif theirs.endswith(f".{ours}"):
        names = {name: name.removeprefix(theirs.removesuffix(ours)) for name in checkpoint.tensors}
    else:
        return renamed_like(checkpoint, base)
    if len(set(names.values())) < len(names):  # two tensors for one place: neither is taken, and the check names them
        return checkpoint
    tensors = {names[name]: tensor for name, tensor in checkpoint.tensors.items()}
    return renamed_like(replace(checkpoint, tensors=tensors, layers=replace(checkpoint.layers, prefix=ours)), base)


def check_checkpoint(
    name: str, expert: Checkpoint, base: Checkpoint, skipped: Callable[[str], bool] = lambda _: False, *, is_base: bool = False
) -> None:
    """Check that a checkpoint has the base's architecture, tensor by tensor; token tensors may differ in their rows.

    It may lack a tensor that is `skipped`, or have it in another shape; `is_base` says that the run calls it the base.

    Raises CheckpointError with every difference (the first few of each kind).
    """
    faults, where = Faults(), expert.folder
    if (expert.folder.resolve() == base.folder.resolve() or same_weights(expert, base)) != is_base:
        what = f"expert '{name}' is not the base, though `is_base` says so" if is_base else f"expert '{name}' is the base itself"
        fix = "leave `is_base` out" if is_base else "list only models that were fine-tuned from the base, or say `is_base: true`"
        raise CheckpointError(what, where=where, fix=fix)
    fix = "experts must be fine-tuned from the base, with the same architecture"
    for key, theirs, ours in _settings_that_differ(expert.config, base.config)[:8]:
        faults.add(f"expert '{name}' has {key} {theirs!r}; the base has {ours!r}", where=where / "config.json", fix=fix)
    fix = "fine-tune it from this base, or name the tensor under `skip:` to keep the base's"
    theirs_all, ours_all = ({tensor for tensor in model.tensors if not skipped(tensor)} for model in (expert, base))
    for kind, names in (("lacks", ours_all - theirs_all), ("has the extra", theirs_all - ours_all)):
        for tensor in sorted(names)[:3]:
            faults.add(f"expert '{name}' {kind} tensor '{tensor}'" + _more(names), where=where, fix=fix)
    tokens = set(base.token_tensors) & set(expert.token_tensors)
    shapes = {tensor: (expert.tensors[tensor].spec.shape, base.tensors[tensor].spec.shape) for tensor in sorted(theirs_all & ours_all)}
    wrong = [tensor for tensor, (theirs, ours) in shapes.items() if theirs[tensor in tokens :] != ours[tensor in tokens :]]
    for tensor in wrong[:3]:
        theirs, ours = shapes[tensor]
        what = f"expert '{name}' has '{tensor}' of shape {theirs}; the base has {ours}" + _more(wrong)
        faults.add(what, where=expert.tensors[tensor].file, fix=fix)
    for tensor in [tensor for tensor in shapes if tensor not in wrong]:
        theirs, ours = expert.tensors[tensor], base.tensors[tensor]
        if not (theirs.spec.is_float and ours.spec.is_float) and not theirs.same_bytes(ours):
            what = f"expert '{name}' has other numbers in '{tensor}' ({theirs.spec}), and whole numbers cannot be merged"
            faults.add(what, where=theirs.file, fix="name the tensor under `skip:` to keep the base's, if that is meant")
    faults.raise_any(CheckpointError)


def _settings_that_differ(expert: Mapping[str, Any], base: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that differ, as transformers' class of the architecture resolves them: only it knows the value of one that is left out.

    Where transformers cannot be asked, one that is left out or null equals one that is off (0, false, empty), and no other.
    """
    written = [*_differences(expert, base)]
    if not written or expert.get("model_type") != base.get("model_type"):
        return [(key, theirs, ours) for key, theirs, ours in written if theirs is not None and ours is not None]
    theirs_resolved, ours_resolved = resolved(expert), resolved(base)
    if theirs_resolved is None or ours_resolved is None:
        return [(key, theirs, ours) for key, theirs, ours in written if theirs or ours]
    return [*_differences(theirs_resolved, ours_resolved, unread=False)]


def _differences(
    expert: Mapping[str, Any], base: Mapping[str, Any], prefix: str = "", *, unread: bool = True
) -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ. `unread`: also those that a resolved config has only because the file did, which its class never reads."""
    for key in {**base, **expert}:
        theirs, ours = expert.get(key), base.get(key)
        one_sided = (key in expert) != (key in base)
        if key in HARMLESS or (one_sided and not unread and "model_type" in base) or (theirs == ours and not one_sided):
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(theirs, ours, f"{prefix}{key}.", unread=unread)
        else:
            yield prefix + key, theirs, ours


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
