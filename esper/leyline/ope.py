"""The result of an off-policy evaluation. Written by `esper ope`, read by selection, reports and later rankings."""

from __future__ import annotations

from esper.leyline.spec_base import Spec

ALL = "all"
"""Stands for the mean over the environments of a dataset."""


class ValueEstimate(Spec):
    """A value (return, in units of the reward's scale) with its 95 % interval over environment seeds."""

    mean: float
    low: float
    high: float


class PolicyEstimate(Spec):
    """What a policy is estimated to be worth on one environment, or on the mean of `all`.

    Attributes:
        policy: Its name.
        digest: SHA-256 of its weights.
        sampled: It draws from its distribution; else it takes its most probable choices.
        environment: The environment, or `all`.
        fqe: Fitted Q evaluation.
        members: The value that each member of the ensemble gives.
        wdr: Weighted doubly robust; None where no episode has known propensities throughout.
        num_env_seeds: Environment seeds whose first states are valued.
        num_episodes: Episodes that entered importance weights.
        num_without_propensity: Episodes that could not: a decision of theirs has no propensity.
        effective_episodes: Effective sample size of the weights after each decision.
        usable_decisions: Decisions up to which at least 50 effective episodes are left.
        data_return: Mean return of the episodes of the data, branches left out.
    """

    policy: str
    digest: str
    sampled: bool
    environment: str
    fqe: ValueEstimate
    members: tuple[float, ...]
    wdr: ValueEstimate | None
    num_env_seeds: int
    num_episodes: int
    num_without_propensity: int
    effective_episodes: tuple[float, ...]
    usable_decisions: int
    data_return: float


class BehaviourCheck(Spec):
    """A behaviour of the data valued like a policy, against what its episodes returned."""

    behaviour: str
    epsilon: float
    environment: str
    num_env_seeds: int
    measured_return: float
    fqe: ValueEstimate
    covered: bool


class BranchCorrelation(Spec):
    """How well a critic ranks actions that were tried from the same states.

    A measured advantage is a return minus the mean return of the actions tried in its state; the critic's values are
    centred likewise. Correlations are pooled over states; None where they are undefined.

    Attributes:
        policy: The policy whose critic it is; `(data)` for one of no single policy.
        critic: `fqe`: its fitted values; `policy`: its own entries (values or log-probabilities); `iql`: advantages of
            implicit Q-learning on the data.
        then: Who went on after the tried action.
        num_states: States with at least two different actions tried.
        num_actions: Actions tried in them.
        num_env_seeds: Environment seeds that they come from.
        spearman: Rank correlation.
        spearman_low: Lower end of its 95 % interval, resampled by environment seed.
        spearman_high: Upper end.
        kendall: Kendall's tau-b.
        top_share: Share of states in which the critic's best action is the measured best.
        chance_share: What drawing among the tried actions would reach.
    """

    policy: str
    critic: str
    then: str
    num_states: int
    num_actions: int
    num_env_seeds: int
    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None
    kendall: float | None
    top_share: float
    chance_share: float


class RankingQuality(Spec):
    """How well past estimates ranked policies that have met live episodes.

    Attributes:
        environment: The environment, or `all`.
        policies: Their names, the highest estimate first.
        estimates: In the same order.
        live: Mean live returns in the same order.
        spearman: Rank correlation; None where it is undefined.
        kendall: Kendall's tau-b; None where it is undefined.
        regret_at: By k: the best live return minus the best among the k highest estimates.
        live_range: Best minus worst live return: what a regret compares with.
        sharpe_at: By k: (best live return among the k highest estimates - data's mean return) / their standard
            deviation (SharpeRatio@k, Kiyohara et al. 2023); None where that is 0.
    """

    environment: str
    policies: tuple[str, ...]
    estimates: tuple[float, ...]
    live: tuple[float, ...]
    spearman: float | None
    kendall: float | None
    regret_at: dict[int, float]
    live_range: float
    sharpe_at: dict[int, float | None]


class OpeResult(Spec):
    """A whole off-policy evaluation.

    `ranking` is about policies that have met live episodes, `behaviour_ranking` about the behaviours of the data and
    what their episodes returned.
    """

    dataset: str
    version: int
    digest: str
    policies: tuple[PolicyEstimate, ...]
    behaviours: tuple[BehaviourCheck, ...] = ()
    num_behaviours_left_out: int = 0
    behaviour_ranking: tuple[RankingQuality, ...] = ()
    branches: tuple[BranchCorrelation, ...] = ()
    ranking: tuple[RankingQuality, ...] = ()
    created_at: str
    wall_s: float

    def scores(self) -> dict[str, float]:
        """Return the estimate of each policy on the mean over environments."""
        return {item.policy: item.fqe.mean for item in self.policies if item.environment == ALL}

    @property
    def num_covered(self) -> int:
        """Behaviours whose measured return lies within the interval of their estimate."""
        return sum(check.covered for check in self.behaviours)
