"""Where numbers are worked on: the processor, or an accelerator by its name; what it can do, and whether its memory is full."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from recall_merge.runtime.errors import RunError

if TYPE_CHECKING:
    import torch

AUTO, CPU = "auto", "cpu"
WORDS = (AUTO, CPU, "cuda", "mps", "xpu")
BRANDS = {"cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}


def _check_word(name: str) -> str:
    word, colon, index = name.partition(":")
    if word not in WORDS or (colon and (word not in BRANDS or not re.fullmatch(r"[0-9]{1,4}", index))):
        fix = f"give {', '.join(WORDS)}, or one of several by its number, such as cuda:1"
        raise PydanticCustomError("device", "there is no device '{name}'", {"name": name, "fix": fix})
    return name


DeviceName = Annotated[str, AfterValidator(_check_word)]
"""`auto`, `cpu`, or the name of an accelerator with its number, as in `cuda:1`. Whether this machine has it is for `find_device` to say."""


def find_device(name: str | None = None) -> torch.device:
    """A device of this machine. `auto` is its first accelerator, or the processor where there is none.

    Raises RunError, which names the devices that there are.
    """
    import torch

    try:
        word, _, index = _check_word(AUTO if name is None else name).partition(":")
    except PydanticCustomError as error:
        raise RunError(error.message(), where="device", fix=(error.context or {})["fix"]) from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    others = [torch.device(accelerator.type, number) for number in range(torch.accelerator.device_count())] if accelerator else []
    known = [torch.device("cpu"), *others]
    if word == AUTO:
        return known[1] if others else known[0]
    wanted = torch.device(word, int(index or 0)) if word in BRANDS else known[0]
    if wanted not in known:
        what = f"there is no device '{name}'" if accelerator and accelerator.type == word else f"there is no {BRANDS[word]} device"
        raise RunError(what, where="device", fix=f"known here: {', '.join(map(str, known))}")
    return wanted


def hardware(device: torch.device) -> str:
    """A device as a record names it, by what decides its bytes: its kind and model, not its number."""
    import torch

    name = getattr(torch.get_device_module(device), "get_device_name", None) if device.type != "cpu" else None
    return f"{device.type} ({name(device)})" if name else device.type


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. Apple's do not, nor do some of Intel's."""
    import torch

    return device.type != "mps" and (device.type != "xpu" or bool(torch.xpu.get_device_properties(device).has_fp64))


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is what a device is fast in: any accelerator but those that only emulate it."""
    import torch

    if device.type == "cpu":
        return False
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def is_full(error: BaseException) -> bool:
    """Whether an accelerator had too little memory. Torch has a type for it, which not all of its parts use."""
    import torch

    words = ("out of memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
