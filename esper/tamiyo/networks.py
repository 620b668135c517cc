"""The networks of policies and values: one small module with weights shared over slots.

    normalised view -> [ global block | slot blocks ]
    slot encoder (shared over slots, plus a learned slot embedding)     -> e_0 .. e_5
    trunk(global block, mean and max of e)                              -> h
    op entries = linear(h);  entries of slot i = head(h, e_i), head shared over slots

The trunk modulates the head of a slot (scale and shift, Perez et al. 2018): which slot is right depends on the state as
a product, which a sum learns slowly. The 4 slot-choice entries and 26 lever entries of slot i depend on (h, e_i), so
Q(s, a) = U_op + U_slot + sum of U_lever is conditioned on op and slot; as logits they are a tree policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from esper.leyline.actions import MAX_SLOTS, NUM_LEVER_CHOICES, NUM_OPS
from esper.leyline.spec_base import Spec
from esper.leyline.views import EMBEDDED_BLUEPRINTS, NUM_GLOBAL_V4, NUM_SLOT_V4, VIEWS
from esper.tamiyo import tree_torch

NUM_GLOBAL_V3 = 23
NUM_SLOT_V3 = 31
BLUEPRINT_DIMS = 4
CLIP = 10.0
SMALLEST_SD = 1e-3
"""A column that varies less than this in the data is centred and not scaled."""


class NetworkSpec(Spec):
    """Size of a network and how its entries are read.

    Attributes:
        view: The observation view, v1, v3 or v4.
        hidden: Width of the trunk.
        slot_hidden: Width of a slot's encoding and of the slot head.
        head: `logits`: the entries are logits. `values`: they are Q-values; the logits of a choice are the best value
            below each alternative over `temperature`, so that choosing step by step is choosing the best action.
        temperature: Value units; read by `values` alone.
        input_noise: Standard deviation of the noise on standardised inputs, in training mode alone. A data set has few
            environment seeds, and what tells them apart is learned by heart without it.
    """

    view: Literal["v1", "v3", "v4"] = "v4"
    hidden: Annotated[int, Field(ge=1)] = 128
    slot_hidden: Annotated[int, Field(ge=1)] = 32
    head: Literal["logits", "values"] = "logits"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    input_noise: Annotated[float, Field(ge=0)] = 0.3


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the blocks of a view lie: global, then slots, then one blueprint index per slot.

    With `has_presence` the first column of a slot block says whether the host has that slot.
    """

    num_global: int
    num_slots: int
    slot_width: int
    num_indices: int
    has_presence: bool = False

    @property
    def num_numbers(self) -> int:
        """Columns that are numbers, not indices."""
        return self.num_global + self.num_slots * self.slot_width


LAYOUTS: dict[str, Layout] = {
    "v1": Layout(VIEWS["v1"].width, 0, 0, 0),
    "v3": Layout(NUM_GLOBAL_V3, 3, NUM_SLOT_V3, 3),
    "v4": Layout(NUM_GLOBAL_V4, MAX_SLOTS, NUM_SLOT_V4, 0, has_presence=True),
}


class Normaliser(nn.Module):
    """(x - mean) / sd, clipped; a slot column has one mean and sd for all slots, and an absent slot is all zero."""

    mean: Tensor
    scale: Tensor

    def __init__(self, layout: Layout, noise: float) -> None:
        super().__init__()
        self.layout = layout
        self.noise = noise
        self.register_buffer("mean", torch.zeros(layout.num_numbers))
        self.register_buffer("scale", torch.ones(layout.num_numbers))

    def fit(self, obs_NV: Tensor) -> None:
        """Set mean and sd from the rows of a data set; absent slots do not count."""
        layout = self.layout
        shared = _moments(obs_NV[:, : layout.num_global])
        if layout.num_slots:
            blocks = obs_NV[:, layout.num_global : layout.num_numbers].reshape(-1, layout.slot_width)
            present = blocks[blocks[:, 0] > 0] if layout.has_presence else blocks
            slots = _moments(present if len(present) else blocks)
            shared = tuple(torch.cat([a, b.repeat(layout.num_slots)]) for a, b in zip(shared, slots))  # type: ignore[assignment]
        self.mean.copy_(shared[0])
        self.scale.copy_(1.0 / shared[1])

    def forward(self, numbers_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the global block [N, G] and the slot blocks [N, slots, F]."""
        layout = self.layout
        scaled = ((numbers_NV - self.mean) * self.scale).clamp(-CLIP, CLIP)
        if self.training and self.noise > 0:
            scaled = scaled + self.noise * torch.randn_like(scaled)
        shape = (len(numbers_NV), layout.num_slots, layout.slot_width)
        blocks = scaled[:, layout.num_global :].reshape(shape)
        if layout.has_presence:
            raw = numbers_NV[:, layout.num_global :].reshape(shape)
            blocks = blocks * (raw[:, :, :1] > 0)
        return scaled[:, : layout.num_global], blocks


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows.double()
    mean, sd = wide.mean(dim=0), wide.std(dim=0, correction=0)
    return mean.float(), torch.where(sd < SMALLEST_SD, torch.ones_like(sd), sd).float()


class StateEncoder(nn.Module):
    """From a view to the trunk's state [N, hidden] and the slots' encodings [N, 6, slot_hidden]."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.layout = LAYOUTS[spec.view]
        self.normaliser = Normaliser(self.layout, spec.input_noise)
        width = self.layout.slot_width
        if self.layout.num_indices:
            self.blueprints = nn.Embedding(EMBEDDED_BLUEPRINTS + 1, BLUEPRINT_DIMS)
            width += BLUEPRINT_DIMS
        self.slot_embedding = nn.Parameter(torch.randn(MAX_SLOTS, spec.slot_hidden))
        self.slot_in = nn.Linear(width, spec.slot_hidden) if width else None
        self.slot_out = nn.Linear(spec.slot_hidden, spec.slot_hidden)
        self.trunk = nn.Sequential(
            nn.Linear(self.layout.num_global + 2 * spec.slot_hidden, spec.hidden),
            nn.LayerNorm(spec.hidden),
            nn.ReLU(),
            nn.Linear(spec.hidden, spec.hidden),
            nn.ReLU(),
        )

    def forward(self, obs_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the trunk's state and the slots' encodings."""
        shared, blocks = self.normaliser(obs_NV[:, : self.layout.num_numbers])
        embedding = self.slot_embedding.expand(len(obs_NV), -1, -1)
        if self.slot_in is not None:
            if self.layout.num_indices:
                index = obs_NV[:, self.layout.num_numbers :].long() + 1
                blocks = torch.cat([blocks, self.blueprints(index)], dim=2)
            encoded = self.slot_in(blocks)
            missing = MAX_SLOTS - encoded.shape[1]
            embedding = embedding + nn.functional.pad(encoded, (0, 0, 0, missing))
        slots = torch.relu(self.slot_out(torch.relu(embedding)))
        pooled = torch.cat([shared, slots.mean(dim=1), slots.amax(dim=1)], dim=1)
        return self.trunk(pooled), slots


class TreeNet(nn.Module):
    """TREE_WIDTH entries from a view: a policy's logits or additive action values."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = StateEncoder(spec)
        self.op_out = nn.Linear(spec.hidden, NUM_OPS)
        self.from_trunk = nn.Linear(spec.hidden, 2 * spec.slot_hidden)
        self.from_slot = nn.Linear(spec.slot_hidden, spec.slot_hidden)
        self.slot_head = nn.Linear(spec.slot_hidden, NUM_OPS - 1 + NUM_LEVER_CHOICES)
        for last in (self.op_out, self.slot_head):
            nn.init.orthogonal_(last.weight, 0.01)
            nn.init.zeros_(last.bias)

    def forward(self, obs_NV: Tensor) -> Tensor:
        """Return the entries, float32 [N, TREE_WIDTH]."""
        state, slots = self.encoder(obs_NV)
        scale, shift = self.from_trunk(state).unsqueeze(1).chunk(2, dim=2)
        hidden = torch.relu((1 + scale) * self.from_slot(slots) + shift)
        entries = self.slot_head(hidden)
        choices = entries[:, :, : NUM_OPS - 1].transpose(1, 2).flatten(1)
        levers = entries[:, :, NUM_OPS - 1 :].flatten(1)
        return torch.cat([self.op_out(state), choices, levers], dim=1)

    def logits(self, obs_NV: Tensor, mask_NT: Tensor) -> Tensor:
        """Return the logits of the policy that the entries stand for, float32 [N, TREE_WIDTH]."""
        entries = self(obs_NV)
        if self.spec.head == "logits":
            return cast(Tensor, entries)
        return tree_torch.best_below(entries, mask_NT) / self.spec.temperature

    def log_policy(self, obs_NV: Tensor, mask_NT: Tensor) -> Tensor:
        """Return the policy's masked log-probabilities by choice, float32 [N, TREE_WIDTH]."""
        return tree_torch.log_softmax(self.logits(obs_NV, mask_NT), mask_NT)


class ValueNet(nn.Module):
    """A state value from a view."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.encoder = StateEncoder(spec)
        self.out = nn.Linear(spec.hidden, 1)
        nn.init.zeros_(self.out.bias)

    def forward(self, obs_NV: Tensor) -> Tensor:
        """Return V(s), float32 [N]."""
        state, _ = self.encoder(obs_NV)
        return cast(Tensor, self.out(state)).squeeze(1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights and input noise inside draw from `seed` alone; torch's own generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def single_thread() -> Iterator[None]:
    """Torch computes on one thread inside, which its bytes depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
