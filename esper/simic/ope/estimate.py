"""One policy or behaviour valued: fitted values, doubly robust cross-check, effective sample sizes, branch oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from esper.leyline.actions import Actions
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError
from esper.leyline.ope import ALL, BehaviourCheck, BranchCorrelation, PolicyEstimate
from esper.leyline.protocols import Controller
from esper.simic.batches import Floats, Ints
from esper.simic.iql import IqlRecipe, fit_values
from esper.simic.learning import OnLog
from esper.simic.ope.branch_oracle import MeasuredBranch, Tried, correlate, measured_branches, stored_branches
from esper.simic.ope.calibration import Behaviour, check_behaviour
from esper.simic.ope.doubly_robust import WeightedEpisodes, wdr_estimate
from esper.simic.ope.effective_samples import effective_episodes, usable_decisions
from esper.simic.ope.fqe import (
    Ensemble,
    FqeSpec,
    Starts,
    action_values,
    fit_ensemble,
    mean_over_members,
    start_estimates,
    starts_of,
    state_values,
)
from esper.simic.ope.logged import Logged
from esper.simic.ope.targets import TargetPolicy, encode, policy_target, rule_target, tree_network
from esper.simic.replay import CHUNK_ROWS
from esper.simic.splits import held_out_rows
from esper.tamiyo import tree_torch


@dataclass(frozen=True, slots=True)
class Valued:
    """What is said about a policy."""

    estimates: tuple[PolicyEstimate, ...]
    branches: tuple[BranchCorrelation, ...]


def first_states(logged: Logged) -> Starts:
    """Return the first state of each environment and env_seed, of episodes that start as the bare host."""
    rows = [i for i, episode in enumerate(logged.episodes) if episode["root"] == "host"]
    names = logged.transitions.environments
    return starts_of(
        logged.first_E[rows],
        [names.index(logged.episodes[i]["environment"]) for i in rows],
        [logged.episodes[i]["env_seed"] for i in rows],
    )


def value_policy(
    policy: LearnedPolicy,
    logged: Logged,
    spec: FqeSpec,
    *,
    seed: int,
    on_log: OnLog,
    measured: Sequence[MeasuredBranch] = (),
) -> Valued:
    """Return the estimates of a checkpoint's policy, and how its critics rank measured advantages.

    Args:
        policy: The policy; valued as it acts in evaluation unless it is sampled.
        logged: The data, in the view of the fitted values.
        spec: How values are fitted.
        seed: Keys everything that is drawn.
        on_log: Receives the held-out Bellman errors.
        measured: Branches that were run with the policy going on.

    Raises:
        SpecError: Fewer than two env_seeds, or a sampled policy without a distribution.
        CheckpointError: The checkpoint is missing, damaged or another one.
        TrainingError: A loss is not finite.
    """
    from esper.tamiyo.registry import build_controller

    target = policy_target(policy, logged)
    starts = first_states(logged)
    data = logged.transitions
    ensemble = fit_ensemble(data, target, starts, spec, seed=seed, on_log=on_log)
    found, members = start_estimates(ensemble, data, target, starts)
    groups = weighted_episodes(logged, target, ensemble)
    estimates = []
    for place, name in enumerate([*data.environments, ALL]):
        of = [groups[place]] if place < len(groups) else groups
        known = [group for group in of if group is not None]
        whole = len(known) == len(of)
        ess = effective_episodes(_stacked([group.log_ratio_EH for group in known])) if known else np.zeros(0)
        here = _episodes_in(logged, None if name == ALL else name)
        num = sum(len(group.env_seed_E) for group in known)
        here_S = (starts.environment_S == place) | (name == ALL)
        estimates.append(
            PolicyEstimate(
                policy=policy.name,
                digest=policy.digest,
                sampled=policy.sampled,
                environment=name,
                fqe=found[place],
                members=tuple(members[:, place].tolist()),
                wdr=wdr_estimate(known, key=(seed, policy.name, name)) if whole else None,
                num_env_seeds=len(np.unique(starts.env_seed_S[here_S])),
                num_episodes=num,
                num_without_propensity=len(here) - num,
                effective_episodes=tuple(ess.tolist()),
                usable_decisions=usable_decisions(ess) if len(ess) else 0,
                data_return=_data_return(logged, here),
            )
        )
    controller = build_controller(policy)
    tried = [*stored_branches(logged), *measured_branches(measured, logged)]
    branches = (item for of in tried for item in _correlations(policy.name, of, logged, ensemble, controller, seed))
    return Valued(tuple(estimates), tuple(branches))


def value_behaviour(
    behaviour: Behaviour, logged: Logged, spec: FqeSpec, *, seed: int, on_log: OnLog
) -> list[BehaviourCheck]:
    """Return a behaviour's estimate against its measured return, by environment and on their mean."""
    target = rule_target(behaviour.spec, behaviour.epsilon, logged)
    starts = first_states(logged)
    ensemble = fit_ensemble(logged.transitions, target, starts, spec, seed=seed, on_log=on_log)
    found, _ = start_estimates(ensemble, logged.transitions, target, starts)
    return check_behaviour(behaviour, found, logged, starts, [*logged.transitions.environments, ALL])


def weighted_episodes(logged: Logged, target: TargetPolicy, ensemble: Ensemble) -> list[WeightedEpisodes | None]:
    """Return by environment the episodes that importance weights can use, None where there is none."""
    known = logged.with_propensity & ~logged.branched
    known &= np.array([episode["root"] == "host" for episode in logged.episodes])
    data = logged.transitions
    rows = np.flatnonzero(known[data.episode_N])
    states, action = data.state_N[rows], data.action_NA[rows]
    if not len(rows):
        return [None] * len(data.environments)
    ratio = target.log_prob(states, action, data.mask_MT[states]) - data.logp_N[rows]
    q = mean_over_members(ensemble, lambda values: action_values(values, data.obs_MV[states], action))
    v = mean_over_members(ensemble, lambda values: state_values(values, data, target, states))
    step = states - logged.first_E[data.episode_N[rows]]
    groups: list[WeightedEpisodes | None] = []
    for environment in range(len(data.environments)):
        of = np.flatnonzero(data.environment_N[rows] == environment)
        if not len(of):
            groups.append(None)
            continue
        episodes, place = np.unique(data.episode_N[rows][of], return_inverse=True)
        shape = (len(episodes), int(step[of].max()) + 1)
        padded = [_padded(shape, place, step[of], part[of]) for part in (ratio, data.reward_N[rows], q, v)]
        seeds = np.array([logged.episodes[episode]["env_seed"] for episode in episodes], dtype=np.int64)
        groups.append(
            WeightedEpisodes(
                log_ratio_EH=padded[0], reward_EH=padded[1], q_EH=padded[2], v_EH=padded[3], env_seed_E=seeds
            )
        )
    return groups


def _padded(shape: tuple[int, int], place: Ints, step: Ints, values: Floats) -> Floats:
    out = np.zeros(shape)
    out[place, step] = values
    return out


def _stacked(parts: Sequence[Floats]) -> Floats:
    """Episodes of several environments one under another; the shorter ones keep their last weight."""
    longest = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in parts])


def _episodes_in(logged: Logged, environment: str | None) -> list[int]:
    return [i for i, e in enumerate(logged.episodes) if environment is None or e["environment"] == environment]


def _data_return(logged: Logged, episodes: Sequence[int]) -> float:
    returns, branched = logged.returns, logged.branched
    return float(np.mean([returns[i] for i in episodes if not branched[i]]))


def _correlations(
    name: str, tried: Tried, logged: Logged, ensemble: Ensemble, controller: Controller, seed: int
) -> list[BranchCorrelation]:
    obs, action = logged.transitions.obs_MV[tried.state_B], tried.action_BA
    critics = {"fqe": mean_over_members(ensemble, lambda values: action_values(values, obs, action))}
    own = policy_scores(controller, logged, tried.state_B, action)
    if own is not None:
        critics["policy"] = own
    return [correlate(name, critic, tried, value, key=(seed, name, critic)) for critic, value in critics.items()]


def iql_correlations(
    logged: Logged, recipe: IqlRecipe, *, seed: int, on_log: OnLog, measured: Sequence[MeasuredBranch] = ()
) -> list[BranchCorrelation]:
    """Return how the advantages of implicit Q-learning, fitted on the data, rank measured ones.

    They are those of no single policy: V is an expectile over the data's actions.

    Raises:
        SpecError: The recipe's trunk is recurrent; the tried states are single rows.
    """
    if recipe.network.trunk != "mlp":
        raise SpecError(f"a critic with trunk {recipe.network.trunk!r} cannot value single states\n  expected: 'mlp'")
    tried = [*stored_branches(logged), *measured_branches(measured, logged)]
    if not tried:
        return []
    data = replace(logged.transitions, view=recipe.network.view, obs_MV=encode(logged, recipe.network.view))
    held = held_out_rows(data)
    values, _ = fit_values(data.select(~held), data.select(held), recipe, seed=seed, on_log=on_log)
    found = []
    for of in tried:
        num = len(of.state_B)
        rows = replace(
            data.select(np.arange(len(data)) < 0),
            state_N=of.state_B,
            next_N=of.state_B,
            action_NA=of.action_BA,
            reward_N=np.zeros(num),
            discount_N=np.zeros(num),
            forced_N=np.zeros(num, dtype=bool),
        )
        found.append(correlate("(data)", "iql", of, values.advantages(rows), key=(seed, "iql")))
    return found


def policy_scores(controller: Controller, logged: Logged, states: Ints, action_NA: Actions) -> Floats | None:
    """Return what a tree network itself says of actions: Q of a network of values, else log pi; None for others."""
    network = tree_network(controller)
    if network is None:
        return None
    obs: NDArray[np.float32] = encode(logged, network.spec.view)[states]
    mask = logged.transitions.mask_MT[states]
    out = np.empty(len(states))
    for i in range(0, len(states), CHUNK_ROWS):
        part = slice(i, i + CHUNK_ROWS)
        with torch.no_grad():
            view = torch.from_numpy(obs[part])
            if network.spec.head == "values":
                entries = network(view)
            else:
                entries = network.log_policy(view, torch.from_numpy(mask[part]))
        out[part] = tree_torch.path_sum(entries, torch.from_numpy(action_NA[part])).numpy()
    return out
