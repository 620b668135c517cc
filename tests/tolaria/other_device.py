"""Another device without a GPU: torch's meta device in the place of one, under rules stricter than a GPU's.

`other_device` runs anything on it: whatever mixes the devices raises, and what would make the CPU wait for the device
is counted and answered with a made-up number.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.tolaria import runtime

META = torch.device("meta")
aten = torch.ops.aten


class MixedDevicesError(AssertionError):
    """An operation got tensors of both devices."""


@contextmanager
def other_device():
    """Within it, the meta device is taken for one with all kernels; yields the `OtherDevice` that watches."""
    with (
        mock.patch.object(clip_grad, "_device_has_foreach_support", return_value=True),
        mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", return_value=["cpu", "meta"]),
        OtherDevice() as device,
    ):
        yield device


class OtherDevice(TorchDispatchMode):
    """Counts in `waits` what would make the CPU wait, in `moves` what is copied to the device."""

    def __init__(self):
        super().__init__()
        self.waits, self.moves = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if tensor.device == META]
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, tensors, args, kwargs)
        if not there:
            return func(*args, **kwargs)
        if len(there) < len(tensors):
            raise MixedDevicesError(f"{func} got {[(str(t.device), tuple(t.shape)) for t in tensors]}")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"):
            self.waits[name] += 1
        if name == "_local_scalar_dense":
            return {torch.bool: True, torch.int64: 1}.get(there[0].dtype, 0.5)
        if name.startswith("_fused_sgd") or name.startswith("_fused_adam"):
            return None  # the meta device has no such kernels; their arguments were checked above
        return func(*args, **kwargs)

    def _copy(self, func, name, tensors, args, kwargs):
        source = tensors[-1] if name == "copy_" else tensors[0]
        target = tensors[0].device if name == "copy_" else kwargs.get("device") or source.device
        if source.device == META and target != META:
            self.waits["copied back"] += 1
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        self.moves["to the device"] += source.device != target
        return func(*args, **kwargs)


@contextmanager
def slot_on(device):
    """Within it, this process computes on `device`, whatever numerics its environments declare."""
    with mock.patch.dict(runtime._SLOT, device=device), mock.patch.object(runtime, "require_numerics"):
        yield
