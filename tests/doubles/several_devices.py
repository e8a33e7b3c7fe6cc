"""A model whose blocks lie on two devices, on a machine that has one: tensors with a device and without contents.

Torch's fake tensors know shapes, dtypes and devices, and run every operation but the arithmetic. The second device is
called ``meta``, since autograd goes through no name that this build of torch has no support for. What this shows is
where tensors lie; that the numbers are right is for tests on one device, and for several real GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FIRST, SECOND = "cpu", "meta"

_MOVES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}


class OneDevice(TorchDispatchMode):
    """Raises where an operation gets tensors of two devices, as CUDA would; counts those on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.on_second = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 and func._schema.name not in _MOVES:
            raise AssertionError(f"{func} gets tensors on {sorted(devices)}")
        self.on_second += SECOND in devices
        if func is torch.ops.aten.bincount.default:  # how long its result is depends on the contents
            return torch.zeros(
                args[2] if len(args) > 2 else kwargs["minlength"], dtype=torch.int64, device=args[0].device
            )
        return func(*args, **(kwargs or {}))


class NoContents(TorchFunctionMode):
    """Where numbers are asked of a tensor without contents, they are zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "numpy":
            assert args[0].device.type == FIRST, "only a tensor in main memory becomes an array"
            return np.zeros(tuple(args[0].shape), str(args[0].dtype).removeprefix("torch."))
        if name in ("__float__", "item"):
            return 0.0
        if name == "__int__":
            return 0
        if name == "__bool__":
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended(model: nn.Module, n_first: int) -> Iterator[OneDevice]:
    """Everything made inside has a device and no contents; so has ``model``, which is spread over two.

    Its blocks from ``n_first`` on, the last norm and the head lie on the second device, with accelerate's hooks.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        watch = stack.enter_context(OneDevice())
        stack.enter_context(NoContents())
        inner: Any = model.model
        second = [*inner.layers[n_first:], inner.norm, model.lm_head]
        moved = {id(child) for module in second for child in module.modules()}
        for child in model.modules():
            for store in (child._parameters, child._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        device = SECOND if id(child) in moved else FIRST
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        store[name] = nn.Parameter(empty, requires_grad=False) if store is child._parameters else empty
        for module in second:
            add_hook_to_module(module, AlignDevicesHook(execution_device=SECOND))
        for module in inner.layers[:n_first]:
            add_hook_to_module(module, AlignDevicesHook(execution_device=FIRST))
        add_hook_to_module(model, AlignDevicesHook(execution_device=FIRST, io_same_device=True))
        yield watch
