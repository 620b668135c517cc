"""Rewards recomputed from the raw columns by leyline's own function, and what the data is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import spearmanr

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.observations import slot_column
from esper.leyline.rewards import EpisodeColumns, RewardSpec, combine, reward_components
from quality.measures import Measure, rows

POINTS_TOLERANCE = 1e-4
"""Accuracies are stored as float32: 100 points carry an error of 1e-5."""

BATCH_EPISODES = 2000

_READ = (
    *("val_accuracy", "control_val_accuracy", "seed_params", "host_params"),
    *("reward_accuracy_points", "reward_growth_log2"),
    *("final_val_accuracy", "control_final_val_accuracy", "final_seed_params"),
)

_ROLES = "role IN ('data', 'online')"

Floats = NDArray[np.float64]


@dataclass
class _Rewards:
    """Per environment: mismatches of steps, mismatches of episodes, an example of each, and the returns."""

    steps: int = 0
    episodes: int = 0
    step_example: str = ""
    episode_example: str = ""
    returns: list[float] = field(default_factory=list)


def _episodes(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[dict[str, Any], dict[str, Floats]]]:
    """Yield each sound episode with its columns in step order, float64 [T + 1] each (NaN where null)."""
    found = rows(
        connection.sql(
            "SELECT episode_id, environment, num_steps, final_val_accuracy, control_final_val_accuracy, "
            "final_seed_params FROM health_episodes WHERE sound ORDER BY episode_id"
        )
    )
    source = connection.table("health_rows").project(", ".join(("episode_id", "step", *_READ)))
    for start in range(0, len(found), BATCH_EPISODES):
        part = found[start : start + BATCH_EPISODES]
        first, last = part[0]["episode_id"], part[-1]["episode_id"]
        table = source.filter(f"episode_id BETWEEN '{first}' AND '{last}'").order("episode_id, step").to_arrow_table()
        columns = {name: pa.compute.fill_null(table[name].cast(pa.float64()), np.nan).to_numpy() for name in _READ}
        offset = 0
        for row in part:
            end = offset + row["num_steps"] + 1
            yield row, {name: values[offset:end] for name, values in columns.items()}
            offset = end


def _far(found: Floats, expected: Floats) -> NDArray[np.bool_]:
    """Return where two numbers differ; what is NaN on either side is the business of `structure`."""
    return np.asarray(np.abs(found - expected) > POINTS_TOLERANCE * (1 + np.abs(expected)) / 10, dtype=bool)


def _check_episode(tally: _Rewards, row: dict[str, Any], columns: dict[str, Floats], spec: RewardSpec | None) -> None:
    episode = EpisodeColumns(
        val_accuracy=columns["val_accuracy"],
        control_val_accuracy=columns["control_val_accuracy"],
        seed_params=columns["seed_params"],
        host_params=float(columns["host_params"][0]),
        final_val_accuracy=float(columns["final_val_accuracy"][-1]),
        control_final_val_accuracy=float(columns["control_final_val_accuracy"][-1]),
        final_seed_params=float(columns["final_seed_params"][-1]),
    )
    stored = columns["reward_accuracy_points"][:-1], columns["reward_growth_log2"][:-1]
    accuracy, growth = reward_components(episode)
    wrong = _far(stored[0], accuracy) | _far(stored[1], growth)
    if wrong.any():
        tally.steps += int(wrong.sum())
        step = int(wrong.argmax())
        tally.step_example = tally.step_example or (
            f"episode {row['episode_id']} step {step}: stored {stored[0][step]:.4f} points, {stored[1][step]:.4f} "
            f"doublings; recomputed {accuracy[step]:.4f}, {growth[step]:.4f}"
        )
    start = 100 * (columns["val_accuracy"][0] - columns["control_val_accuracy"][0])
    start_growth = np.log2(1 + columns["seed_params"][0] / columns["host_params"][0])
    told = {name: np.nan if row[name] is None else float(row[name]) for name in row if name.startswith(("fin", "con"))}
    gain = 100 * (told["final_val_accuracy"] - told["control_final_val_accuracy"])
    final_growth = np.log2(1 + told["final_seed_params"] / columns["host_params"][0])
    sums = np.array([stored[0].sum() + start, stored[1].sum() + start_growth])
    if _far(sums, np.array([gain, final_growth])).any():
        tally.episodes += 1
        tally.episode_example = tally.episode_example or (
            f"episode {row['episode_id']}: components add up to {sums[0]:.4f} points, {sums[1]:.4f} doublings; "
            f"the outcome is {gain:.4f}, {final_growth:.4f}"
        )
    if spec is not None:
        tally.returns.append(float(combine(spec, *stored).sum()))


def _rewards(
    connection: duckdb.DuckDBPyConnection, names: Sequence[str], rewards: Mapping[str, RewardSpec]
) -> list[Measure]:
    tallies = {name: _Rewards() for name in names}
    for row, columns in _episodes(connection):
        name = row["environment"]
        _check_episode(tallies[name], row, columns, rewards.get(name))
    out = []
    for name, tally in tallies.items():
        message = (
            f"{tally.steps} decisions; for example {tally.step_example}" if tally.steps else "every reward recomputes"
        )
        out.append(Measure(check="reward_recompute", environment=name, value=float(tally.steps), message=message))
        message = f"{tally.episodes} episodes; for example {tally.episode_example}"
        message = message if tally.episodes else "every return is the final paired gain and growth"
        out.append(Measure(check="return_telescopes", environment=name, value=float(tally.episodes), message=message))
        if tally.returns:
            spread, top = float(np.std(tally.returns)), float(np.max(tally.returns))
            message = f"returns {np.mean(tally.returns):.3f} on average, {top:.3f} at best, under {rewards[name].name}"
            out.append(Measure(check="return_spread", environment=name, value=spread, message=message))
    return out


_GAIN = f"""
SELECT environment, avg(control_valid::INTEGER) AS valid, count(*) AS n,
    avg(100 * (final_val_accuracy - control_final_val_accuracy)) FILTER (control_valid) AS gain,
    max(100 * (final_val_accuracy - control_final_val_accuracy)) FILTER (control_valid) AS best
FROM health_episodes WHERE sound AND {_ROLES} GROUP BY environment
"""  # noqa: S608 - constants alone


def _outcomes(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    found = {row["environment"]: row for row in rows(connection.sql(_GAIN))}
    out = []
    for name in names:
        row = found.get(name) or {"valid": None, "gain": None, "best": None, "n": 0}
        message = f"of {row['n']} episodes"
        out.append(Measure(check="control_valid", environment=name, value=row["valid"], message=message))
        best = "" if row["best"] is None else f", {row['best']:.2f} at best"
        message = f"mean over {row['n']} episodes of role data or online{best}"
        out.append(Measure(check="paired_gain", environment=name, value=row["gain"], message=message))
    return out


def _removal(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """The last removal costs of an episode's seeds against its final paired gain."""
    costs = [slot_column(slot, "removal_cost") for slot in range(MAX_SLOTS)]
    total = " + ".join(f"coalesce({column}, 0)" for column in costs)
    measured = " OR ".join(f"{column} IS NOT NULL" for column in costs)
    final = connection.table("health_rows").filter(f"is_last AND ({measured})")
    table = final.project(
        f"environment, {total} AS cost, 100 * (final_val_accuracy - control_final_val_accuracy) AS gain"
    ).to_arrow_table()
    out = []
    for name in names:
        of = table.filter(pa.compute.equal(table["environment"], name))
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


def measure(
    connection: duckdb.DuckDBPyConnection, names: Sequence[str], rewards: Mapping[str, RewardSpec]
) -> list[Measure]:
    """Return the reward checks and the value reports; `return_spread` only where the reward is known."""
    return [*_rewards(connection, names, rewards), *_outcomes(connection, names), *_removal(connection, names)]
