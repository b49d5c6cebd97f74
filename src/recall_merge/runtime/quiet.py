"""Other packages' messages, kept off the terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from recall_merge.runtime.parallel import process_wide


@process_wide
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


@process_wide
@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub library's bars, warnings and news of retries (with signed addresses) off the terminal; what matters is raised."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as noise

    level, bars = noise.get_verbosity(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise.set_verbosity_error()
        disable_progress_bars()
        try:
            yield
        finally:
            noise.set_verbosity(level)
            if bars:
                enable_progress_bars()
