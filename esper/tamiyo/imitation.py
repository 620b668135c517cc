"""The imitation policy of the concept documents: 27 numbers in, one of four classes out.

    v1 observation (27), standardised -> 64 -> ReLU -> 32 -> ReLU -> 4 logits: WAIT, GERMINATE, ADVANCE, PRUNE

A class becomes an action by rule:

- the slot is the one furthest in life (stage, then epochs in it, then the first) among those for which an op of the
  class is valid: the seed that the v1 observation describes;
- ADVANCE is FOSSILIZE where the mask allows that in the slot, which is where the seed holds, else the op ADVANCE;
- GERMINATE is the one that comes next in the heuristic's rotation: first free slot, next blueprint, default levers.

A class of which no op is valid is passed over: the best of the others is taken. With an epsilon the behaviour is the
exact mixture with the hierarchical uniform policy, as for every other rule.

Source: "Policy Tamiyo Design" (architecture, observation and action space). The inputs are standardised here: global
steps in the thousands stand beside an alpha in [0, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from esper.leyline.actions import ACTION_WIDTH, NUM_OPS, Bools, Op, check_mask, slot_slice
from esper.leyline.controller_specs import HEURISTIC, Heuristic
from esper.leyline.imitation import NUM_CLASSES, ActionClass, class_mask
from esper.leyline.protocols import BLOCK_ROWS, ActInputs, Carry, Decision, EpisodeStart
from esper.leyline.spec_base import Spec
from esper.leyline.tree import Floats
from esper.leyline.views import get_view
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.mixing import Proposal, draw_mixture, slot_matrix
from esper.tamiyo.networks import single_thread
from esper.tamiyo.normaliser import LAYOUTS, Normaliser

_STAGE_WEIGHT = 1000.0
"""More than the epochs that a seed can spend in a stage."""


class ImitationSpec(Spec):
    """The network of an imitation policy.

    Attributes:
        view: The observation view: the documents' 27 numbers.
        hidden: Widths of the hidden layers, ReLU after each.
        rules: The heuristic whose rotation and default levers make a GERMINATE whole.
    """

    kind: Literal["imitation"] = "imitation"
    view: Literal["v1"] = "v1"
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (64, 32)
    rules: Heuristic = HEURISTIC


class ImitationNet(nn.Module):
    """Logits of the four classes from a v1 observation."""

    def __init__(self, spec: ImitationSpec) -> None:
        super().__init__()
        self.spec = spec
        layout = LAYOUTS[spec.view]
        self.normaliser = Normaliser(layout, 0.0)
        widths = (layout.num_numbers, *spec.hidden)
        hidden = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], NUM_CLASSES))

    def forward(self, obs_NV: Tensor) -> Tensor:
        """Return the logits, float32 [N, C], before any mask."""
        shared, _ = self.normaliser(obs_NV)
        return cast(Tensor, self.layers(shared))


def class_logits(network: ImitationNet, obs_NV: NDArray[np.float32]) -> Floats:
    """Return the logits of the classes, float64 [N, C], computed in blocks of exactly BLOCK_ROWS rows."""
    out = np.empty((len(obs_NV), NUM_CLASSES), dtype=np.float64)
    for first in range(0, len(obs_NV), BLOCK_ROWS):
        part = obs_NV[first : first + BLOCK_ROWS]
        obs = np.zeros((BLOCK_ROWS, obs_NV.shape[1]), dtype=np.float32)
        obs[: len(part)] = part
        with single_thread(), torch.no_grad():
            out[first : first + len(part)] = network(torch.from_numpy(obs))[: len(part)].numpy()
    return out


def choose_classes(logits_NC: Floats, mask_NT: Bools) -> NDArray[np.int64]:
    """Return the class with the greatest logit among those of which some op is valid, int64 [N]."""
    best: NDArray[np.int64] = np.where(class_mask(mask_NT), logits_NC, -np.inf).argmax(axis=1).astype(np.int64)
    return best


class ImitationController:
    """An imitation policy that acts; the result of a row depends on that row alone, bit for bit.

    Carry: that of the heuristic whose rotation it follows.
    """

    def __init__(self, network: ImitationNet, *, name: str, sampled: bool) -> None:
        """`sampled` draws the class from the softmax over the valid ones instead of taking the best."""
        self.name = name
        self.network = network.eval()
        self.sampled = sampled
        self._rules = HeuristicController(network.spec.rules)
        self._view = get_view(network.spec.view)

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return the memory of new episodes; SpecError where an epsilon or a temperature is out of range."""
        return self._rules.start(episodes)

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return one decision per row; MaskError where a mask allows nothing or is inconsistent."""
        check_mask(inputs.mask_NT)
        carry = self._rules.remember(inputs, carry)
        temperature = np.asarray(carry["temperature"], dtype=np.float64)
        given = (
            np.where(np.isfinite(temperature), temperature, 1.0) if self.sampled else np.full_like(temperature, np.nan)
        )
        epsilon = np.asarray(carry["epsilon"], dtype=np.float64)
        mixture = draw_mixture(self._propose(inputs, carry), inputs, epsilon, given)
        return Decision(actions_NA=mixture.actions_NA, logp_N=mixture.logp_N, op_probs=mixture.op_probs_NO, carry=carry)

    def _propose(self, inputs: ActInputs, carry: Carry) -> Proposal:
        """The logit of each class as the score of the one op that it stands for, and the action that op would be."""
        mask = inputs.mask_NT
        num = len(mask)
        logits = class_logits(self.network, self._view.encode(inputs.columns, inputs.step_N))
        commit, advance = mask[:, slot_slice(Op.FOSSILIZE)], mask[:, slot_slice(Op.ADVANCE)]
        slot_of = {
            ActionClass.ADVANCE: _furthest(inputs, advance | commit),
            ActionClass.PRUNE: _furthest(inputs, mask[:, slot_slice(Op.PRUNE)]),
        }
        commits = commit[np.arange(num), slot_of[ActionClass.ADVANCE]]
        usable = class_mask(mask)
        scores = np.full((num, NUM_OPS), -np.inf)
        completions = np.zeros((num, NUM_OPS, ACTION_WIDTH), dtype=np.int8)
        completions[:, Op.GERMINATE] = self._rules.germination(inputs, carry)
        for op, code, stands in (
            (Op.WAIT, ActionClass.WAIT, usable[:, ActionClass.WAIT]),
            (Op.GERMINATE, ActionClass.GERMINATE, usable[:, ActionClass.GERMINATE]),
            (Op.ADVANCE, ActionClass.ADVANCE, usable[:, ActionClass.ADVANCE] & ~commits),
            (Op.FOSSILIZE, ActionClass.ADVANCE, usable[:, ActionClass.ADVANCE] & commits),
            (Op.PRUNE, ActionClass.PRUNE, usable[:, ActionClass.PRUNE]),
        ):
            scores[:, op] = np.where(stands, logits[:, code], -np.inf)
            if code in slot_of:
                completions[:, op, 0] = op
                completions[:, op, 1] = slot_of[code]
        return Proposal(scores_NO=scores, completions_NOA=completions)


def _furthest(inputs: ActInputs, valid_NS: Bools) -> NDArray[np.intp]:
    """The valid slot whose seed is furthest in life, [N]; meaningless where none is valid."""
    life = slot_matrix(inputs.columns, "stage") * _STAGE_WEIGHT + slot_matrix(inputs.columns, "epochs_in_stage")
    furthest: NDArray[np.intp] = np.where(valid_NS, np.nan_to_num(life), -1.0).argmax(axis=1)
    return furthest
