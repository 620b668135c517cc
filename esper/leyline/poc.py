"""The results of the proof of concept: what growing brings over not growing. Made by simic, written by karn."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from esper.leyline.comparison import Interval
from esper.leyline.spec_base import Spec

Study = Literal["growth", "sunk-cost"]


class RunOrigin(Spec):
    """Where a table comes from; `source` and `digest` are those of the host's data."""

    command: str
    machine: dict[str, JsonValue]
    code_commit: str
    source: str
    digest: str
    ended_at: str
    wall_s: float


class PocArmResult(Spec):
    """One arm of a study.

    Attributes:
        name: Its name.
        what: What it is, in words.
        num_epochs: Epochs of one episode, a warm start not counted.
        num_batches: Training batches of one episode, a warm start not counted.
        test_accuracy_percent: Of the committed network.
        differences: Paired difference to each reference arm, points.
        params: Parameters of the committed network, mean.
        num_fossils: Committed seeds, mean.
        train_gflops: Training operations, a warm start not counted, mean.
        cpu_s: CPU seconds of one episode that runs alone, validation and probes included, mean.
        num_diverged: Episodes that ended at chance.
        num_rolled_back: Episodes that the governor rolled back and that went on.
        test_percent_by_seed: Test accuracies in the order of the replicates.
    """

    name: str
    what: str
    num_epochs: int
    num_batches: int
    test_accuracy_percent: Interval
    differences: dict[str, Interval]
    params: float
    num_fossils: float
    train_gflops: float
    cpu_s: float
    num_diverged: int
    num_rolled_back: int
    test_percent_by_seed: tuple[float, ...]


class PocTable(Spec):
    """One study on one environment; a later run of the same study on it takes its place."""

    study: Study
    environment: str
    host: str
    data: str
    clock: str
    replicates: tuple[int, ...]
    references: tuple[str, ...]
    arms: tuple[PocArmResult, ...]
    notes: tuple[str, ...]
    origin: RunOrigin


class PocFile(Spec):
    """All tables of a page."""

    tables: tuple[PocTable, ...] = ()


class Spread(Spec):
    """A mean over environment seeds and its standard deviation."""

    mean: float
    sd: float
    values: tuple[float, ...]


class IncubationArm(Spec):
    """Paired gain, points, of one seed that incubated for some epochs."""

    incubation: str
    incubation_epochs: int
    blueprint: str
    slot: str
    gain_points: Spread


class ProbeCorrelation(Spec):
    """Pearson correlation of a shadow probe with the final paired gain of the same episode.

    `epoch` counts incubation epochs; `within` first takes the mean of each environment seed out of both. None where
    one of them does not vary.
    """

    incubation: str
    incubation_epochs: int
    probe: str
    epoch: int
    overall: float | None
    within: float | None
    num_episodes: int


class IncubationCost(Spec):
    """Cost of episodes that incubate through the own pass over that of the same episodes, linearised."""

    incubation_epochs: int
    cpu_ratio: Spread
    operations_ratio: Spread


class IncubationTable(Spec):
    """The incubation study on one environment."""

    environment: str
    replicates: tuple[int, ...]
    arms: tuple[IncubationArm, ...]
    probes: tuple[ProbeCorrelation, ...]
    costs: tuple[IncubationCost, ...]
    origin: RunOrigin


class IncubationFile(Spec):
    """All tables of a page."""

    tables: tuple[IncubationTable, ...] = ()
