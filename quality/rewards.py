"""Rewards recomputed from the raw columns by leyline's own function, and the returns that they add up to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper.leyline.actions import Bools
from esper.leyline.rewards import EpisodeColumns, RewardSpec, combine, reward_components
from quality.arrays import Floats, numbers
from quality.audit import Tally
from quality.measures import Measure

POINTS_TOLERANCE = 1e-4
"""Accuracies are stored as float32: 100 points carry an error of 1e-5."""

BATCH_EPISODES = 4000

_READ = (
    *("val_accuracy", "control_val_accuracy", "seed_params", "host_params"),
    *("reward_accuracy_points", "reward_growth_log2"),
    *("final_val_accuracy", "control_final_val_accuracy", "final_seed_params"),
)


@dataclass
class RewardAudit:
    """What one pass over the sound episodes found.

    Attributes:
        steps: Decisions whose stored reward is another than the recomputed one.
        episodes: Episodes whose rewards do not add up to the outcome in `episodes`.
        returns: By episode number, under the environment's reward; only where that is known.
    """

    steps: Tally = field(default_factory=Tally)
    episodes: Tally = field(default_factory=Tally)
    returns: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Block:
    """Whole episodes in order: their rows, where each begins and ends, and the columns as float64, NaN where null."""

    rows: pa.Table
    episodes: pa.Table
    start_E: NDArray[np.int64]
    last_E: NDArray[np.int64]
    columns: Mapping[str, Floats]


def _blocks(connection: duckdb.DuckDBPyConnection) -> Iterator[_Block]:
    kept = (
        "environment, episode_id, number, num_steps, final_val_accuracy, control_final_val_accuracy, final_seed_params"
    )
    episodes = connection.table("health_episodes").filter("sound").order("number").project(kept).to_arrow_table()
    source = connection.table("health_core").project(", ".join(("environment", "episode_id", "number", "step", *_READ)))
    for start in range(0, episodes.num_rows, BATCH_EPISODES):
        part = episodes.slice(start, BATCH_EPISODES)
        first, last = part["number"][0].as_py(), part["number"][-1].as_py()
        rows = source.filter(f"number BETWEEN {first} AND {last}").order("number, step").to_arrow_table()
        lengths = part["num_steps"].to_numpy().astype(np.int64) + 1
        ends = lengths.cumsum()
        yield _Block(rows, part, ends - lengths, ends - 1, {name: numbers(rows, name) for name in _READ})


def _recomputed(block: _Block) -> tuple[Floats, Floats]:
    """Return both components of every row by leyline's function, NaN on the rows of final observations."""
    columns = block.columns
    accuracy, growth = np.full(block.rows.num_rows, np.nan), np.full(block.rows.num_rows, np.nan)
    for start, last in zip(block.start_E.tolist(), block.last_E.tolist()):
        of = slice(start, last + 1)
        episode = EpisodeColumns(
            val_accuracy=columns["val_accuracy"][of],
            control_val_accuracy=columns["control_val_accuracy"][of],
            seed_params=columns["seed_params"][of],
            host_params=columns["host_params"][start],
            final_val_accuracy=columns["final_val_accuracy"][last],
            control_final_val_accuracy=columns["control_final_val_accuracy"][last],
            final_seed_params=columns["final_seed_params"][last],
        )
        accuracy[start:last], growth[start:last] = reward_components(episode)
    return accuracy, growth


def _far(found: Floats, expected: Floats) -> Bools:
    """Return where two numbers differ; what is NaN on either side is the business of `structure`."""
    return np.asarray(np.abs(found - expected) > POINTS_TOLERANCE * (1 + np.abs(expected)) / 10, dtype=bool)


def _add_steps(audit: RewardAudit, block: _Block) -> None:
    stored = block.columns["reward_accuracy_points"], block.columns["reward_growth_log2"]
    accuracy, growth = _recomputed(block)
    wrong = _far(stored[0], accuracy) | _far(stored[1], growth)
    if wrong.any():
        at = int(wrong.argmax())
        told = (
            f"stored rewards do not recompute; the first has {stored[0][at]:.4f} points, {stored[1][at]:.4f} "
            f"doublings, recomputed {accuracy[at]:.4f}, {growth[at]:.4f}"
        )
        audit.steps.add(block.rows, wrong, told)


def _sums(values: Floats, block: _Block) -> Floats:
    """Return the sum over the decisions of each episode, float64 [E]; final observations hold NaN."""
    decided = values.copy()
    decided[block.last_E] = 0.0
    return np.asarray(np.add.reduceat(decided, block.start_E))


def _add_episodes(audit: RewardAudit, block: _Block) -> None:
    columns, start = block.columns, block.start_E
    first = 100 * (columns["val_accuracy"][start] - columns["control_val_accuracy"][start])
    host = columns["host_params"][start]
    grown = np.log2(1 + columns["seed_params"][start] / host)
    told = {
        name: numbers(block.episodes, name) for name in block.episodes.column_names if name.startswith(("fin", "con"))
    }
    gain = 100 * (told["final_val_accuracy"] - told["control_final_val_accuracy"])
    doublings = np.log2(1 + told["final_seed_params"] / host)
    sums = _sums(columns["reward_accuracy_points"], block) + first, _sums(columns["reward_growth_log2"], block) + grown
    wrong = _far(sums[0], gain) | _far(sums[1], doublings)
    if wrong.any():
        at = int(wrong.argmax())
        what = (
            f"rewards do not add up to the outcome; the first to {sums[0][at]:.4f} points, {sums[1][at]:.4f} "
            f"doublings, the outcome is {gain[at]:.4f}, {doublings[at]:.4f}"
        )
        keyed = block.episodes.append_column("step", block.episodes["num_steps"])
        audit.episodes.add(keyed, wrong, what)


def _add_returns(audit: RewardAudit, block: _Block, rewards: Mapping[str, RewardSpec]) -> None:
    points, growth = block.columns["reward_accuracy_points"], block.columns["reward_growth_log2"]
    places = block.episodes["environment"].to_pylist()
    numbers_E = block.episodes["number"].to_pylist()
    for name, number, start, last in zip(places, numbers_E, block.start_E.tolist(), block.last_E.tolist()):
        if name in rewards:
            value = float(combine(rewards[name], points[start:last], growth[start:last]).sum())
            if np.isfinite(value):
                audit.returns[number] = value


def audit_rewards(
    connection: duckdb.DuckDBPyConnection, rewards: Mapping[str, RewardSpec], *, keep: int = 0
) -> RewardAudit:
    """Return what one pass over the sound episodes finds; `keep` rows of each kind of offence are kept."""
    audit = RewardAudit(steps=Tally(keep), episodes=Tally(keep))
    for block in _blocks(connection):
        _add_steps(audit, block)
        _add_episodes(audit, block)
        _add_returns(audit, block, rewards)
    return audit


def measure(audit: RewardAudit, names: Sequence[str]) -> list[Measure]:
    """Return `reward_recompute` and `return_telescopes` of every environment."""
    return [
        *audit.steps.measures("reward_recompute", names, "every reward recomputes"),
        *audit.episodes.measures("return_telescopes", names, "every return is the final paired gain and growth"),
    ]
