"""Torch under keyed randomness, one thread, a device and declared numerics: what makes equal specs give equal bytes.

A process computes on one device, its slot: the CPU, unless `use_device` names another. Everything random is drawn on
the CPU and moved, so that runs on different devices start from the same weights and see the same batches.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from esper.kasmina.hosts.base import MIN_CHANNELS_LAST
from esper.leyline.errors import SpecError
from esper.leyline.keys import KeyPart, derive_seed

CPU = torch.device("cpu")

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's mallopt."""

_SLOT = {"device": CPU}

ModuleKind = TypeVar("ModuleKind", bound=nn.Module)


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors free, which else goes back to the system page by page.

    Validation of 32x32 images is a third faster for it. Without glibc nothing happens.
    """
    try:
        settings = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, value in ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20)):
        settings(name, value)


def single_thread() -> None:
    """Make this process compute with one torch thread; reductions over several would not be reproducible."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def use_device(name: str) -> None:
    """Make `cpu` or `cuda:N` the slot of this process, for all that it computes from now on."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _SLOT["device"] = device


def slot_device() -> torch.device:
    """Return the device that this process computes on."""
    return _SLOT["device"]


def require_numerics(numerics: str, device: torch.device) -> None:
    """Raise SpecError where an environment's numerics are not those of a device."""
    if numerics.partition("-")[0] != device.type:
        raise SpecError(
            f"an environment with numerics {numerics!r} cannot run on {device}\n"
            "  expected: a slot of that kind (--devices), or the same environment under other numerics (--numerics), "
            "which gives its episodes ids of their own"
        )


@contextmanager
def declared_numerics(numerics: str, device: torch.device) -> Iterator[None]:
    """Within it, the device computes as an environment declares: full float32, TF32, or bfloat16 where it is safe.

    Everything belongs inside: training, validation and the final scores. Contexts may be nested.

    Args:
        numerics: `cpu-fp32`, `cuda-fp32`, `cuda-tf32` or `cuda-bf16`.
        device: Where the environment runs.

    Raises:
        SpecError: The numerics are not those of the device.
    """
    require_numerics(numerics, device)
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    # torch allows convolutions, but not matrix products, TF32 unless it is told otherwise
    matmul.allow_tf32 = cudnn.allow_tf32 = numerics == "cuda-tf32"
    # no cache: it would keep the low-precision copy of a weight beyond the step that changes the weight
    low = torch.autocast("cuda", torch.bfloat16, enabled=numerics == "cuda-bf16", cache_enabled=False)
    try:
        with low:
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def torch_generator(*parts: KeyPart) -> torch.Generator:
    """Return a CPU generator keyed by the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def keyed_initialisation(*parts: KeyPart) -> Iterator[None]:
    """Within it, modules are initialised from the key; the process's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*parts))  # torch.manual_seed would seed every device
        yield


def lay_out(module: ModuleKind) -> ModuleKind:
    """Return the module with the weights of its convolutions channels last, where that is faster."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.out_channels >= MIN_CHANNELS_LAST:
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


@lru_cache(maxsize=1)
def code_commit() -> str:
    """Return the commit of the checkout that this code runs from, "+" where it was changed, "unknown" without git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
