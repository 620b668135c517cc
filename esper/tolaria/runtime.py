"""Torch under keyed randomness and one thread: the conditions under which equal specs give equal bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from esper.leyline.keys import KeyPart, derive_seed

ModuleKind = TypeVar("ModuleKind", bound=nn.Module)

MIN_CHANNELS_LAST = 8


def single_thread() -> None:
    """Make this process compute with one torch thread; reductions over several would not be reproducible."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def torch_generator(*parts: KeyPart) -> torch.Generator:
    """Return a CPU generator keyed by the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def keyed_initialisation(*parts: KeyPart) -> Iterator[None]:
    """Within it, modules are initialised from the key; the process's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*parts))
        yield


def lay_out(module: ModuleKind) -> ModuleKind:
    """Return the module with the weights of its convolutions channels last, where that is faster.

    Below MIN_CHANNELS_LAST outputs torch's batch norm is several times slower on channels-last activations.
    """
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
