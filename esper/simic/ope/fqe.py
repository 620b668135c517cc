"""Fitted Q evaluation of stochastic masked policies: an ensemble, each member on its own resample of env_seeds.

    Q_k = argmin over Q of the sum over rows of (Q(s, a) - r - (1 - done) E_{a' ~ pi(. | s')} Q_(k-1)(s', a'))**2

starting from Q_0 = 0, the targets frozen within a sweep. The expectation is exact over the action tree (recursion),
whatever the policy. The clock is observed and gamma is 1, so after as many sweeps as the longest episode has decisions
every value has been reached; before that a low Bellman error means nothing (Q_0 has none where nothing is paid), so a
hold-out chooses among later sweeps alone. A member learns on env_seeds drawn with replacement; those that were not
drawn are its hold-out. Sources: Le, Voloshin, Yue 2019 (FQE); Hao et al. 2021 (its bootstrap).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator
from scipy import stats
from torch import Tensor

from esper.leyline.errors import SpecError
from esper.leyline.keys import derive_seed, numpy_generator
from esper.leyline.ope import ValueEstimate
from esper.leyline.spec_base import Spec
from esper.simic.batches import Floats, Ints, Transitions
from esper.simic.learning import OnLog, Stepper
from esper.simic.ope.targets import TargetPolicy
from esper.simic.replay import CHUNK_ROWS
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import NetworkSpec, TreeNet, seeded

CONFIDENCE = 0.95


class FqeSpec(Spec):
    """How values are fitted.

    Attributes:
        network: View and size of the networks, whose entries are additive action values.
        members: Networks in the ensemble.
        extra_sweeps: Sweeps at most beyond the decisions of the longest episode.
        patience: Sweeps without a better held-out Bellman error before a member stops.
        steps_per_sweep: Gradient steps between two freezings of the targets.
        batch_size: Rows drawn with replacement per step.
        learning_rate: Adam's at the start; it falls to 0 along a half cosine.
        gradient_clip: Largest norm of all gradients together.
    """

    network: NetworkSpec = NetworkSpec(head="values", input_noise=0.1)
    members: Annotated[int, Field(ge=2)] = 5
    extra_sweeps: Annotated[int, Field(ge=0)] = 20
    patience: Annotated[int, Field(ge=1)] = 8
    steps_per_sweep: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    gradient_clip: Annotated[float, Field(gt=0)] = 10.0

    @model_validator(mode="after")
    def _additive(self) -> Self:
        network = self.network
        if (network.head, network.trunk, network.form) != ("values", "mlp", "additive"):
            raise ValueError(
                f"a network with head {network.head!r}, trunk {network.trunk!r} and form {network.form!r}; "
                "values are fitted with head 'values', trunk 'mlp' and form 'additive'"
            )
        return self


class ActionValues(Protocol):
    """Q as tree entries, improved by regression sweep by sweep."""

    def entries(self, obs_NV: Tensor) -> Tensor:
        """Return the additive action values of states, without gradient, [N, TREE_WIDTH]."""
        ...

    def draw(self, num_rows: int) -> Ints:
        """Return the positions among `num_rows` rows that the next regression uses."""
        ...

    def regress(self, obs_NV: Tensor, action_NA: Tensor, target_N: Tensor) -> None:
        """Move Q(s, a) of the rows towards their targets."""
        ...

    def state(self) -> Any:
        """Return a copy of what `restore` needs to bring this Q back."""
        ...

    def restore(self, state: Any) -> None:
        """Become the Q of a `state`."""
        ...


MakeValues = Callable[[int, int], ActionValues]
"""Makes one member's values from a seed and the largest number of sweeps."""


class NetworkValues:
    """A tree network fitted by Adam; its targets are scaled to the spread of returns."""

    def __init__(self, spec: FqeSpec, data: Transitions, seed: int, sweeps: int) -> None:
        self._spec = spec
        self._scale = max(float(data.return_N.std()), 1e-3)
        self._generator = numpy_generator("fqe rows", seed)
        self.network = TreeNet(spec.network)
        self.network.encoder.normaliser.fit(torch.from_numpy(data.obs_MV[data.state_N]))
        self._stepper = Stepper(
            self.network.parameters(),
            learning_rate=spec.learning_rate,
            clip=spec.gradient_clip,
            steps=sweeps * spec.steps_per_sweep,
        )

    def entries(self, obs_NV: Tensor) -> Tensor:
        """Return the additive action values of states, [N, TREE_WIDTH]."""
        self.network.eval()
        with torch.no_grad():
            entries: Tensor = self.network(obs_NV) * self._scale
        return entries

    def draw(self, num_rows: int) -> Ints:
        """Return the rows of one sweep's minibatches, one after another."""
        return self._generator.integers(num_rows, size=self._spec.steps_per_sweep * self._spec.batch_size)

    def regress(self, obs_NV: Tensor, action_NA: Tensor, target_N: Tensor) -> None:
        """Take one gradient step per minibatch."""
        self.network.train()
        for start in range(0, len(target_N), self._spec.batch_size):
            rows = slice(start, start + self._spec.batch_size)
            value = tree_torch.path_sum(self.network(obs_NV[rows]), action_NA[rows])
            self._stepper.step((value - target_N[rows] / self._scale).square().mean(), "fitted Q evaluation")

    def state(self) -> Any:
        """Return a copy of the weights."""
        return deepcopy(self.network.state_dict())

    def restore(self, state: Any) -> None:
        """Load weights."""
        self.network.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class Starts:
    """The first states whose values are averaged: one per environment and env_seed.

    Attributes:
        state_S: Index of the state.
        environment_S: Index of the environment.
        env_seed_S: The env_seed.
    """

    state_S: Ints
    environment_S: Ints
    env_seed_S: Ints

    def means(self, value_S: Floats, counts: Counter[int] | None = None) -> Floats:
        """Return the mean value of each environment, then the mean of those, [environments + 1].

        `counts` says how often each env_seed was drawn; an environment of which none was has NaN.
        """
        weight = np.ones(len(value_S)) if counts is None else np.array([counts[int(s)] for s in self.env_seed_S])
        num = int(self.environment_S.max()) + 1
        total = np.bincount(self.environment_S, weights=weight, minlength=num)
        summed = np.bincount(self.environment_S, weights=weight * value_S, minlength=num)
        with np.errstate(invalid="ignore", divide="ignore"):
            by_environment = summed / total
        return np.append(by_environment, np.nanmean(by_environment))


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Fitted values and the resamples that they were fitted on."""

    members: tuple[ActionValues, ...]
    counts: tuple[Counter[int], ...]
    bellman_errors: tuple[float, ...]


def resample_seeds(env_seed_S: Ints, environment_S: Ints, *key: str | int) -> Counter[int]:
    """Return how often each env_seed is drawn: with replacement, within the seeds that meet the same environments."""
    met: dict[int, set[int]] = {}
    for seed, environment in zip(env_seed_S.tolist(), environment_S.tolist()):
        met.setdefault(seed, set()).add(environment)
    strata: dict[tuple[int, ...], list[int]] = {}
    for seed in sorted(met):
        strata.setdefault(tuple(sorted(met[seed])), []).append(seed)
    generator = numpy_generator("resample env_seeds", *key)
    drawn: Counter[int] = Counter()
    for place in sorted(strata):
        seeds = strata[place]
        drawn.update(seeds[index] for index in generator.integers(len(seeds), size=len(seeds)))
    return drawn


def bellman_targets(values: ActionValues, data: Transitions, target: TargetPolicy, rows: Ints) -> Tensor:
    """Return r + (1 - done) E_pi[Q(s', .)] of some rows, float32 [N]."""
    states, place = np.unique(data.next_N[rows], return_inverse=True)
    following = state_values(values, data, target, states)[place]
    return torch.from_numpy((data.reward_N[rows] + data.discount_N[rows] * following).astype(np.float32))


def state_values(values: ActionValues, data: Transitions, target: TargetPolicy, states: Ints) -> Floats:
    """Return E_pi[Q(s, .)] of some states, float64 [N]."""
    out = np.empty(len(states))
    for i in range(0, len(states), CHUNK_ROWS):
        part = states[i : i + CHUNK_ROWS]
        entries = values.entries(torch.from_numpy(data.obs_MV[part]))
        out[i : i + CHUNK_ROWS] = target.expect(entries, torch.from_numpy(data.mask_MT[part]), part).numpy()
    return out


def action_values(values: ActionValues, obs_NV: NDArray[np.float32], action_NA: NDArray[np.int8]) -> Floats:
    """Return Q(s, a) of some pairs, float64 [N]."""
    out = np.empty(len(obs_NV))
    for i in range(0, len(obs_NV), CHUNK_ROWS):
        entries = values.entries(torch.from_numpy(obs_NV[i : i + CHUNK_ROWS]))
        out[i : i + CHUNK_ROWS] = tree_torch.path_sum(entries, torch.from_numpy(action_NA[i : i + CHUNK_ROWS])).numpy()
    return out


def longest_episode(data: Transitions) -> int:
    """Return the most decisions that an episode has in the data."""
    return int(np.bincount(data.episode_N).max())


def fit_values(
    values: ActionValues,
    data: Transitions,
    target: TargetPolicy,
    *,
    train: Ints,
    check: Ints,
    spec: FqeSpec,
    on_log: OnLog,
) -> float:
    """Fit one member in place and return its least held-out Bellman error (mean square; NaN without a hold-out).

    Args:
        values: What is fitted; its Q before the first sweep does not matter.
        data: One-step transitions.
        target: The policy.
        train: Rows to learn on, repeated as they were drawn.
        check: Held-out rows; without any, every sweep is made.
        spec: How many sweeps.
        on_log: Receives `step` (the sweep) and `bellman_error`.
    """
    horizon = longest_episode(data)
    best, best_sweep, kept = np.inf, horizon, None
    for sweep in range(1, horizon + spec.extra_sweeps + 1):
        rows = train[values.draw(len(train))]
        if sweep == 1:
            goal = torch.from_numpy(data.reward_N[rows].astype(np.float32))
        else:
            goal = bellman_targets(values, data, target, rows)
        obs = torch.from_numpy(data.obs_MV[data.state_N[rows]])
        values.regress(obs, torch.from_numpy(data.action_NA[rows]), goal)
        if sweep < horizon or not len(check):
            continue
        found = action_values(values, data.obs_MV[data.state_N[check]], data.action_NA[check])
        error = float(np.mean((found - bellman_targets(values, data, target, check).numpy()) ** 2))
        on_log({"step": float(sweep), "bellman_error": error})
        if error < best:
            best, best_sweep, kept = error, sweep, values.state()
        elif sweep - best_sweep >= spec.patience:
            break
    if kept is not None:
        values.restore(kept)
    return best if kept is not None else float("nan")


def fit_ensemble(
    data: Transitions,
    target: TargetPolicy,
    starts: Starts,
    spec: FqeSpec,
    *,
    seed: int,
    on_log: OnLog,
    make_values: MakeValues | None = None,
) -> Ensemble:
    """Return an ensemble, each member on its own resample of env_seeds.

    Args:
        data: One-step transitions with gamma 1.
        target: The policy, known in every state of the data.
        starts: The first states.
        spec: Sizes.
        seed: Keys resamples, initial weights and minibatches.
        on_log: Receives `member`, `step` and `bellman_error`.
        make_values: What is fitted; a tree network unless given.

    Raises:
        SpecError: Fewer than two env_seeds.
        TrainingError: A loss is not finite.
    """
    if len(np.unique(starts.env_seed_S)) < 2:
        raise SpecError("values from one environment seed have no interval\n  expected: at least two env_seeds")
    sweeps = longest_episode(data) + spec.extra_sweeps
    order = np.argsort(data.env_seed_N, kind="stable")
    seeds, first = np.unique(data.env_seed_N[order], return_index=True)
    rows_of = dict(zip(seeds.tolist(), np.split(order, first[1:])))
    members, counts, errors = [], [], []
    for member in range(spec.members):
        drawn = resample_seeds(starts.env_seed_S, starts.environment_S, seed, member)
        train = np.concatenate([np.tile(rows_of[s], drawn[s]) for s in rows_of if drawn[s]])
        check = np.concatenate([np.zeros(0, dtype=np.int64), *(rows_of[s] for s in rows_of if not drawn[s])])
        own = derive_seed("fqe", seed, member)

        def log(numbers: dict[str, float], member: int = member) -> None:
            on_log({"member": float(member), **numbers})

        with seeded(own):
            values = make_values(own, sweeps) if make_values else NetworkValues(spec, data, own, sweeps)
            errors.append(fit_values(values, data, target, train=train, check=check, spec=spec, on_log=log))
        members.append(values)
        counts.append(drawn)
    return Ensemble(tuple(members), tuple(counts), tuple(errors))


def start_estimates(
    ensemble: Ensemble, data: Transitions, target: TargetPolicy, starts: Starts
) -> tuple[list[ValueEstimate], Floats]:
    """Return the value of each environment, then their mean, and what each member says, [K, environments + 1].

    The centre is the mean over members on all first states. Each member's value on its own resample is one bootstrap
    replicate of the whole estimate (rows and first states), so their standard deviation is its standard error; with as
    few as they are the interval is Student's with K - 1 degrees of freedom.
    """
    value_KS = np.array([state_values(values, data, target, starts.state_S) for values in ensemble.members])
    centre = starts.means(value_KS.mean(axis=0))
    replicates = np.array([starts.means(value, drawn) for value, drawn in zip(value_KS, ensemble.counts)])
    return [_interval(centre[i], replicates[:, i]) for i in range(len(centre))], replicates


def _interval(centre: float, replicates_K: Floats) -> ValueEstimate:
    found = replicates_K[np.isfinite(replicates_K)]
    if len(found) < 2:
        raise SpecError(f"{len(found)} of {len(replicates_K)} resamples hold the environment\n  add members")
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(found) - 1) * found.std(ddof=1))
    return ValueEstimate(mean=float(centre), low=float(centre) - half, high=float(centre) + half)


def mean_over_members(ensemble: Ensemble, function: Callable[[ActionValues], Floats]) -> Floats:
    """Return the mean of a function of each member's values."""
    values: Floats = np.mean([function(member) for member in ensemble.members], axis=0)
    return values


def starts_of(first_states: ArrayLike, environment: ArrayLike, env_seed: ArrayLike) -> Starts:
    """Return one first state per environment and env_seed, the first met of each."""
    pairs = np.stack([np.asarray(environment), np.asarray(env_seed)], axis=1)
    _, index = np.unique(pairs, axis=0, return_index=True)
    return Starts(
        np.asarray(first_states)[index], np.asarray(environment)[index], np.asarray(env_seed, dtype=np.int64)[index]
    )
