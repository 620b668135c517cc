"""Behaviour noise with exact propensities: mu = (1 - epsilon) * greedy + epsilon * u, executed as it is written down.

A rule scores the five ops and fills each of them to one whole action (its *completion*). Its own distribution is the
argmax of the scores, or with a temperature their softmax over the valid ops. u is the hierarchical uniform policy.
Shape suffixes: N rows, O ops, A action columns, T tree entries, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import MAX_SLOTS, NUM_OPS, OP_SLICE, Actions, Bools, Op, check_mask
from esper.leyline.errors import SpecError
from esper.leyline.observations import Columns, slot_column
from esper.leyline.protocols import ActInputs, Carry, EpisodeStart
from esper.leyline.tree import Floats, groups, log_prob, sample

_GROUP_STARTS = np.array([group.start for group in groups()])
_GROUP_SIZES = np.array([group.stop - group.start for group in groups()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a rule would do.

    Attributes:
        scores_NO: Score of each op, float64 [N, 5]; -inf where the op is not valid.
        completions_NOA: The action that each op stands for, int8 [N, 5, 8]; valid wherever the op is.
    """

    scores_NO: Floats
    completions_NOA: Actions


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One drawn action per row with its exact probability.

    Attributes:
        actions_NA: Canonical valid actions, int8 [N, 8].
        logp_N: log mu(action), float64 [N].
        op_probs_NO: Distribution of mu over ops, float64 [N, 5].
    """

    actions_NA: Actions
    logp_N: Floats
    op_probs_NO: Floats


def slot_matrix(columns: Columns, feature: str) -> Floats:
    """Return a slot feature as float64 [N, S], NaN where unmeasured."""
    return np.stack([columns[slot_column(slot, feature)] for slot in range(MAX_SLOTS)], axis=1).astype(np.float64)


def uniform_log_probs(mask_NT: Bools) -> Floats:
    """Return the log-probabilities of u within each choice, float64 [N, T], as `tree.log_softmax` of zeros would.

    Raises:
        MaskError: A row does not allow WAIT.
    """
    if not mask_NT[:, Op.WAIT].all():
        check_mask(mask_NT)
    counts = np.add.reduceat(mask_NT.astype(np.int64), _GROUP_STARTS, axis=1)
    logp = np.repeat(-np.log(np.maximum(counts, 1)), _GROUP_SIZES, axis=1)
    return np.where(mask_NT, logp, -np.inf)


def start_noise(episodes: Sequence[EpisodeStart]) -> Carry:
    """Return the carry entries `epsilon` and `temperature` (NaN: none), float64 [N].

    Raises:
        SpecError: An epsilon outside [0, 1] or a temperature that is not positive.
    """
    for episode in episodes:
        if not 0.0 <= episode.epsilon <= 1.0:
            raise SpecError(f"epsilon {episode.epsilon}\n  expected: a probability between 0 and 1")
        if episode.temperature is not None and not episode.temperature > 0.0:
            raise SpecError(f"temperature {episode.temperature}\n  expected: more than 0, or none for the argmax")
    return {
        "epsilon": np.array([episode.epsilon for episode in episodes], dtype=np.float64),
        "temperature": np.array(
            [np.nan if episode.temperature is None else episode.temperature for episode in episodes], dtype=np.float64
        ),
    }


def refuse_noise(name: str, episodes: Sequence[EpisodeStart], *, epsilon: bool) -> None:
    """Raise SpecError where an episode asks for noise that the controller `name` does not have.

    Args:
        name: The controller, for the message.
        episodes: Episodes that begin.
        epsilon: Whether an epsilon is refused too, not only a temperature.
    """
    for episode in episodes:
        if episode.temperature is not None:
            raise SpecError(f"{name} scores no ops: temperature {episode.temperature} has no meaning; leave it out")
        if epsilon and episode.epsilon != 0.0:
            raise SpecError(f"{name} is never mixed with exploration: epsilon {episode.epsilon}\n  expected: 0")


def op_distribution(scores_NO: Floats, temperature_N: Floats) -> Floats:
    """Return the rule's distribution over ops, float64 [N, 5]: argmax, or softmax(score / temperature) where given."""
    greedy = np.zeros_like(scores_NO)
    greedy[np.arange(len(greedy)), scores_NO.argmax(axis=1)] = 1.0
    soft = np.isfinite(temperature_N)
    if soft.any():
        scaled = scores_NO[soft] - scores_NO[soft].max(axis=1, keepdims=True)
        weights = np.exp(scaled / temperature_N[soft, None])
        greedy[soft] = weights / weights.sum(axis=1, keepdims=True)
    return greedy


def _draw_op(probs_NO: Floats, uniforms_N: Floats) -> NDArray[np.intp]:
    """Inverse CDF; rounding never reaches an op of probability zero."""
    cumulative = probs_NO.cumsum(axis=1)
    index = (uniforms_N[:, None] * cumulative[:, -1:] >= cumulative).sum(axis=1)
    last = NUM_OPS - 1 - (probs_NO[:, ::-1] > 0).argmax(axis=1)
    return np.asarray(np.minimum(index, last))


def draw_mixture(proposal: Proposal, inputs: ActInputs, epsilon_N: Floats, temperature_N: Floats) -> Mixture:
    """Return one action per row, drawn from mu, with the probability that mu gives it.

    The coin is `uniforms[:, 0]`; the other columns draw from u where it falls below epsilon, and the second draws the
    op of the rule elsewhere. Both branches may give the same action, so the probability is always the mixture's.
    """
    rows = np.arange(len(epsilon_N))
    rule = op_distribution(proposal.scores_NO, temperature_N)
    actions = proposal.completions_NOA[rows, _draw_op(rule, inputs.uniforms[:, 1])]
    explore = inputs.uniforms[:, 0] < epsilon_N
    mask = inputs.mask_NT
    uniform_logp = uniform_log_probs(mask)
    if explore.any():
        actions[explore] = sample(uniform_logp[explore], mask[explore], inputs.uniforms[explore, 1:])
    ops = actions[:, 0].astype(np.intp)
    by_rule = (actions == proposal.completions_NOA[rows, ops]).all(axis=1) * rule[rows, ops]
    by_uniform = np.exp(log_prob(uniform_logp, actions, mask))
    op_probs = (1.0 - epsilon_N)[:, None] * rule + epsilon_N[:, None] * np.exp(uniform_logp[:, OP_SLICE])
    logp = np.log((1.0 - epsilon_N) * by_rule + epsilon_N * by_uniform)
    return Mixture(actions_NA=actions, logp_N=logp, op_probs_NO=op_probs)
