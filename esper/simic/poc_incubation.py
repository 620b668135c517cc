"""The incubation study: both ways in which a seed can learn before the host knows it, for 1, 3 and 6 epochs.

One seed per episode, born at epoch 1, advanced after exactly that many epochs and committed when it can be. Six epochs
are one more than the action tree's longest dwell: a branching from the five-epoch schedule that waits once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper.leyline.actions import DWELL_EPOCHS, WAIT_ROW
from esper.leyline.controller_specs import FixedSchedule, Plant
from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.identity import Role
from esper.leyline.matrix import CohortPlan, PlannedBranch, PlannedEpisode
from esper.leyline.observations import slot_column
from esper.leyline.plans import COMPLETE
from esper.leyline.poc import IncubationArm, IncubationCost, ProbeCorrelation, Spread
from esper.leyline.specs import EnvironmentSpec
from esper.simic.poc import StoredEpisode
from esper.simic.poc_arms import NO_REWARD, replicates, variant

Floats = NDArray[np.float64]

WAYS = ("own_pass", "linearised")
INCUBATION_EPOCHS = (1, 3, 6)
BLUEPRINTS = ("conv_heavy", "conv_light")
BIRTH_EPOCH = 1
TEMPO_EPOCHS = 3
PROBES = ("train_loss_drop", "val_loss_drop", "seed_improvement")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One seed on one environment seed; `episode_id` is where it is stored."""

    incubation: str
    incubation_epochs: int
    blueprint: str
    slot: int
    replicate: int
    episode_id: str


def plan_incubation(environment: EnvironmentSpec, num_seeds: int) -> tuple[list[CohortPlan], list[Trial]]:
    """Return one cohort per way and replicate, and what each of their episodes tries.

    Raises:
        SpecError: The host is no CNN, or the longest life does not fit the horizon.
    """
    needed = BIRTH_EPOCH + max(INCUBATION_EPOCHS) + TEMPO_EPOCHS + 1
    if environment.horizon < needed:
        raise SpecError(f"{environment.horizon} epochs are too few for the study\n  expected: at least {needed}")
    if environment.host.topology != "cnn":
        raise SpecError(f"the study compares {', '.join(BLUEPRINTS)}\n  expected: an environment with a CNN host")
    plans, trials = [], []
    for replicate, way in itertools.product(replicates(num_seeds), WAYS):
        own = variant(
            environment, way.replace("_", "-"), schedule=environment.schedule, lr_drops=environment.lr_drops
        ).model_copy(update={"incubation": way})
        episodes: list[PlannedEpisode] = []
        branches: list[PlannedBranch] = []
        tried: list[tuple[int, str, int, PlannedEpisode | PlannedBranch]] = []
        for epochs, blueprint, slot in itertools.product(INCUBATION_EPOCHS, BLUEPRINTS, range(own.host.num_slots)):
            one = _episode_or_branch(epochs, blueprint, slot)
            (branches if isinstance(one, PlannedBranch) else episodes).append(one)  # type: ignore[arg-type]
            tried.append((epochs, blueprint, slot, one))
        plan = CohortPlan(
            environment=own,
            reward=NO_REWARD,
            replicate=replicate,
            episodes=tuple(episodes),
            branches=tuple(branches),
        )
        plans.append(plan)
        for epochs, blueprint, slot, one in tried:
            identity = plan.branch_identity(one) if isinstance(one, PlannedBranch) else plan.identity(one)
            trials.append(
                Trial(
                    incubation=way,
                    incubation_epochs=epochs,
                    blueprint=blueprint,
                    slot=slot,
                    replicate=replicate,
                    episode_id=identity.episode_id,
                )
            )
    return plans, trials


def _episode_or_branch(epochs: int, blueprint: str, slot: int) -> PlannedEpisode | PlannedBranch:
    if epochs in DWELL_EPOCHS:
        return _episode(epochs, blueprint, slot)
    longest = max(DWELL_EPOCHS)
    wait = tuple(int(value) for value in WAIT_ROW)
    return PlannedBranch(
        parent=_episode(longest, blueprint, slot),
        step=BIRTH_EPOCH + longest,
        forced=(wait,) * (epochs - longest),
        then=PlannedEpisode(controller=COMPLETE, role=Role.EVALUATION),
    )


def _episode(dwell_epochs: int, blueprint: str, slot: int) -> PlannedEpisode:
    plant = Plant.parse(
        {
            "slot": slot,
            "blueprint": blueprint,
            "birth_epoch": BIRTH_EPOCH,
            "dwell_epochs": dwell_epochs,
            "tempo_epochs": TEMPO_EPOCHS,
            "isolation": "coadapt",
        }
    )
    schedule = FixedSchedule(name=f"{blueprint}-s{slot}-d{dwell_epochs}".replace("_", "-"), plants=(plant,))
    return PlannedEpisode(controller=schedule, role=Role.EVALUATION)


def gains(trials: Sequence[Trial], episodes: Mapping[str, StoredEpisode]) -> dict[str, float]:
    """Return the paired gain of each trial by episode id, points.

    Raises:
        IntegrityError: A trial is not stored.
    """
    missing = [trial for trial in trials if trial.episode_id not in episodes]
    if missing:
        raise IntegrityError(
            f"{len(missing)} of {len(trials)} episodes are not stored, the first {missing[0]}\n"
            "  run the same command again"
        )
    found = {trial.episode_id: episodes[trial.episode_id] for trial in trials}
    return {name: 100.0 * (row.test_accuracy - row.control_test_accuracy) for name, row in found.items()}


def arm_results(trials: Sequence[Trial], gain: Mapping[str, float], slot_names: Sequence[str]) -> list[IncubationArm]:
    """Return the gain of every way, length, blueprint and slot over environment seeds."""
    groups: dict[tuple[str, int, str, int], list[float]] = {}
    for trial in trials:
        key = (trial.blueprint, trial.slot, trial.incubation, trial.incubation_epochs)
        groups.setdefault((key[2], key[3], key[0], key[1]), []).append(gain[trial.episode_id])
    return [
        IncubationArm(
            incubation=way,
            incubation_epochs=epochs,
            blueprint=blueprint,
            slot=slot_names[slot],
            gain_points=spread(values),
        )
        for (way, epochs, blueprint, slot), values in groups.items()
    ]


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation (0 of a single value)."""
    sample = np.array(values, dtype=np.float64)
    sd = float(sample.std(ddof=1)) if len(sample) > 1 else 0.0
    return Spread(mean=float(sample.mean()), sd=sd, values=tuple(float(value) for value in sample))


def probe_columns(num_slots: int) -> list[str]:
    """Return the columns of `steps` that hold the shadow probes."""
    return [slot_column(slot, probe) for slot in range(num_slots) for probe in PROBES]


def probe_correlations(trials: Sequence[Trial], gain: Mapping[str, float], steps: pa.Table) -> list[ProbeCorrelation]:
    """Return for each way, length, probe and incubation epoch its correlation with the final gain.

    Args:
        trials: What was tried.
        gain: Final paired gains by episode id.
        steps: `episode_id`, `step` and the columns of `probe_columns`; the probe after k epochs is at birth + k.
    """
    rows = {(row["episode_id"], row["step"]): row for row in steps.to_pylist()}
    found = []
    for way, length in itertools.product(WAYS, INCUBATION_EPOCHS):
        group = [trial for trial in trials if (trial.incubation, trial.incubation_epochs) == (way, length)]
        for probe, epoch in itertools.product(PROBES, range(1, length + 1)):
            read = [rows[trial.episode_id, BIRTH_EPOCH + epoch][slot_column(trial.slot, probe)] for trial in group]
            kept = [(trial, value) for trial, value in zip(group, read) if value is not None]
            values = np.array([value for _, value in kept], dtype=np.float64)
            final = np.array([gain[trial.episode_id] for trial, _ in kept], dtype=np.float64)
            seeds = np.array([trial.replicate for trial, _ in kept])
            found.append(
                ProbeCorrelation(
                    incubation=way,
                    incubation_epochs=length,
                    probe=probe,
                    epoch=epoch,
                    overall=correlation(values, final),
                    within=correlation(centred(values, seeds), centred(final, seeds)),
                    num_episodes=len(kept),
                )
            )
    return found


def correlation(left: Floats, right: Floats) -> float | None:
    """Return Pearson's correlation, None where there are fewer than three values or one side does not vary."""
    if len(left) < 3 or np.ptp(left) < 1e-12 or np.ptp(right) < 1e-12:
        return None
    return float(np.corrcoef(left, right)[0, 1])


def centred(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """Return the values minus the mean of their group."""
    result = values.copy()
    for group in np.unique(groups):
        result[groups == group] -= values[groups == group].mean()
    return result


def cost_ratios(trials: Sequence[Trial], episodes: Mapping[str, StoredEpisode]) -> list[IncubationCost]:
    """Return what the own pass costs over the linearised way, pair by pair of otherwise equal episodes."""
    by_key = {
        (trial.incubation, trial.incubation_epochs, trial.blueprint, trial.slot, trial.replicate): trial.episode_id
        for trial in trials
    }
    found = []
    for length in INCUBATION_EPOCHS:
        pairs = [
            (episodes[name], episodes[by_key[WAYS[1], *key[1:]]])
            for key, name in by_key.items()
            if key[0] == WAYS[0] and key[1] == length
        ]
        found.append(
            IncubationCost(
                incubation_epochs=length,
                cpu_ratio=spread([own.cpu_s / other.cpu_s for own, other in pairs]),
                operations_ratio=spread([own.train_flops / other.train_flops for own, other in pairs]),
            )
        )
    return found
