"""The life of a seed: stages, legal transitions, cool-down lengths. One table, and nothing beside it."""

from __future__ import annotations

from enum import IntEnum

from esper.leyline.errors import LifecycleError


class Stage(IntEnum):
    """Stage of a slot; the numbers are those of the published encoding (0 and 5 are not used)."""

    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    HOLDING = 6
    FOSSILIZED = 7
    PRUNED = 8
    EMBARGOED = 9
    RESETTING = 10


LEGAL_TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.DORMANT: frozenset({Stage.GERMINATED}),
    Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.PRUNED}),
    Stage.TRAINING: frozenset({Stage.BLENDING, Stage.PRUNED}),
    Stage.BLENDING: frozenset({Stage.HOLDING, Stage.PRUNED}),
    Stage.HOLDING: frozenset({Stage.FOSSILIZED, Stage.PRUNED}),
    Stage.FOSSILIZED: frozenset(),
    Stage.PRUNED: frozenset({Stage.EMBARGOED}),
    Stage.EMBARGOED: frozenset({Stage.RESETTING}),
    Stage.RESETTING: frozenset({Stage.DORMANT}),
}

COOLDOWN_EPOCHS: dict[Stage, int] = {Stage.PRUNED: 1, Stage.EMBARGOED: 5, Stage.RESETTING: 1}

LIVE_STAGES = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING})
"""A seed is there and can still be pruned."""

INCUBATING_STAGES = frozenset({Stage.GERMINATED, Stage.TRAINING})
"""A seed is there and the host does not know it."""

BLENDED_STAGES = frozenset({Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED})
"""The seed's output reaches the host's forward pass."""

OCCUPIED_STAGES = LIVE_STAGES | {Stage.FOSSILIZED}

STAGE_ORDER: tuple[Stage, ...] = tuple(Stage)
"""The order of the one-hot encoding."""


def check_transition(before: Stage, after: Stage) -> Stage:
    """Return `after`, or raise LifecycleError where the table has no such transition."""
    if after not in LEGAL_TRANSITIONS[before]:
        allowed = ", ".join(sorted(stage.name for stage in LEGAL_TRANSITIONS[before])) or "none: it is terminal"
        raise LifecycleError(f"transition {before.name} -> {after.name} is not legal\n  from {before.name}: {allowed}")
    return after
