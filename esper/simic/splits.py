"""Hold-outs by environment seed: episodes of one seed share rows, so they are never on both sides."""

from __future__ import annotations

import numpy as np

from esper.karn.splits_stored import VALIDATION_FRACTION, StoredSplit, draw
from esper.leyline.actions import Bools
from esper.simic.batches import Transitions


def held_out_rows(transitions: Transitions) -> Bools:
    """Return which transitions belong to held-out environment seeds, bool [N]; the same for the same seeds always.

    The draw is that of the default split, over the seeds that there are.
    """
    seeds = {
        environment: np.unique(transitions.env_seed_N[transitions.environment_N == index]).tolist()
        for index, environment in enumerate(transitions.environments)
    }
    chosen, _ = draw(seeds, VALIDATION_FRACTION)
    return np.isin(transitions.env_seed_N, sorted(chosen))


def split_rows(transitions: Transitions, split: StoredSplit) -> tuple[Bools, Bools]:
    """Return which transitions a stored split gives to training, and which to validation, bool [N] each.

    Those of its test seeds and of its held-out environments are in neither.
    """
    held_out = [name in split.spec.held_out_environments for name in transitions.environments]
    usable = ~np.array(held_out, dtype=bool)[transitions.environment_N]
    seed_N = transitions.env_seed_N
    return usable & np.isin(seed_N, split.train), usable & np.isin(seed_N, split.validation)
