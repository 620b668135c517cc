"""The controller that tries seeds in several slots at once in isolation, keeps one and prunes the others.

One action a step, in this order: the next GERMINATE; once the last seed has incubated long enough, ADVANCE of the kept
one; PRUNE of the others, lowest slot first; FOSSILIZE of the kept one. Where the action that is due is not valid (a
random action came in between) it is passed over: a seed that is gone is not planted again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import ACTION_WIDTH, MAX_SLOTS, Actions, Bools, Op, slot_slice
from esper.leyline.blueprint_names import counterpart
from esper.leyline.controller_specs import Plant, TrialKeep
from esper.leyline.errors import SpecError
from esper.leyline.protocols import ActInputs, Carry, Decision, EpisodeStart
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import BLENDED_STAGES, Stage
from esper.tamiyo.mixing import draw_mixture, refuse_noise, slot_matrix, start_noise
from esper.tamiyo.schedules import certain, confirm_pending, due_plants, start_plans, submitted

Ints = NDArray[np.int64]
NONE = -1
UNMEASURED = 1e30


class TrialKeepController:
    """Carries out a trial, mixed with u by each episode's epsilon.

    Carry: that of a schedule (see `start_plans`), and `kept` int64 [N]: the slot that it chose, -1 before it has.
    """

    def __init__(self, spec: TrialKeep) -> None:
        self.name: str = spec.name
        self.spec = spec

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return the memory of new episodes.

        Raises:
            SpecError: A slot that the host lacks or may not use, fewer seeds allowed at once than are tried, or a
                temperature.
        """
        refuse_noise(self.name, episodes, epsilon=False)
        plans = [self._plants(episode.environment) for episode in episodes]
        kept = np.full(len(episodes), NONE, dtype=np.int64)
        return {**start_noise(episodes), **start_plans(plans, episodes, len(self.spec.slots)), "kept": kept}

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return one action per row with its exact probability under the mixture."""
        done = confirm_pending(inputs, carry)
        actions, plant = due_plants(inputs, carry, done)
        kept = self._kept(inputs, carry["kept"].astype(np.int64), plant)
        chosen = kept != NONE
        actions[chosen] = self._after_trial(inputs, kept)[chosen]
        plant = np.where(chosen, NONE, plant)
        mixture = draw_mixture(
            certain(actions, inputs.mask_NT),
            inputs,
            carry["epsilon"].astype(np.float64),
            carry["temperature"].astype(np.float64),
        )
        pending = submitted(mixture.actions_NA, carry, plant)
        return Decision(
            actions_NA=mixture.actions_NA,
            logp_N=mixture.logp_N,
            op_probs=mixture.op_probs_NO,
            carry={**carry, "done": done, "pending": pending, "kept": kept},
        )

    def _plants(self, environment: EnvironmentSpec) -> tuple[Plant, ...]:
        spec = self.spec
        if environment.seeds_cap < len(spec.slots):
            raise SpecError(
                f"{spec.name} tries {len(spec.slots)} seeds at once in environment {environment.name!r}\n"
                f"  expected: at most max_seeds, {environment.seeds_cap}"
            )
        blueprint = counterpart(spec.blueprint, environment.host.topology)
        return tuple(
            Plant(slot=slot, blueprint=blueprint, birth_epoch=turn, tempo_epochs=spec.tempo_epochs)
            for turn, slot in enumerate(spec.slots)
        )

    def _kept(self, inputs: ActInputs, kept_N: Ints, plant_N: Ints) -> Ints:
        """The kept slot of each row, chosen once no seed is due and the youngest has incubated long enough.

        A seed that is blended already, by a random action, is the kept one.
        """
        stage = slot_matrix(inputs.columns, "stage")
        ours = np.isin(np.arange(MAX_SLOTS), self.spec.slots)
        tried = (stage == Stage.TRAINING) & ours
        blended = np.isin(stage, [int(known) for known in BLENDED_STAGES]) & ours
        youngest = np.where(tried, slot_matrix(inputs.columns, "epochs_in_stage"), np.inf).min(axis=1)
        ripe = (plant_N == NONE) & tried.any(axis=1) & (youngest >= self.spec.incubation_epochs)
        choice = np.where(ripe, self._choice(inputs, tried), NONE)
        choice = np.where(blended.any(axis=1), blended.argmax(axis=1), choice)
        return np.where(kept_N == NONE, choice, kept_N)

    def _choice(self, inputs: ActInputs, tried_NS: Bools) -> Ints:
        """The slot told in advance while its seed is there, else the one whose probe is largest.

        A probe that was not measured counts least.
        """
        drop = np.nan_to_num(slot_matrix(inputs.columns, "val_loss_drop"), nan=-UNMEASURED, neginf=-UNMEASURED)
        largest: Ints = np.where(tried_NS, drop, -np.inf).argmax(axis=1).astype(np.int64)
        if self.spec.keep == "largest":
            return largest
        return np.where(tried_NS[:, self.spec.keep], self.spec.keep, largest)

    def _after_trial(self, inputs: ActInputs, kept_N: Ints) -> Actions:
        """What is due once a slot was chosen, int8 [N, 8]: the last of these that is valid.

        After a refused ADVANCE the others are pruned first: a gate that stays closed must not keep them alive.
        """
        mask, rows, slots = inputs.mask_NT, np.arange(len(kept_N)), np.arange(MAX_SLOTS)
        prunable = mask[:, slot_slice(Op.PRUNE)] & np.isin(slots, self.spec.slots) & (slots != kept_N[:, None])
        refused = (inputs.columns["last_executed"] == 0) & (inputs.columns["last_op"] == Op.ADVANCE)
        prune = prunable.any(axis=1)
        actions = np.zeros((len(kept_N), ACTION_WIDTH), dtype=np.int8)
        for op, able, slot in (
            (Op.FOSSILIZE, mask[:, slot_slice(Op.FOSSILIZE)][rows, kept_N], kept_N),
            (Op.PRUNE, prune, prunable.argmax(axis=1)),
            (Op.ADVANCE, mask[:, slot_slice(Op.ADVANCE)][rows, kept_N] & ~(refused & prune), kept_N),
        ):
            actions[able, 0] = op
            actions[able, 1] = slot[able]
        return actions
