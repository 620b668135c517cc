"""Policies over a finite list of canonical actions: what libraries without an action tree can learn.

A flat network scores every action of its list. The list is part of the policy (a buffer among its weights), and at
decision time the tree mask rules out what is not valid, so a flat policy meets the engine as any other controller does.
Shape suffixes: N rows, L the listed actions, the others as in `esper.leyline.actions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import log_softmax
from torch import Tensor, nn

from esper.leyline import tree
from esper.leyline.actions import (
    ACTION_WIDTH,
    NUM_OPS,
    OP_SLICE,
    Actions,
    Bools,
    check_mask,
    entries_of,
)
from esper.leyline.protocols import BLOCK_ROWS, ActInputs, Carry, Decision, EpisodeStart
from esper.leyline.spec_base import Spec
from esper.leyline.views import EMBEDDED_BLUEPRINTS, get_view
from esper.tamiyo.mixing import start_noise, uniform_log_probs
from esper.tamiyo.networks import single_thread
from esper.tamiyo.normaliser import LAYOUTS, Normaliser
from esper.tamiyo.policy import mix

Floats = NDArray[np.float64]


class FlatSpec(Spec):
    """Size of a flat network and how its scores are read.

    Attributes:
        view: The observation view.
        hidden: Widths of the hidden layers, ReLU after each.
        num_actions: Length of the list of actions.
        head: `logits`: the scores are logits. `values`: they are Q-values.
        temperature: Value units; what values are divided by to be logits. Read by `values` alone, where it matters
            when the policy is sampled.
    """

    kind: Literal["flat"] = "flat"
    view: Literal["v1", "v3", "v4", "v4-hidden"] = "v4"
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (256, 256)
    num_actions: Annotated[int, Field(ge=1)]
    head: Literal["logits", "values"] = "logits"
    temperature: Annotated[float, Field(gt=0)] = 1.0


def valid_actions(actions_LA: Actions, mask_NT: Bools) -> Bools:
    """Return which of the listed canonical actions each row's mask allows, bool [N, L]."""
    entries, read = entries_of(actions_LA)
    allowed = np.ones((len(mask_NT), len(actions_LA)), dtype=bool)
    for column in range(ACTION_WIDTH):
        allowed &= mask_NT[:, entries[:, column]] | ~read[:, column]
    return allowed


class FlatNet(nn.Module):
    """Scores of listed actions from a view: normaliser, multilayer perceptron, one output per action."""

    actions: Tensor

    def __init__(self, spec: FlatSpec) -> None:
        super().__init__()
        self.spec = spec
        layout = LAYOUTS[spec.view]
        self.normaliser = Normaliser(layout, 0.0)
        self.num_inputs = layout.num_numbers + layout.num_indices * (EMBEDDED_BLUEPRINTS + 1)
        widths = (self.num_inputs, *spec.hidden)
        hidden = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], spec.num_actions))
        self.register_buffer("actions", torch.zeros(spec.num_actions, ACTION_WIDTH, dtype=torch.int8))

    def inputs(self, obs_NV: Tensor) -> Tensor:
        """Return what the layers see, float32 [N, num_inputs]: normalised numbers, then one-hot blueprint indices."""
        layout = self.normaliser.layout
        shared, blocks = self.normaliser(obs_NV[:, : layout.num_numbers])
        index = obs_NV[:, layout.num_numbers :].long() + 1
        one_hot = nn.functional.one_hot(index, EMBEDDED_BLUEPRINTS + 1)
        return torch.cat([shared, blocks.flatten(1), one_hot.flatten(1).to(shared.dtype)], dim=1)

    def forward(self, obs_NV: Tensor) -> Tensor:
        """Return the scores, float32 [N, num_actions]."""
        return cast(Tensor, self.layers(self.inputs(obs_NV)))

    def logits(self, obs_NV: Tensor) -> Tensor:
        """Return the logits that the scores stand for, float32 [N, num_actions], before any mask."""
        scores = self(obs_NV)
        return cast(Tensor, scores if self.spec.head == "logits" else scores / self.spec.temperature)


class FlatController:
    """A flat network that acts; the result of a row depends on that row alone, bit for bit."""

    def __init__(self, network: FlatNet, *, name: str, sampled: bool) -> None:
        self.name = name
        self.network = network.eval()
        self.sampled = sampled
        self.actions_LA: Actions = network.actions.numpy()
        self._view = get_view(network.spec.view)

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return the memory of new episodes: their epsilon and temperature; SpecError where one is out of range."""
        return start_noise(episodes)

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return one decision per row; MaskError where a mask allows nothing or is inconsistent."""
        mask = inputs.mask_NT
        check_mask(mask)
        temperature = np.asarray(carry["temperature"], dtype=np.float64)
        own = self._log_probs(self._view.encode(inputs.columns, inputs.step_N), mask, temperature)
        uniform = uniform_log_probs(mask)
        chosen = _draw(own, inputs.uniforms[:, 1])
        epsilon = np.asarray(carry["epsilon"], dtype=np.float64)
        explores = inputs.uniforms[:, 0] < epsilon
        explored = tree.sample(uniform, mask, inputs.uniforms[:, 1:])
        actions = np.where(explores[:, None], explored, self.actions_LA[chosen]).astype(np.int8)
        same = (actions[:, None, :] == self.actions_LA).all(axis=2)
        own_logp = np.where(same, own, -np.inf).max(axis=1, initial=-np.inf)
        logp = mix(own_logp, tree.log_prob(uniform, actions, mask), epsilon)
        own_ops = np.exp(own) @ np.eye(NUM_OPS)[self.actions_LA[:, 0]]
        op_probs = (1 - epsilon)[:, None] * own_ops + epsilon[:, None] * np.exp(uniform[:, OP_SLICE])
        return Decision(actions_NA=actions, logp_N=logp, op_probs=op_probs, carry=carry)

    def _log_probs(self, obs_NV: NDArray[np.float32], mask_NT: Bools, temperature_N: Floats) -> Floats:
        """Return the policy's log-probabilities over its list, [N, L]; a greedy one has 0 at its choice."""
        masked = np.where(valid_actions(self.actions_LA, mask_NT), self._logits(obs_NV), -np.inf)
        if not self.sampled:
            return np.where(np.arange(masked.shape[1]) == masked.argmax(axis=1)[:, None], 0.0, -np.inf)
        result: Floats = log_softmax(masked / np.where(np.isfinite(temperature_N), temperature_N, 1.0)[:, None], axis=1)
        return result

    def _logits(self, obs_NV: NDArray[np.float32]) -> Floats:
        """Return float64 logits, computed in blocks of exactly BLOCK_ROWS rows."""
        out = np.empty((len(obs_NV), len(self.actions_LA)), dtype=np.float64)
        for first in range(0, len(obs_NV), BLOCK_ROWS):
            part = obs_NV[first : first + BLOCK_ROWS]
            obs = np.zeros((BLOCK_ROWS, obs_NV.shape[1]), dtype=np.float32)
            obs[: len(part)] = part
            with single_thread(), torch.no_grad():
                out[first : first + len(part)] = self.network.logits(torch.from_numpy(obs))[: len(part)].numpy()
        return out


def _draw(logp_NL: Floats, uniforms_N: Floats) -> NDArray[np.intp]:
    """Inverse CDF; rounding never reaches an action of probability zero."""
    cumulative = np.exp(logp_NL).cumsum(axis=1)
    index = (uniforms_N[:, None] * cumulative[:, -1:] >= cumulative).sum(axis=1)
    last = logp_NL.shape[1] - 1 - np.isfinite(logp_NL)[:, ::-1].argmax(axis=1)
    return np.asarray(np.minimum(index, last))
