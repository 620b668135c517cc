"""The networks of policies and values: one small module with weights shared over slots.

    normalised view -> [ global block | slot blocks ]
    slot encoder (shared over slots, plus a learned slot embedding)     -> e_0 .. e_5
    trunk(global block, mean and max of e)                              -> h
    op entries = linear(h);  entries of slot i = head(h, e_i), head shared over slots

The trunk modulates the head of a slot (scale and shift, Perez et al. 2018): which slot is right depends on the state as
a product, which a sum learns slowly. The 4 slot-choice entries and 26 lever entries of slot i depend on (h, e_i), so
Q(s, a) = U_op + U_slot + sum of U_lever is conditioned on op and slot; as logits they are a tree policy.

A recurrent trunk (Cho et al. 2014) reads an episode's observations in order, from a zero state: whole episodes at once
when learning (`History`), one at a time with the memory handed back when acting (`TreeNet.step`).
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
from esper.leyline.errors import SpecError
from esper.leyline.spec_base import Spec
from esper.leyline.views import EMBEDDED_BLUEPRINTS
from esper.tamiyo import tree_gradients, tree_torch
from esper.tamiyo.leaves import Leaves
from esper.tamiyo.normaliser import LAYOUTS, Normaliser

BLUEPRINT_DIMS = 4


class NetworkSpec(Spec):
    """Size of a network and how its entries are read.

    Attributes:
        kind: Tells the specification from those of other networks in a checkpoint.
        view: The observation view; `v4-hidden` is v4 without the host's descriptors.
        trunk: `gru` remembers the episode; it reads the view alone, no previous action.
        hidden: Width of the trunk, and of a recurrent one's memory.
        slot_hidden: Width of a slot's encoding and of the slot head.
        head: `logits`: the entries are logits. `values`: they are Q-values; the logits of a choice are the best value
            below each alternative over `temperature`, so that choosing step by step is choosing the best action.
        form: `additive`: an entry for every choice of the tree, an action's value is the sum of those that it passes.
            `listed`: the same sums, but only the germinations of the training data, and every action of the other ops,
            may be chosen: no sum of levers that were never tried together. For Q-learning (`cql`) alone.
            `atomic`: one entry for every whole action, which shares nothing between actions; an ablation, for small
            trees (see `esper.tamiyo.leaves`).
        num_leaves: Number of actions of an atomic network or of a list; a learner sets it.
        temperature: Value units; read by `values` alone.
        input_noise: Standard deviation of the noise on standardised inputs, in training mode alone. A data set has few
            environment seeds, and what tells them apart is learned by heart without it.
    """

    kind: Literal["tree"] = "tree"
    view: Literal["v1", "v3", "v4", "v4-hidden"] = "v4"
    trunk: Literal["mlp", "gru"] = "mlp"
    hidden: Annotated[int, Field(ge=1)] = 128
    slot_hidden: Annotated[int, Field(ge=1)] = 32
    head: Literal["logits", "values"] = "logits"
    form: Literal["additive", "listed", "atomic"] = "additive"
    num_leaves: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    input_noise: Annotated[float, Field(ge=0)] = 0.3


@dataclass(frozen=True, slots=True)
class History:
    """Whole episodes, and which of their states are meant.

    Attributes:
        obs_ETV: Observations of E episodes from their first one on, padded behind to T states. A state's result depends
            on what came before it alone, so the padding, which `at_N` never names, has no part in any.
        at_N: The states meant, episode * T + step, int64 [N].
    """

    obs_ETV: Tensor
    at_N: Tensor


Inputs = Tensor | History
"""What a network reads: rows [N, V], or rows with the episodes that they belong to."""


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
        layers = [
            nn.Linear(self.layout.num_global + 2 * spec.slot_hidden, spec.hidden),
            nn.LayerNorm(spec.hidden),
            nn.ReLU(),
        ]
        self.memory: nn.GRU | None = None
        if spec.trunk == "gru":
            self.memory = nn.GRU(spec.hidden, spec.hidden, batch_first=True)
            self.after_memory = nn.LayerNorm(spec.hidden)  # a memory starts small; without this heads learn it slowly
        else:
            layers += [nn.Linear(spec.hidden, spec.hidden), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)

    def forward(self, obs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the trunk's state and the slots' encodings.

        Raises:
            SpecError: A recurrent network without the episodes of its rows.
        """
        if isinstance(obs, History):
            num, steps = obs.obs_ETV.shape[:2]
            state, slots = self._see(obs.obs_ETV.flatten(0, 1))
            if self.memory is not None:
                state = self.after_memory(self.memory(state.reshape(num, steps, -1))[0]).flatten(0, 1)
            return state[obs.at_N], slots[obs.at_N]
        if self.memory is not None:
            raise SpecError(
                "a recurrent network was given rows without their episodes\n"
                "  expected: a History of whole episodes, or `step` with the memory"
            )
        return self._see(obs)

    def step(self, obs_NV: Tensor, memory_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the state, the slots' encodings and the memory after one observation of each of N episodes."""
        state, slots = self._see(obs_NV)
        if self.memory is None:
            return state, slots, memory_NH
        out, after = self.memory(state.unsqueeze(1), memory_NH.unsqueeze(0))
        return self.after_memory(out.squeeze(1)), slots, after.squeeze(0)

    def _see(self, obs_NV: Tensor) -> tuple[Tensor, Tensor]:
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
    """Entries from a view: a policy's logits or action values, by choice (TREE_WIDTH) or, atomic, by whole action.

    What reads `entries` goes by `spec.form`: learners and controllers use these methods and need not know it.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = StateEncoder(spec)
        self.leaves = None if spec.form == "additive" else Leaves(spec.num_leaves)
        if spec.form == "listed" and spec.head != "values":
            raise SpecError(
                'a policy of form "listed"\n  expected: head "values"; a policy imitates what is in the data'
            )
        if spec.form == "atomic":
            self.leaf_in = nn.Linear(spec.hidden + MAX_SLOTS * spec.slot_hidden, spec.hidden)
            self.leaf_out = nn.Linear(spec.hidden, spec.num_leaves)
            _start_small(self.leaf_out)
            return
        self.op_out = nn.Linear(spec.hidden, NUM_OPS)
        self.from_trunk = nn.Linear(spec.hidden, 2 * spec.slot_hidden)
        self.from_slot = nn.Linear(spec.slot_hidden, spec.slot_hidden)
        self.slot_head = nn.Linear(spec.slot_hidden, NUM_OPS - 1 + NUM_LEVER_CHOICES)
        for last in (self.op_out, self.slot_head):
            _start_small(last)

    def forward(self, obs: Inputs) -> Tensor:
        """Return the entries, float32 [N, TREE_WIDTH], or [N, leaves] of an atomic network."""
        return self._entries(*self.encoder(obs))

    def step(self, obs_NV: Tensor, memory_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the entries of one observation of each episode, and the memory after it (zeros before the first)."""
        state, slots, after = self.encoder.step(obs_NV, memory_NH)
        return self._entries(state, slots), after

    def _entries(self, state: Tensor, slots: Tensor) -> Tensor:
        if self.spec.form == "atomic":
            wide = torch.cat([state, slots.flatten(1)], dim=1)
            return cast(Tensor, self.leaf_out(torch.relu(self.leaf_in(wide))))
        scale, shift = self.from_trunk(state).unsqueeze(1).chunk(2, dim=2)
        hidden = torch.relu((1 + scale) * self.from_slot(slots) + shift)
        entries = self.slot_head(hidden)
        choices = entries[:, :, : NUM_OPS - 1].transpose(1, 2).flatten(1)
        levers = entries[:, :, NUM_OPS - 1 :].flatten(1)
        return torch.cat([self.op_out(state), choices, levers], dim=1)

    def _of_leaves(self, leaves: Leaves, entries: Tensor) -> Tensor:
        """Return a value for each whole action, [N, leaves]."""
        return entries if self.spec.form == "atomic" else leaves.sums(entries)

    def of_action(self, entries: Tensor, actions_NA: Tensor) -> Tensor:
        """Return Q(s, a) of canonical actions, [N]."""
        if self.leaves is not None and self.spec.form == "atomic":
            return self.leaves.of_action(entries, actions_NA)
        return tree_torch.path_sum(entries, actions_NA)

    def at_best(self, entries: Tensor, chosen_by: Tensor, mask_NT: Tensor) -> Tensor:
        """Return the value of the valid action that is best by the entries `chosen_by`, [N]."""
        if self.leaves is not None:
            values, by = (self._of_leaves(self.leaves, part) for part in (entries, chosen_by))
            return self.leaves.at_argmax(values, by, mask_NT)
        return tree_torch.at_argmax(entries, chosen_by, mask_NT)

    def log_sum(self, entries: Tensor, mask_NT: Tensor, prior_NT: Tensor | None = None) -> Tensor:
        """Return log sum over valid actions of rho(a) exp Q(s, a), [N].

        Args:
            entries: Values.
            mask_NT: Valid choices.
            prior_NT: log rho by choice, as `tree_torch.log_softmax` gives it, of ops and slots; over the actions of an
                op and slot rho is uniform. None weighs every action with 1.
        """
        if self.leaves is not None:
            return self.leaves.log_sum(self._of_leaves(self.leaves, entries), mask_NT, prior_NT)
        if prior_NT is not None:
            entries = entries + prior_NT.masked_fill(~mask_NT, 0.0)
        return tree_gradients.logsumexp(entries, mask_NT)

    def logits_of(self, entries: Tensor, mask_NT: Tensor) -> Tensor:
        """Return the logits by choice of the policy that entries stand for, float32 [N, TREE_WIDTH]."""
        if self.spec.head == "values":
            if self.leaves is not None:
                return self.leaves.best_below(self._of_leaves(self.leaves, entries), mask_NT) / self.spec.temperature
            return tree_torch.best_below(entries, mask_NT) / self.spec.temperature
        return entries if self.leaves is None else self.leaves.log_marginals(entries, mask_NT)

    def logits(self, obs: Inputs, mask_NT: Tensor) -> Tensor:
        """Return the logits of the policy that the entries stand for, float32 [N, TREE_WIDTH]."""
        return self.logits_of(self(obs), mask_NT)

    def log_policy(self, obs: Inputs, mask_NT: Tensor) -> Tensor:
        """Return the policy's masked log-probabilities by choice, float32 [N, TREE_WIDTH]."""
        return tree_torch.log_softmax(self.logits(obs, mask_NT), mask_NT)

    def log_prob(self, obs: Inputs, mask_NT: Tensor, actions_NA: Tensor) -> Tensor:
        """Return the joint log-probability of canonical actions that a policy (`logits`) is trained by, [N]."""
        if self.leaves is not None and self.spec.head == "logits":
            return self.leaves.log_prob(self(obs), mask_NT, actions_NA)
        return tree_gradients.action_log_prob(self.logits(obs, mask_NT), mask_NT, actions_NA)


def _start_small(last: nn.Linear) -> None:
    nn.init.orthogonal_(last.weight, 0.01)
    nn.init.zeros_(last.bias)


class ValueNet(nn.Module):
    """A state value from a view."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.encoder = StateEncoder(spec)
        self.out = nn.Linear(spec.hidden, 1)
        nn.init.zeros_(self.out.bias)

    def forward(self, obs: Inputs) -> Tensor:
        """Return V(s), float32 [N]."""
        state, _ = self.encoder(obs)
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
