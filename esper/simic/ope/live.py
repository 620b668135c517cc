"""Returns of stored or live episodes from their reward components."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esper.leyline.rewards import RewardSpec, combine


def episode_returns(steps: pa.Table, rewards: Mapping[str, RewardSpec]) -> dict[str, float]:
    """Return the return of each episode that `rewards` names.

    Both modes of a reward pay the same total, so the sums of the components are all that it takes.

    Args:
        steps: Rows of `steps`, one attempt of each episode.
        rewards: The reward of each episode by its id.
    """
    sums = (
        steps.filter(pc.invert(steps["is_last"]))
        .group_by("episode_id", use_threads=False)
        .aggregate([("reward_accuracy_points", "sum"), ("reward_growth_log2", "sum")])
    )
    found = {}
    for row in sums.to_pylist():
        spec = rewards.get(row["episode_id"])
        if spec is not None:
            parts = [np.array([row[f"{name}_sum"]]) for name in ("reward_accuracy_points", "reward_growth_log2")]
            found[row["episode_id"]] = float(combine(spec, *parts).sum())
    return found
