"""A transformers model from tensors that we read ourselves; its own code comes from transformers, never from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ONLY_KNOWN = "only architectures that transformers itself knows can be run; recall never runs code from a checkpoint"


def build_model(
    folder: Path, tensors: Mapping[str, Tensor] | None = None, *, dtype: str = "float32", vocabulary_size: int | None = None
) -> Any:
    """A causal language model in evaluation mode.

    Args:
        folder: gives the config; and the weights too, when `tensors` is None.
        tensors: a whole model under the names of its files; what transformers renames or fuses on loading, it does here as well.
        dtype: 'float32', 'bfloat16', ... or 'auto' for the dtype of the config.
        vocabulary_size: rows of the token tensors, where they are not those of the config.

    Raises:
        CheckpointError: if transformers does not know the architecture, or finds tensors missing or unexpected.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(folder)
    with quiet():
        try:
            if vocabulary_size is not None:
                config.get_text_config().vocab_size = vocabulary_size
            architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            source = folder if tensors is None else None
            state = None if tensors is None else dict(tensors)
            model, info = architecture.from_pretrained(source, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"transformers cannot build this model: {_first_line(error)}", where=folder, fix=ONLY_KNOWN) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(f"transformers finds {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:5]}", where=folder)
    return model.eval()


def import_architecture(folder: Path) -> None:
    """Import what `build_model` of a folder with this config needs.

    Raises:
        CheckpointError: if transformers does not know the architecture.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(folder)
    with suppress(KeyError):  # none that `build_model` could build
        _ = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def load_config(folder: Path) -> Any:
    """The config of a model folder, as transformers knows it.

    Raises:
        CheckpointError: if transformers does not know the architecture, or refuses a value.
    """
    from transformers import AutoConfig

    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"transformers cannot build this model: {_first_line(error)}", where=folder, fix=ONLY_KNOWN) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: if there is none.
    """
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"there is no usable tokenizer: {_first_line(error)}", where=folder, fix="copy the tokenizer's files there"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and hints off the terminal; what matters is raised."""
    from transformers.utils import logging as noise

    level, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity(logging.ERROR)
    noise.disable_progress_bar()
    try:
        yield
    finally:
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
