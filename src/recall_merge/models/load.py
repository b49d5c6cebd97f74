"""Load a model and its tokenizer. A model's code comes from transformers, never from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import is_adapter, open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.companions import chat_template
from recall_merge.files.experts import AdapterExpert, own_tensors
from recall_merge.files.inert_folder import GENERATION, inert, open_tokenizer
from recall_merge.files.resolved_config import BUILD_LOCK
from recall_merge.files.vocabulary import read_vocabulary
from recall_merge.runtime.device import find_device, is_full
from recall_merge.runtime.errors import CheckpointError, RecallError, is_out_of_memory
from recall_merge.runtime.parallel import process_wide
from recall_merge.runtime.quiet import quiet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ONLY_KNOWN = "only architectures that transformers itself knows can be run; recall never runs code from a checkpoint"


def load_model(folder: Path, base: Path | None = None, *, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """A whole model, or a base with the delta of an adapter added to it, in evaluation mode; and its tokenizer.

    Args:
        base: the model that an adapter is on. Its tokenizer is used where `folder` has none.
        device: as `find_device` takes it. A model that is too large for one accelerator is spread over all of them and the processor.
        dtype: by default float32 on the processor, and on an accelerator the dtype of the folder.

    Raises CheckpointError if the files cannot be used, or transformers does not know the architecture.
    """
    place = find_device(device)
    dtype = dtype or ("float32" if place.type == "cpu" else "auto")
    tokenizer = load_tokenizer(folder, base)
    if not is_adapter(folder):
        return placed(partial(build_model, folder, dtype=dtype), place), tokenizer
    assert base is not None, "an adapter is loaded on its base"
    checkpoint = open_checkpoint(base)
    tensors = own_tensors(AdapterExpert(folder.name, open_adapter(folder, checkpoint)), checkpoint, lambda _: True)
    model = placed(partial(build_model, base, tensors, dtype=dtype, vocabulary_size=len(tensors[checkpoint.embedding])), place)
    model.name_or_path = str(folder)  # not the base's
    return model, tokenizer


def placed(build: Callable[..., Any], device: torch.device) -> Any:
    """A model on a device, from what builds it; spread over all accelerators, then the processor, where it is too large for that one."""
    try:
        return build().to(device)
    except RuntimeError as error:
        if device.type == "cpu" or not is_full(error):
            raise
    return build(device_map="auto")


def load_trainable(folder: Path, base: Path, *, dtype: str = "float32") -> Any:
    """An expert as it is trained further: a whole model, or a base under an adapter whose factors are marked as trained."""
    if not is_adapter(folder):
        return build_model(folder, dtype=dtype)
    import peft

    open_adapter(folder, open_checkpoint(base))  # PEFT would import what some settings name
    with hushed():
        return peft.PeftModel.from_pretrained(build_model(base, dtype=dtype), str(folder), is_trainable=True).eval()


def build_model(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    dtype: str = "float32",
    vocabulary_size: int | None = None,
    device_map: str | None = None,
) -> Any:
    """A causal language model in evaluation mode.

    Args:
        folder: gives the config; and the weights too, when `tensors` is None.
        tensors: a whole model under the names of its files; what transformers renames or fuses on loading, it does here as well.
        dtype: 'float32', 'bfloat16', ... or 'auto' for the dtype of the config.
        vocabulary_size: rows of the token tensors, where they are not those of the config.
        device_map: `auto` spreads the model over all devices, as accelerate does; by default it is on the processor.

    Raises CheckpointError if transformers does not know the architecture, or finds tensors missing or unexpected.
    """
    from transformers import GenerationConfig

    from recall_merge.files.bounded import Bounded

    config = load_config(folder, vocabulary_size=vocabulary_size)
    with refused_by_transformers(folder), BUILD_LOCK:
        architecture, config = model_class(config)
        source = folder if tensors is None else None
        state = None if tensors is None else dict(tensors)
        options = {"config": config, "state_dict": state, "dtype": dtype, "device_map": device_map}
        with Bounded(folder):
            model, info = architecture.from_pretrained(source, **options, output_loading_info=True)
        if tensors is not None and (folder / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    from recall_merge.models.transformers_private import unread_names

    unread = unread_names(model)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(key for key in map(str, info[kind]) if kind != "unexpected_keys" or not unread.search(key)):
            raise CheckpointError(f"transformers finds {kind.replace('_', ' ')}: {wrong[:5]}", where=folder)
    return model.eval()


def model_class(config: Any) -> tuple[Any, Any]:
    """The class of a config's model, and the config that it takes: the class that the config names, if it has a language model's head.

    Otherwise the one that transformers has for such a config, which may be its text model alone. ValueError if there is none.
    """
    from transformers.models.auto import modeling_auto as auto

    mappings = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING)
    found: list[Any] = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    classes: list[Any] = [each for entry in found for each in (entry if isinstance(entry, tuple) else (entry,))]
    if not classes:
        raise ValueError(f"it has no language model for the model type '{config.model_type}'")
    chosen = next((each for each in classes if each.__name__ in (config.architectures or ())), classes[0])
    return chosen, config if issubclass(chosen.config_class, type(config)) else config.get_text_config()


def load_config(folder: Path, *, vocabulary_size: int | None = None) -> Any:
    """The config of a model folder. Raises CheckpointError if transformers does not know the architecture, or refuses a value."""
    from transformers import AutoConfig

    with refused_by_transformers(folder):
        with inert(folder) as place:
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        config.name_or_path = str(folder)
        if vocabulary_size is not None:
            config.get_text_config().vocab_size = vocabulary_size
        return config


def load_tokenizer(folder: Path, base: Path | None = None) -> Any:
    """The tokenizer of a model folder, or of its base where an adapter's folder has none, with the adapter's chat template.

    Raises CheckpointError if there is none.
    """
    own, folder = folder, folder if base is None or read_vocabulary(folder) is not None else base
    with quiet():
        tokenizer = open_tokenizer(folder)
    if own != folder and isinstance(template := chat_template(own), str):
        tokenizer.chat_template = template
    return tokenizer


@contextmanager
def refused_by_transformers(folder: Path) -> Iterator[None]:
    """Turn what transformers raises about a folder into an error of ours, and keep its messages off the terminal."""
    with quiet():
        try:
            yield
        except RecallError:
            raise
        except Exception as error:  # what configs and classes of models raise about odd values has no common type
            raise CheckpointError(f"transformers cannot build this model: {_first_line(error)}", where=folder, fix=ONLY_KNOWN) from error


@contextmanager
def running(model: Any) -> Iterator[None]:
    """Turn what a model's forward pass raises into an error of ours: what odd settings of a config do shows there."""
    try:
        yield
    except (RecallError, NotImplementedError):  # the latter from parameters that are not there yet
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_full(error) or "meta" in str(error).lower():
            raise
        what, fix = f"the model cannot be run: {_first_line(error)}", "check its config.json against that of the model it was made from"
        raise CheckpointError(what, where=getattr(model, "name_or_path", ""), fix=fix) from error


@process_wide
@contextmanager
def hushed() -> Iterator[None]:
    """As `quiet`, and without other packages' warnings of future changes."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
