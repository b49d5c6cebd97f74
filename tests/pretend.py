"""An accelerator without hardware: torch's device for backends in Python, whose tensors keep their numbers on the processor.

    install()                                          # for the whole process: nothing takes it away again
    torch.ones(2, device="pretend")                    # a tensor of that device, in any thread
    torch.ones(2, device="pretend") + torch.ones(2)    # refused, as on any accelerator

To torch it is what a GPU is: `torch.accelerator` finds it, `auto` chooses it, its tensors have no numpy, and no operation takes tensors of
it and of the processor together (but for numbers without an axis, and positions in an index). It computes by calling the same operation on
the processor, so the same work gives the same bytes as there. Fake tensors (`FakeTensorMode`) refuse mixed devices as well, but have no
numbers, which most methods ask for: the rank of a matrix, whether an entry is 0. And of CUDA a build for processors knows too little.

Passes back are beyond it. What it is made of (`torch._C._acc`, `_setup_privateuseone_for_python_backend`) is torch's own, for this very
purpose, and may change; checked with torch 2.13.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
ACROSS = {"_to_copy", "copy_", "_copy_from", "index", "index_put", "index_put_", "_index_put_impl_"}  # take tensors of two devices
KEYS = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
libraries: list[torch.library.Library] = []  # what they register lives as long as they do
calls: Counter[str] = Counter()  # by the name of the operation
limits: list[int] = []  # at most this many numbers in a tensor that an operation makes; none where the list is empty


class Module(_DummyBackendModule):
    """What torch asks of a device beside its tensors."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> None:
    """Make the device known to torch, for good."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    rest, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    libraries.extend([rest, aten])
    rest.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    # operations that torch would take apart into others; their parts make tensors that Python never sees
    whole = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    whole = [name for name in whole if any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in KEYS)]
    for name in (*whole, "aten::scaled_dot_product_attention"):  # attention by the very kernel of the processor
        base, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        aten.impl(name.removeprefix("aten::"), partial(_call, op), "PrivateUse1")


class Pretended(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # what comes to the processor is a plain tensor
    numbers: Tensor

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def __repr__(self) -> str:
        return f"pretended {self.numbers}"


def _pretend(numbers: Tensor) -> Tensor:
    tensor: Any = torch._C._acc.create_empty_tensor(numbers.shape, numbers.dtype)
    tensor.__class__ = Pretended
    tensor.numbers = numbers
    return tensor


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(op, args, kwargs)


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation, on the processor; what it returns is on this device if its arguments are, or if it is told so."""
    name = op._schema.name.removeprefix("aten::")
    calls[name] += 1
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    ours = [value for value in given if isinstance(value, Pretended)]
    if ours and name not in ACROSS and any(value.ndim for value in given if not isinstance(value, Pretended)):
        raise RuntimeError(f"Expected all tensors to be on the same device: {op}, {[(value.device, value.shape) for value in given]}")
    device = kwargs.get("device")
    here = bool(ours) if device is None else torch.device(device).type == NAME
    args, kwargs = tree_map(_bare, args), tree_map(_bare, kwargs)
    if name == "_copy_from":
        args[1].copy_(args[0])
        return given[1]
    if op in (
        torch.ops.aten.view.default,
        torch.ops.aten._unsafe_view.default,
    ):  # these tensors claim to lie one number after another, whatever their numbers do
        op = torch.ops.aten.reshape.default
    if name == "histc" and not args[0].is_floating_point():  # CUDA counts whole numbers, a processor does not
        return _pretend(torch.histc(args[0].float(), *args[1:], **kwargs).to(args[0].dtype))
    result = op(*args, **kwargs)
    own = {id(value.numbers): value for value in ours}  # an operation in place returns its argument
    for value in ours:
        if value.shape != value.numbers.shape:  # `squeeze_` and the like
            value.data = _pretend(value.numbers)
    # a view in inference mode is no inference tensor unless what it shows is one
    with torch.inference_mode(torch.is_inference_mode_enabled() and all(value.is_inference() for value in ours)):
        return tree_map(
            lambda value: own[id(value)] if id(value) in own else _new(value, here) if isinstance(value, Tensor) else value, result
        )


def _new(value: Tensor, here: bool) -> Tensor:
    if here and limits and value.numel() > limits[0]:
        raise torch.OutOfMemoryError("pretend out of memory. Tried to allocate more than there is.")
    return _pretend(value) if here else value


def _bare(value: Any) -> Any:
    """An argument as the processor takes it."""
    if isinstance(value, Pretended):
        return value.numbers
    return torch.device("cpu") if isinstance(value, torch.device) else value
