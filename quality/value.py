"""What the data is worth: gains over the control, the spread of returns, and what branches measured.

Returns are those of the environment's reward where it is known, else the final paired gain in points. The bounds of
the published quality measures are taken from the data itself: G_min is the mean return of the uniform policy (the
least return where the data has none), G_max the greatest return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import spearmanr
from scipy.stats import t as student

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.controller_specs import NeverAct
from esper.leyline.identity import EpisodeIdentity, Root
from esper.leyline.observations import slot_column
from esper.leyline.rewards import RewardSpec
from quality.arrays import Floats, numbers
from quality.measures import Measure

_GAIN = "100 * (final_val_accuracy - control_final_val_accuracy)"
_OUTCOMES = f"""
SELECT number, environment, env_seed, controller, epsilon, control_valid, branch_parent IS NOT NULL AS branched,
    {_GAIN} AS gain
FROM health_episodes WHERE sound AND role IN ('data', 'online') ORDER BY number
"""  # noqa: S608 - constants alone

_BRANCHES = """
SELECT b.environment, b.environment_id, b.env_seed, b.number, b.branch_parent, p.number AS parent_number,
    100 * (b.final_val_accuracy - b.control_final_val_accuracy) AS gain,
    100 * (p.final_val_accuracy - p.control_final_val_accuracy) AS parent_gain
FROM health_episodes AS b LEFT JOIN health_episodes AS p ON p.episode_id = b.branch_parent AND p.sound
WHERE b.sound AND b.branch_parent IS NOT NULL ORDER BY b.number
"""


def trunk_id(environment_id: str, env_seed: int) -> str:
    """Return the id of the never-act episode of an env_seed, whether or not it is in the data."""
    return EpisodeIdentity(
        environment_id=environment_id,
        env_seed=env_seed,
        root=Root.HOST.value,
        controller_id=NeverAct().spec_id,
        epsilon=0.0,
        temperature=None,
        repetition=0,
    ).episode_id


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """The sound episodes of training roles in one environment, [E] each; `values` is NaN without a sound control."""

    values: Floats
    gains: Floats
    env_seeds: NDArray[np.int64]
    uniform: NDArray[np.bool_]
    control_valid: NDArray[np.bool_]


def _by_environment(connection: duckdb.DuckDBPyConnection, returns: Mapping[int, float]) -> dict[str, _Outcomes]:
    table = connection.sql(_OUTCOMES).to_arrow_table()
    valid = np.asarray(table["control_valid"].to_numpy(), dtype=bool)
    gains = np.where(valid, numbers(table, "gain"), np.nan)
    values = gains
    if returns:
        values = np.array([returns.get(number, np.nan) for number in table["number"].to_pylist()])
        values = np.where(valid, values, np.nan)
    uniform = np.asarray(pc.equal(table["controller"], "random").to_numpy(), dtype=bool)
    uniform &= numbers(table, "epsilon") == 1
    places = table["environment"].to_numpy().astype(str)
    out = {}
    for name in np.unique(places):
        of = places == name
        own = values[of] if np.isfinite(values[of]).any() else gains[of]
        out[str(name)] = _Outcomes(own, gains[of], table["env_seed"].to_numpy()[of], uniform[of], valid[of])
    return out


def interval(values: Floats, clusters: NDArray[np.int64]) -> tuple[float, float, int]:
    """Return the mean over clusters of their means, the half width of its 95 % t interval, and how many there are.

    The half width is NaN below two clusters.
    """
    _, index = np.unique(clusters, return_inverse=True)
    means = np.bincount(index.ravel(), weights=values) / np.bincount(index.ravel())
    num = len(means)
    if num < 2:
        return float(means.mean()), float("nan"), num
    half = float(student.ppf(0.975, num - 1) * means.std(ddof=1) / np.sqrt(num))
    return float(means.mean()), half, num


def _between(mean: float, half: float, num: int) -> str:
    told = "no interval" if np.isnan(half) else f"95 % interval {mean - half:.2f} to {mean + half:.2f}"
    return f"{told} over {num} env_seeds"


def _gains(found: Mapping[str, _Outcomes], names: Sequence[str]) -> list[Measure]:
    out = []
    for name in names:
        outcomes = found.get(name)
        num = 0 if outcomes is None else len(outcomes.gains)
        share = None if outcomes is None else float(outcomes.control_valid.mean())
        out.append(Measure(check="control_valid", environment=name, value=share, message=f"of {num} episodes"))
        value, message = None, "no episode of role data or online has a sound control"
        if outcomes is not None and np.isfinite(outcomes.gains).any():
            known = np.isfinite(outcomes.gains)
            value, half, seeds = interval(outcomes.gains[known], outcomes.env_seeds[known])
            message = (
                f"{_between(value, half, seeds)}; {outcomes.gains[known].max():.2f} at best of {known.sum()} episodes"
            )
        out.append(Measure(check="paired_gain", environment=name, value=value, message=message))
    return out


_NONE = "fewer than two episodes with a known return"


def _quality(found: Mapping[str, _Outcomes], names: Sequence[str], rewards: Mapping[str, RewardSpec]) -> list[Measure]:
    """Return spread, trajectory quality, ERI and RPSV of every environment."""
    checks = ("return_spread", "trajectory_quality", "return_improvement", "positive_variance")
    out = []
    for name in names:
        outcomes = found.get(name)
        values = np.zeros(0) if outcomes is None else outcomes.values[np.isfinite(outcomes.values)]
        if outcomes is None or len(values) < 2:
            out += [Measure(check=check, environment=name, value=None, message=_NONE) for check in checks]
            continue
        mean, least, most = float(values.mean()), float(values.min()), float(values.max())
        unit = f"the return under {rewards[name].name}" if name in rewards else "the paired gain in points"
        uniform = outcomes.values[outcomes.uniform & np.isfinite(outcomes.values)]
        floor = float(uniform.mean()) if len(uniform) else least
        whose = "the uniform policy's mean" if len(uniform) else "the least"
        flat = most - least < 1e-9
        scaled = np.zeros(1) if flat else (values - least) / (most - least)
        quality = None if most - floor < 1e-9 else (mean - floor) / (most - floor)
        improvement = None if flat or mean - least < 1e-9 else (most - mean) / (mean - least)
        positive = float((np.maximum(scaled - scaled.mean(), 0) ** 2).mean())
        told = (
            (float(values.std()), f"standard deviation of {unit}; mean {mean:.3f}, {most:.3f} at best"),
            (quality, f"TQ of {unit}: mean {mean:.3f} between {whose} {floor:.3f} and the best {most:.3f}"),
            (improvement, f"ERI of {unit}: (best {most:.3f} - mean {mean:.3f}) / (mean - least {least:.3f})"),
            (positive, f"RPSV of {unit}, scaled to [0, 1]; near 0 offline RL can only imitate, 0.005 is a usual floor"),
        )
        out += [
            Measure(check=check, environment=name, value=value, message=message)
            for check, (value, message) in zip(checks, told)
        ]
    return out


def _removal(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """The last removal costs of an episode's seeds against its final paired gain."""
    costs = [slot_column(slot, "removal_cost") for slot in range(MAX_SLOTS)]
    total = " + ".join(f"coalesce({column}, 0)" for column in costs)
    measured = " OR ".join(f"{column} IS NOT NULL" for column in costs)
    final = connection.table("health_rows").filter(f"is_last AND ({measured})")
    table = final.project(f"environment, {total} AS cost, {_GAIN} AS gain").to_arrow_table()
    out = []
    for name in names:
        of = table.filter(pc.equal(table["environment"], name))
        cost, gain = (of[column].cast(pa.float64()).to_numpy() for column in ("cost", "gain"))
        finite = np.isfinite(cost) & np.isfinite(gain)
        cost, gain = cost[finite], gain[finite]
        value, message = None, "fewer than three episodes end with a measured seed"
        if len(cost) >= 3 and np.ptp(cost) > 0 and np.ptp(gain) > 0:
            value = float(spearmanr(cost, gain).statistic)
            message = (
                f"over {len(cost)} episodes: cost {cost.mean():.2f} points, gain {gain.mean():.2f} points on average"
            )
        out.append(Measure(check="removal_cost_correlation", environment=name, value=value, message=message))
    return out


def _advantages(
    connection: duckdb.DuckDBPyConnection, names: Sequence[str], returns: Mapping[int, float]
) -> list[Measure]:
    """What the actions of branches brought, against the parent that acted otherwise from the same state."""
    table = connection.sql(_BRANCHES).to_arrow_table()
    places = table["environment"].to_numpy().astype(str)
    keys = zip(*(table[name].to_pylist() for name in ("environment_id", "env_seed", "branch_parent")))
    # The trunk is its own control: a branch that leaves it is paired even where the trunk was not stored.
    trunk = np.array([parent == trunk_id(environment, seed) for environment, seed, parent in keys], dtype=bool)
    difference = numbers(table, "gain") - np.where(trunk, 0.0, numbers(table, "parent_gain"))
    own = np.array([returns.get(number, np.nan) for number in table["number"].to_pylist()])
    others = np.array([returns.get(parent, np.nan) for parent in table["parent_number"].to_pylist()])
    others[trunk] = 0.0
    by_returns = own - others
    out = []
    for name in names:
        of = places == name
        by_return = bool(np.isfinite(by_returns[of & np.isfinite(difference)]).all()) and bool(returns)
        values = (by_returns if by_return else difference)[of]
        seeds = table["env_seed"].to_numpy()[of]
        paired = np.isfinite(values)
        value, message = None, "no branches: advantages were not measured"
        if of.any():
            message = f"{of.sum()} branches, none with a parent in the data"
        if paired.any():
            value, half, num = interval(values[paired], seeds[paired])
            unit = "return" if by_return else "points of gain"
            message = (
                f"{unit} of a branch over its parent, {paired.sum()} of {of.sum()} branches paired; "
                f"{_between(value, half, num)}; {(values[paired] > 0).mean():.0%} better, "
                f"spread {values[paired].std():.2f}"
            )
        out.append(Measure(check="branch_advantage", environment=name, value=value, message=message))
    return out


def measure(
    connection: duckdb.DuckDBPyConnection,
    names: Sequence[str],
    rewards: Mapping[str, RewardSpec],
    returns: Mapping[int, float],
) -> list[Measure]:
    """Return the value reports.

    Args:
        connection: With the working tables.
        names: The environments.
        rewards: The reward of each environment, where it is known.
        returns: The return of each episode's number, where the reward is known.
    """
    found = _by_environment(connection, returns)
    return [
        *_gains(found, names),
        *_quality(found, names, rewards),
        *_removal(connection, names),
        *_advantages(connection, names, returns),
    ]
