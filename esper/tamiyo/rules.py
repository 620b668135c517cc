"""The two controls that read nothing: never act, and the hierarchical uniform policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esper.leyline.actions import ACTION_WIDTH, NUM_OPS, OP_SLICE, Op
from esper.leyline.controller_specs import NeverAct, UniformRandom
from esper.leyline.protocols import ActInputs, Carry, Decision, EpisodeStart
from esper.leyline.tree import log_prob, sample
from esper.tamiyo.mixing import refuse_noise, uniform_log_probs


class NeverActController:
    """WAIT at every step, with probability one."""

    def __init__(self, spec: NeverAct) -> None:
        self.name: str = spec.name

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return an empty memory; SpecError where an episode asks for an epsilon or a temperature."""
        refuse_noise(self.name, episodes, epsilon=True)
        return {}

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return WAIT for every row."""
        num = len(inputs.step_N)
        op_probs = np.zeros((num, NUM_OPS))
        op_probs[:, Op.WAIT] = 1.0
        actions = np.zeros((num, ACTION_WIDTH), dtype=np.int8)
        return Decision(actions_NA=actions, logp_N=np.zeros(num), op_probs=op_probs, carry=carry)


class UniformRandomController:
    """Draws from u: uniform over valid ops, then slots, then each lever.

    Mixing u with u changes nothing, so any epsilon is accepted.
    """

    def __init__(self, spec: UniformRandom) -> None:
        self.name: str = spec.name

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return an empty memory; SpecError where an episode asks for a temperature."""
        refuse_noise(self.name, episodes, epsilon=False)
        return {}

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return a draw from u per row, with its exact probability."""
        logp = uniform_log_probs(inputs.mask_NT)
        actions = sample(logp, inputs.mask_NT, inputs.uniforms[:, 1:])
        return Decision(
            actions_NA=actions,
            logp_N=log_prob(logp, actions, inputs.mask_NT),
            op_probs=np.exp(logp[:, OP_SLICE]),
            carry=carry,
        )
