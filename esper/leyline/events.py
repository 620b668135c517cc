"""Telemetry events: one JSON object a line, append-only, one file per process under a run's folder."""

from __future__ import annotations

from enum import StrEnum

from pydantic import JsonValue

from esper.leyline.spec_base import Spec


class EventKind(StrEnum):
    """What happened."""

    RUN_STARTED = "run.started"
    RUN_ENDED = "run.ended"
    COHORT_STARTED = "cohort.started"
    COHORT_ENDED = "cohort.ended"
    COHORT_FAILED = "cohort.failed"
    TRAIN_STEP = "train.step"
    TRAIN_ENDED = "train.ended"
    PPO_UPDATE = "ppo.update"
    HEALTH_CHECKED = "health.checked"
    EVALUATED = "evaluation.ended"
    OPE_ENDED = "ope.ended"
    EPISODE_STARTED = "episode.started"
    EPISODE_EPOCH = "episode.epoch"
    EPISODE_ENDED = "episode.ended"
    SEED_GERMINATED = "seed.germinated"
    SEED_STAGE_CHANGED = "seed.stage_changed"
    SEED_GATE_EVALUATED = "seed.gate_evaluated"
    SEED_FOSSILIZED = "seed.fossilized"
    SEED_PRUNED = "seed.pruned"
    GOVERNOR_ROLLBACK = "governor.rollback"


class Event(Spec):
    """One event; `data` holds numbers and short strings, units in the key names."""

    kind: EventKind
    time: str
    run: str
    data: dict[str, JsonValue]
