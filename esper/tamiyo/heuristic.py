"""The rule-based controller: a plateau counter, a rotation of blueprints, thresholds on what a seed brings.

The reference heuristic and ten of the eleven behaviours are settings of `Heuristic`. Every op has a score and the
greedy action is the argmax: WAIT 0 (2 where nothing is proposed), GERMINATE 5 + 0.5 x plateau, ADVANCE 3 + improvement,
FOSSILIZE 3 + |removal cost|, PRUNE 4 + 0.3 x epochs in stage where the rule proposes them, -10 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esper.leyline.actions import (
    DWELL_EPOCHS,
    ISOLATIONS,
    LEVER_SIZES,
    MAX_SLOTS,
    NUM_OPS,
    OP_SLICE,
    SEED_LR_FACTORS,
    TEMPO_EPOCHS,
    Actions,
    Bools,
    Op,
    slot_slice,
)
from esper.leyline.blueprint_names import counterpart
from esper.leyline.controller_specs import Heuristic
from esper.leyline.host_specs import BLUEPRINTS
from esper.leyline.protocols import ActInputs, Carry, Decision, EpisodeStart
from esper.leyline.stages import LIVE_STAGES, Stage
from esper.leyline.tree import Floats
from esper.tamiyo.completion import (
    Ints,
    first_free_slot,
    germinate_rows,
    lever_part,
    lever_rows,
    nearest_allowed,
    nth_allowed,
)
from esper.tamiyo.mixing import Proposal, draw_mixture, slot_matrix, start_noise

NOT_PROPOSED = -10.0
MIN_TRAINING_EPOCHS = 3
ADVANCE_POINTS = 1.0
KEEP_POINTS = -0.5

_DEFAULT_BLEND = 0
_DEFAULT_TEMPO = TEMPO_EPOCHS.index(5)
_DEFAULT_DWELL = DWELL_EPOCHS.index(3)
_DEFAULT_SEED_LR = SEED_LR_FACTORS.index(1.0)


class HeuristicController:
    """Acts by the rules of a `Heuristic`, mixed with u by each episode's epsilon and temperature.

    Carry: `epsilon` and `temperature` float64 [N], `topology` and `isolation` (the environment's, indices) and
    `rotation` (germinations carried out so far, plus the start), int64 [N].
    """

    def __init__(self, spec: Heuristic) -> None:
        self.name: str = spec.name
        self.spec = spec
        self._ranks_by_topology = np.stack(
            [
                _rotation_ranks([names.index(counterpart(blueprint, topology)) for blueprint in spec.blueprints])
                for topology, names in BLUEPRINTS.items()
            ]
        )

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return the memory of new episodes."""
        first = [episode.replicate % LEVER_SIZES[0] if self.spec.start_by_replicate else 0 for episode in episodes]
        topology = [list(BLUEPRINTS).index(episode.environment.host.topology) for episode in episodes]
        isolation = [ISOLATIONS.index(episode.environment.isolation) for episode in episodes]
        return {
            **start_noise(episodes),
            "topology": np.array(topology, dtype=np.int64),
            "isolation": np.array(isolation, dtype=np.int64),
            "rotation": np.array(first, dtype=np.int64),
        }

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return one action per row with its exact probability under the mixture."""
        carry = self.remember(inputs, carry)
        mixture = draw_mixture(
            self.propose(inputs, carry), inputs, _floats(carry, "epsilon"), _floats(carry, "temperature")
        )
        return Decision(actions_NA=mixture.actions_NA, logp_N=mixture.logp_N, op_probs=mixture.op_probs_NO, carry=carry)

    @staticmethod
    def remember(inputs: ActInputs, carry: Carry) -> Carry:
        """Return the memory with the last germination counted."""
        columns = inputs.columns
        # Read from the observation, so that the rotation is right after actions that somebody else forced.
        germinated = (columns["last_op"] == Op.GERMINATE) & (columns["last_executed"] > 0)
        return {**carry, "rotation": carry["rotation"].astype(np.int64) + germinated}

    def propose(self, inputs: ActInputs, carry: Carry) -> Proposal:
        """Return the scores of the ops and what each of them would be."""
        num = len(inputs.step_N)
        by_slot = self._slot_scores(inputs)
        scores = np.full((num, NUM_OPS), -np.inf)
        completions: Actions = np.zeros((num, NUM_OPS, 8), dtype=np.int8)
        for op in (Op.ADVANCE, Op.FOSSILIZE, Op.PRUNE):
            scores[:, op] = by_slot[:, op].max(axis=1)
            completions[:, op, 0] = op
            completions[:, op, 1] = by_slot[:, op].argmax(axis=1)
        completions[:, Op.GERMINATE] = self.germination(inputs, carry)
        scores[:, Op.GERMINATE] = self._germinate_score(inputs, scores.max(axis=1))
        scores[~inputs.mask_NT[:, OP_SLICE]] = -np.inf
        proposed = (scores[:, Op.GERMINATE :] > 0).any(axis=1)
        scores[:, Op.WAIT] = np.where(proposed, 0.0, 2.0)
        return Proposal(scores_NO=scores, completions_NOA=completions)

    def _slot_scores(self, inputs: ActInputs) -> Floats:
        """Scores of ADVANCE, FOSSILIZE and PRUNE in each slot, [N, 5, S]; -inf where not valid."""
        spec, columns, mask = self.spec, inputs.columns, inputs.mask_NT
        stage = slot_matrix(columns, "stage")
        epochs = np.nan_to_num(slot_matrix(columns, "epochs_in_stage"))
        training = stage == Stage.TRAINING
        improvement = np.where(training, np.nan_to_num(slot_matrix(columns, "seed_improvement")), 0.0)
        cost = slot_matrix(columns, "removal_cost")
        ripe = epochs >= spec.prune_after
        learned = ((epochs >= MIN_TRAINING_EPOCHS) & (improvement >= ADVANCE_POINTS)) | (
            ripe & (improvement >= KEEP_POINTS)
        )
        # A seed that a strict gate has just refused, and that had its time, makes room: it would be refused for ever.
        refused_advance = self._refused(inputs, Op.ADVANCE)
        refused_commit = self._refused(inputs, Op.FOSSILIZE)
        # Where an environment asks at every gate, those before and after training have nothing to measure.
        advance = (learned & ~(ripe & refused_advance)) | ~training
        cull = training & ripe & ((improvement < KEEP_POINTS) | refused_advance)
        held = (stage == Stage.HOLDING) & np.isfinite(cost)
        pays = held & (np.nan_to_num(cost) > 0)
        commit, drop = (held & ~pays, pays) if spec.inverted else (pays, held & ~pays)
        commit, drop = commit & ~refused_commit, drop | (commit & refused_commit)
        scores = np.full((len(stage), NUM_OPS, MAX_SLOTS), NOT_PROPOSED)
        scores[:, Op.ADVANCE] = np.where(advance, 3.0 + improvement, NOT_PROPOSED)
        scores[:, Op.FOSSILIZE] = np.where(commit, 3.0 + np.abs(np.nan_to_num(cost)), NOT_PROPOSED)
        scores[:, Op.PRUNE] = np.where(cull | drop, 4.0 + 0.3 * epochs, NOT_PROPOSED)
        for op in (Op.ADVANCE, Op.FOSSILIZE, Op.PRUNE):
            scores[:, op] = np.where(mask[:, slot_slice(op)], scores[:, op], -np.inf)
        return scores

    @staticmethod
    def _refused(inputs: ActInputs, op: Op) -> Bools:
        """Whether the last action was this op and a gate refused it, bool [N, 1]."""
        refused = (inputs.columns["last_op"] == op) & (inputs.columns["last_executed"] == 0)
        return np.asarray(refused)[:, None]

    def _germinate_score(self, inputs: ActInputs, others_N: Floats) -> Floats:
        """The score of GERMINATE, [N]. On its day the periodic rule germinates whatever else is proposed."""
        spec, columns = self.spec, inputs.columns
        plateau = np.asarray(columns["plateau_epochs"], dtype=np.float64)
        score = 5.0 + 0.5 * plateau
        late = inputs.step_N >= spec.min_epochs
        if spec.period_epochs is not None:
            due = late & (inputs.step_N % spec.period_epochs == 0)
            return np.where(due, np.maximum(score, others_N + 1.0), NOT_PROPOSED)
        wanted = plateau < spec.plateau_epochs if spec.inverted else plateau >= spec.plateau_epochs
        return np.where(late & wanted & ~_any_live(inputs), score, NOT_PROPOSED)

    def germination(self, inputs: ActInputs, carry: Carry) -> Actions:
        """Return the GERMINATE that is next in the rotation, int8 [N, 8]; meaningless where GERMINATE is not valid."""
        spec, mask = self.spec, inputs.mask_NT
        rotation = carry["rotation"].astype(np.int64)
        num_slots = np.maximum(np.asarray(inputs.columns["num_slots"]).astype(np.int64), 1)
        first = rotation % num_slots if spec.cycle_levers else np.zeros_like(rotation)
        slot = first_free_slot(mask, first, num_slots)
        levers = lever_rows(mask, slot)
        ranks = self._ranks_by_topology[carry["topology"].astype(np.int64), rotation % len(spec.blueprints)]
        values = [np.where(lever_part(levers, 0), ranks, ranks.max() + 1).argmin(axis=1).astype(np.int64)]
        wanted = (_DEFAULT_BLEND, _DEFAULT_TEMPO, _DEFAULT_DWELL, carry["isolation"].astype(np.int64), _DEFAULT_SEED_LR)
        for lever, index in enumerate(wanted, start=1):
            allowed = lever_part(levers, lever)
            if spec.cycle_levers:
                values.append(nth_allowed(allowed, rotation))
            else:
                values.append(nearest_allowed(allowed, np.broadcast_to(np.asarray(index), rotation.shape)))
        return germinate_rows(slot, values)


def _floats(carry: Carry, key: str) -> Floats:
    return carry[key].astype(np.float64)


def _any_live(inputs: ActInputs) -> Bools:
    stages = slot_matrix(inputs.columns, "stage")
    present = np.arange(MAX_SLOTS) < np.asarray(inputs.columns["num_slots"])[:, None]
    live = np.isin(stages, [int(stage) for stage in LIVE_STAGES]) & present
    return np.asarray(live.any(axis=1))


def _rotation_ranks(rotation: list[int]) -> Ints:
    """Return for each position of a rotation the order in which blueprints are tried, int64 [positions, 8].

    A blueprint outside the rotation comes after all of it: it is taken where nothing else can be afforded.
    """
    length = len(rotation)
    ranks = np.tile(length + np.arange(LEVER_SIZES[0], dtype=np.int64), (length, 1))
    for position in range(length):
        for ahead in reversed(range(length)):
            ranks[position, rotation[(position + ahead) % length]] = ahead
    return ranks
