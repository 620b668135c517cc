"""Task data in memory as tensors: training, validation (what controllers and rewards see) and test (reported only)."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.hosts import DataShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows of a task.

    Attributes:
        inputs: Images, float32 [N, C, H, W] (channels last in memory), or tokens, int64 [N, T].
        labels: Classes, int64 [N], or next tokens, int64 [N, T].
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, num_rows: int) -> Split:
        """Return the first rows."""
        return Split(inputs=self.inputs[:num_rows], labels=self.labels[:num_rows])

    def to(self, device: torch.device) -> Split:
        """Return the rows on a device."""
        return Split(inputs=self.inputs.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """The splits of a task, and where they came from.

    Attributes:
        train: What the host learns from.
        val: What is read at the end of an episode.
        val_epoch: The part of `val` that is read every epoch.
        test: Reported, never observed.
        shape: What a host reads and answers.
        source: Where the data came from, in words.
        digest: The first 16 hex digits of the SHA-256 of all splits' bytes.
        chance: Accuracy of guessing.
    """

    train: Split
    val: Split
    val_epoch: Split
    test: Split
    shape: DataShape
    source: str
    digest: str
    chance: float

    @property
    def device(self) -> torch.device:
        """Where the splits lie, all of them."""
        return self.train.inputs.device

    def to(self, device: torch.device) -> TaskData:
        """Return the data on a device, in the same memory layout; rows that two splits share are moved once."""
        if device == self.device:
            return self
        val = self.val.to(device)
        return dataclasses.replace(
            self,
            train=self.train.to(device),
            val=val,
            val_epoch=val.first(len(self.val_epoch)),
            test=self.test.to(device),
        )


def content_digest(*splits: Split) -> str:
    """Return the first 16 hex digits of the SHA-256 of the splits' bytes."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.inputs, split.labels):
            digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
            for rows in torch.split(tensor, 1024):  # a copy of the whole would double the memory
                digest.update(rows.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
