"""What the arms of a study came to: means, paired differences and costs, from stored episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline.errors import IntegrityError
from esper.leyline.host_specs import CnnHost, ResNetHost
from esper.leyline.poc import PocArmResult, PocTable, RunOrigin, Study
from esper.leyline.specs import EnvironmentSpec
from esper.simic.poc_arms import PocArm, plan_arms, replicates
from esper.simic.statistics import mean_interval, paired_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEpisode:
    """What the tables say about one episode. Accuracies are fractions."""

    outcome: str
    test_accuracy: float
    control_test_accuracy: float
    params: int
    num_fossils: int
    train_flops: float
    cpu_s: float


def poc_table(
    study: Study,
    environment: EnvironmentSpec,
    arms: Sequence[PocArm],
    references: Sequence[str],
    *,
    num_seeds: int,
    episodes: Mapping[str, StoredEpisode],
    notes: Sequence[str],
    origin: RunOrigin,
) -> PocTable:
    """Return the table of a study. No seed is left out: an episode that diverged counts with accuracy at chance.

    Args:
        study: Which one.
        environment: The environment whose variants the arms are.
        arms: All arms, the references among them.
        references: Names of the arms to which each is compared.
        num_seeds: Environment seeds.
        episodes: What was stored, by episode id.
        notes: What a reader must know, in sentences.
        origin: Where the table comes from.

    Raises:
        IntegrityError: An episode is missing.
    """
    found = {arm.name: _episodes(arm, num_seeds, episodes) for arm in arms}
    accuracy = {name: 100.0 * np.array([e.test_accuracy for e in rows]) for name, rows in found.items()}
    key = ("poc", study, environment.name)
    return PocTable(
        study=study,
        environment=environment.name,
        host=_describe_host(environment),
        data=_describe_data(environment),
        clock=_clock(environment),
        replicates=tuple(replicates(num_seeds)),
        references=tuple(references),
        arms=tuple(_result(arm, found[arm.name], accuracy, references, key) for arm in arms),
        notes=tuple(notes),
        origin=origin,
    )


def _episodes(arm: PocArm, num_seeds: int, episodes: Mapping[str, StoredEpisode]) -> list[StoredEpisode]:
    rows = []
    for plan in plan_arms([arm], num_seeds):
        (episode_id,) = plan.episode_ids()
        if episode_id not in episodes:
            raise IntegrityError(
                f"episode {episode_id} of arm {arm.name!r}, replicate {plan.replicate}, is not stored\n"
                "  expected: every episode of the study; run the same command again"
            )
        rows.append(episodes[episode_id])
    return rows


def _result(
    arm: PocArm,
    rows: Sequence[StoredEpisode],
    accuracy: Mapping[str, Floats],
    references: Sequence[str],
    key: tuple[str, ...],
) -> PocArmResult:
    own = accuracy[arm.name]
    return PocArmResult(
        name=arm.name,
        what=arm.what,
        num_epochs=arm.environment.horizon,
        num_batches=arm.environment.horizon * arm.environment.batches_per_epoch,
        test_accuracy_percent=mean_interval(own, key=(*key, arm.name)),
        differences={
            other: paired_interval(own, accuracy[other], key=(*key, arm.name, other))
            for other in references
            if other != arm.name
        },
        params=float(np.mean([row.params for row in rows])),
        num_fossils=float(np.mean([row.num_fossils for row in rows])),
        train_gflops=float(np.mean([row.train_flops for row in rows])) / 1e9,
        cpu_s=float(np.mean([row.cpu_s for row in rows])),
        num_diverged=sum(row.outcome == "diverged" for row in rows),
        num_rolled_back=sum(row.outcome == "rolled_back" for row in rows),
        test_percent_by_seed=tuple(float(value) for value in own),
    )


def _describe_host(environment: EnvironmentSpec) -> str:
    """Return an environment's host in words."""
    host = environment.host
    width = "" if host.width_factor == 1 else f", width x {host.width_factor:g}"
    if isinstance(host, CnnHost):
        channels, kernels, pools = ("/".join(map(str, values)) for values in (host.channels, host.kernels, host.pools))
        return f"CNN {channels}, kernels {kernels}, pools {pools}{width}"
    if isinstance(host, ResNetHost):
        return f"ResNet-{host.layers}{width}"
    return f"transformer of {host.layers} layers, {host.embed} wide{width}"


def _describe_data(environment: EnvironmentSpec) -> str:
    """Return an environment's data in words."""
    task = environment.task
    if task.kind == "digits":
        rows = [source * copies for source, copies in zip(task.sources, task.copies)]
        what = f"digits on {task.canvas} x {task.canvas}, noise sd {task.noise_sd:g}"
    else:
        rows = list(task.rows)
        size = f"{task.context} tokens" if task.kind == "tinystories" else f"{task.resolution} x {task.resolution}"
        what = f"{task.kind} at {size}"
    train, val, test = rows
    return f"{what}; {train:,} training, {val:,} validation, {test:,} test rows"


def _clock(environment: EnvironmentSpec) -> str:
    decay = f", weight decay {environment.weight_decay:g}" if environment.weight_decay else ""
    momentum = f" momentum {environment.momentum:g}" if environment.optimiser == "sgd" else ""
    augmented = ", crop and flip" if environment.augment == "crop-flip" else ""
    return (
        f"{environment.batches_per_epoch} batches of {environment.batch_size} an epoch, "
        f"{environment.optimiser}{momentum} at {environment.learning_rate:g}{decay}{augmented}"
    )
