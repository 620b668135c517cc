"""Hold-outs by environment seed: episodes of one seed share rows, so they are never on both sides."""

from __future__ import annotations

import numpy as np

from esper.leyline.actions import Bools
from esper.leyline.keys import derive_seed
from esper.simic.batches import Transitions

HELD_OUT_SHARE = 0.15
FEWEST_SEEDS = 4


def held_out_rows(transitions: Transitions) -> Bools:
    """Return which transitions belong to held-out environment seeds, bool [N]; the same for the same seeds always.

    Of every environment with at least FEWEST_SEEDS seeds HELD_OUT_SHARE of them (one at least) are held out. A seed
    that is held out in one environment is held out in all.
    """
    chosen: set[int] = set()
    for environment in range(len(transitions.environments)):
        seeds = np.unique(transitions.env_seed_N[transitions.environment_N == environment]).tolist()
        if len(seeds) >= FEWEST_SEEDS:
            seeds.sort(key=lambda seed: derive_seed("held out", seed))
            chosen.update(seeds[: max(1, round(HELD_OUT_SHARE * len(seeds)))])
    return np.isin(transitions.env_seed_N, sorted(chosen))
