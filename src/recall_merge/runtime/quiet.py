"""Other packages' messages, kept off the terminal."""

from __future__ import annotations

import logging
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
