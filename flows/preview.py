"""What a data generation would take, before anything runs: host epochs, hours and bytes, by environment and by cell.

Hours and bytes are those of a run of the same environments in the store, this dataset's before another's. Without one
they are figured from the operations that a host takes, and much less certain. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from esper.karn.kinds import is_skeleton
from esper.karn.progress_table import PlanOnRecord, planned_cells, progress_of
from esper.karn.store import Dataset, Store, open_store
from esper.karn.versions import Version
from esper.leyline.matrix import CohortPlan
from esper.leyline.specs import EnvironmentSpec
from flows.datagen import DatagenRequest
from flows.host_operations import batch_operations, num_layers, validation_operations
from flows.planning import Estimate, epochs_per_episode, estimate, measured_ratio, slices

if TYPE_CHECKING:
    from esper.tolaria.memory import MemoryBound

MEASURED_RANGE = 1.5
"""Another run of the same environments takes between the figure divided by this and multiplied by it."""

FIGURED_RANGE = 3.0
"""The same of a figure from operations: what is left out is seeds, probes and how well a processor is used."""

LAYER_S: Mapping[str, float] = {"cpu": 1.1e-3, "cuda": 0.3e-3}
"""Seconds per batch and layer whatever its size, seeds and probes included.

CPU: 0.7 to 1.5 ms in the runs of the demo on digits. A GPU was never measured: some 25 launches of about 10 us.
"""

OPERATIONS_PER_S: Mapping[str, float] = {"cpu": 4e10, "cuda": 1e13}
"""Of one CPU thread: 30 to 71 GFLOP/s on the wider hosts of the performance page. A GPU was never measured."""

OWN_SHARE = 0.42
"""Of an episode's host epochs, those that no other episode and no trunk share, where nothing ran yet.

Rows of 31 with it cost 2.2 times less than each episode alone (1.9 to 2.6 in the demo), a lone episode 1.4 times more
than without its trunk (1.2 to 1.5 measured).
"""

DECISION_S = 1e-3
"""What a decision takes beside its host epoch: observing, acting, writing its row."""

COHORT_BYTES, DECISION_BYTES = 104_000, 73
"""Stored per commit (three Parquet files and their footers of some 200 columns) and per row of `steps`, in the demo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentCost:
    """What the cohorts of one environment take.

    Attributes:
        environment: Its name.
        cohorts: Cohorts.
        episodes: Episodes and branches.
        alone_epochs: Host epochs if each episode ran alone.
        least_epochs: Host epochs of the trunks alone.
        epochs: Host epochs expected.
        seconds: Seconds expected of one worker, on a CPU core or a GPU.
        low_s: At the least.
        high_s: At the most.
        num_bytes: Bytes in the store.
        device: `cpu` or `cuda`.
        source: The version that was measured; None where it is figured from operations.
    """

    environment: str
    cohorts: int
    episodes: int
    alone_epochs: int
    least_epochs: int
    epochs: float
    seconds: float
    low_s: float
    high_s: float
    num_bytes: float
    device: str
    source: str | None


@dataclass(frozen=True)
class Preview:
    """A plan and what it takes."""

    request: DatagenRequest
    dataset: Dataset
    plans: tuple[CohortPlan, ...]
    estimate: Estimate
    costs: tuple[EnvironmentCost, ...]

    @cached_property
    def cells(self) -> pa.Table:
        """The table of progress if nothing had run: planned episodes of every cell."""
        plan = PlanOnRecord(matrix="", matrix_id="", created_at="", cells=planned_cells(self.plans))
        return progress_of(plan, {})

    def memory(self) -> MemoryBound:
        """Return what a worker holds at most, in the cohort that needs most; runs nothing, loads torch."""
        from esper.tolaria.memory import cohort_memory

        bounds = [cohort_memory(part) for plan in self.plans for part in slices(plan, self.request.max_lineages)]
        return max(bounds, key=lambda bound: bound.total_bytes)


def preview(request: DatagenRequest) -> Preview:
    """Return what a request takes, running nothing and writing nothing."""
    matrix, plans = request.plan()
    dataset = request.open_dataset(matrix)
    costs = tuple(_environment_costs(plans, open_store(request.store), dataset))
    return Preview(request, dataset, tuple(plans), estimate(plans, dataset), costs)


def _environment_costs(plans: Sequence[CohortPlan], store: Store, dataset: Dataset) -> Iterator[EnvironmentCost]:
    by_environment: dict[str, list[CohortPlan]] = {}
    for plan in plans:
        by_environment.setdefault(plan.environment.name, []).append(plan)
    known = list(_measured_versions(store, dataset))
    for own in by_environment.values():
        version = next((version for version in known if _holds(version, own[0].environment)), None)
        yield _cost(own, version)


def _cost(plans: Sequence[CohortPlan], version: Version | None) -> EnvironmentCost:
    """What the cohorts of one environment take, as they took in a version that holds it."""
    spec = plans[0].environment
    device = spec.numerics.partition("-")[0]
    episodes = sum(plan.num_planned for plan in plans)
    alone = sum(plan.num_planned * epochs_per_episode(plan) for plan in plans)
    least = sum(epochs_per_episode(plan) for plan in plans)
    decisions = episodes * spec.horizon
    measured = None if version is None else _Measured.of(version, spec.name)
    if measured is None:
        epochs, epoch_s, spread = least + OWN_SHARE * alone, figured_epoch_s(spec), FIGURED_RANGE
        row_bytes = float(DECISION_BYTES)
    else:
        epochs, epoch_s, spread = max(alone / measured.ratio, least), measured.epoch_s, MEASURED_RANGE
        row_bytes = measured.row_bytes
    seconds = epochs * epoch_s + decisions * DECISION_S
    return EnvironmentCost(
        environment=spec.name,
        cohorts=len(plans),
        episodes=episodes,
        alone_epochs=alone,
        least_epochs=least,
        epochs=epochs,
        seconds=seconds,
        low_s=seconds / spread,
        high_s=seconds * spread,
        num_bytes=len(plans) * COHORT_BYTES + decisions * row_bytes,
        device=device,
        source=None if measured is None or version is None else version.ref,
    )


def figured_epoch_s(spec: EnvironmentSpec) -> float:
    """Return the seconds of one host epoch with its seeds, from the operations that the host takes."""
    device = spec.numerics.partition("-")[0]
    operations = spec.batches_per_epoch * batch_operations(spec) + validation_operations(spec)
    calls = spec.batches_per_epoch * num_layers(spec) * LAYER_S[device]
    return calls + operations / OPERATIONS_PER_S[device]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """What an environment took in a version: seconds of a host epoch, epochs alone over computed, bytes a row."""

    epoch_s: float
    ratio: float
    row_bytes: float

    @classmethod
    def of(cls, version: Version, environment: str) -> _Measured | None:
        """Return the figures of an environment, None where the version has no costs of it."""
        costs = version.table(
            "costs", columns=["cpu_s_alone", "cpu_s_shared"], filter=pc.field("environment") == environment
        )
        if not costs.num_rows:
            return None
        alone, shared = (pc.sum(costs[name]).as_py() for name in ("cpu_s_alone", "cpu_s_shared"))
        entries = [entry for entry in version.manifest.files if f"/environment={environment}/" in entry.path]
        commits = sum(entry.table == "episodes" for entry in entries)
        size = sum(entry.size for entry in entries)
        rows = sum(entry.rows for entry in entries if entry.table == "steps")
        # Seconds shared say how much is saved, but not what trunks cost that nobody rode to the end.
        overall = measured_ratio(version)
        ratio = alone / shared if shared else 1.0
        return cls(
            epoch_s=alone / costs.num_rows,
            ratio=min(ratio, overall) if overall is not None else ratio,
            row_bytes=max(size - commits * COHORT_BYTES, rows * DECISION_BYTES / 2) / max(1, rows),
        )


def _measured_versions(store: Store, dataset: Dataset) -> Iterator[Version]:
    """The newest version of the dataset, then those of the store's others; none that is made up."""
    others = [store.dataset(name) for name in store.names() if name != dataset.name]
    for held in (dataset, *others):
        numbers = held.version_numbers()
        if numbers:
            version = held.versions()[-1]
            if not is_skeleton(version):
                yield version


def _holds(version: Version, spec: EnvironmentSpec) -> bool:
    """Whether a version holds an environment, of whatever horizon."""
    environments = version.manifest.provenance.get("environments")
    held = environments.get(spec.name) if isinstance(environments, dict) else None
    if not isinstance(held, dict):
        return False
    return {**held, "horizon": 0} == {**spec.model_dump(mode="json"), "horizon": 0}
