"""Planned, done and failed episodes cell by cell: what the tables of a dataset hold now against the plan on record.

The plan on record is STORE/NAME/plans/MATRIX_ID.json, written before the first cohort runs. It names every planned
episode, so that rows of other runs, and of other sizes of the same matrix, are not taken for those that were planned.
"""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field, JsonValue, ValidationError

from esper.karn import delta
from esper.karn.store import Dataset
from esper.karn.tables import last_attempts
from esper.leyline.errors import IntegrityError
from esper.leyline.identity import Role
from esper.leyline.matrix import CohortPlan, MatrixSpec, PlannedEpisode
from esper.leyline.spec_base import Spec

FOLDER = "plans"

CELL_COLUMNS = ("environment", "role", "root", "controller", "epsilon")
"""What a cell is: behaviours, trials, explorers and branches of one environment, by epsilon."""

COUNTS = ("planned", "done", "failed", "remaining")

PROGRESS = pa.schema(
    [
        *(pa.field(name, pa.float64() if name == "epsilon" else pa.string(), nullable=False) for name in CELL_COLUMNS),
        *(pa.field(name, pa.int64(), nullable=False) for name in COUNTS),
    ]
)
"""The columns of `progress`: `done` are episodes with rows that are not failed."""


class PlannedCell(Spec):
    """One cell of a plan; a branch counts in the cell of whoever goes on from it."""

    environment: str
    environment_id: str
    role: Role
    root: str
    controller: str
    epsilon: float
    planned: Annotated[int, Field(ge=0)]
    episode_ids: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        """The values of CELL_COLUMNS."""
        return (self.environment, self.role.value, self.root, self.controller, self.epsilon)


class PlanOnRecord(Spec):
    """What a data generation set out to do.

    Attributes:
        matrix: The matrix's name.
        matrix_id: Its id, after a selection that of the part.
        created_at: When it was written last, ISO 8601 with the zone.
        skeleton: Whether the episodes are made up (`--skeleton`).
        cells: In plan order.
    """

    matrix: str
    matrix_id: str
    created_at: str
    skeleton: bool = False
    cells: tuple[PlannedCell, ...]


def planned_cells(plans: Iterable[CohortPlan]) -> tuple[PlannedCell, ...]:
    """Return the cells of some cohorts in plan order, each with the ids of its episodes."""
    ids: dict[tuple[Any, ...], list[str]] = {}
    for plan in plans:
        environment_id = plan.environment.spec_id
        for cell, name in zip(plan_cells(plan), plan.planned_ids(), strict=True):
            ids.setdefault((environment_id, *cell), []).append(name)
    return tuple(
        PlannedCell(
            environment_id=key[0],
            environment=key[1],
            role=Role(key[2]),
            root=key[3],
            controller=key[4],
            epsilon=key[5],
            planned=len(names),
            episode_ids=tuple(names),
        )
        for key, names in ids.items()
    )


def plan_cells(plan: CohortPlan) -> Iterator[tuple[str, str, str, str, float]]:
    """Yield the cell of each episode and branch of a cohort, in the order of `planned_ids`."""
    for episode in plan.episodes:
        yield _cell(plan, episode, episode.root)
    for branch in plan.branches:
        yield _cell(plan, branch.then, branch.parent.root)


def _cell(plan: CohortPlan, episode: PlannedEpisode, root: str) -> tuple[str, str, str, str, float]:
    return (plan.environment.name, episode.role.value, root, episode.controller.name, episode.epsilon)


def record_plan(
    dataset: Dataset, matrix: MatrixSpec, plans: Sequence[CohortPlan], *, skeleton: bool = False
) -> PlanOnRecord:
    """Write down what is planned, in place of an older record of the same matrix.

    Raises:
        StoreError: The store cannot be written.
    """
    plan = PlanOnRecord(
        matrix=matrix.name,
        matrix_id=matrix.spec_id,
        created_at=dt.datetime.now(dt.UTC).isoformat(),
        skeleton=skeleton,
        cells=planned_cells(plans),
    )
    text = json.dumps(plan.model_dump(mode="json"), indent=1)
    dataset.place.write_over(f"{FOLDER}/{plan.matrix_id}.json", text)
    return plan


def without_ids(plan: PlanOnRecord) -> list[JsonValue]:
    """Return the cells as a manifest's provenance holds them: counts, no ids."""
    return [cell.model_dump(mode="json", exclude={"episode_ids"}) for cell in plan.cells]


def newest_plan(dataset: Dataset) -> PlanOnRecord | None:
    """Return the plan that was recorded last, None without any.

    Raises:
        IntegrityError: A record is damaged.
        StoreError: It cannot be read.
    """
    found = []
    for name in dataset.place.names(FOLDER):
        if not name.endswith(".json"):
            continue
        try:
            found.append(PlanOnRecord.model_validate_json(dataset.place.read_text(name)))
        except ValidationError as error:
            raise IntegrityError(
                f"{dataset.place.show(name)} is damaged: {error.errors()[0]['msg']}\n"
                "  remove it: the next `esper datagen` writes it again"
            ) from None
    return max(found, key=lambda plan: dt.datetime.fromisoformat(plan.created_at), default=None)


def progress(dataset: Dataset) -> pa.Table:
    """Return PROGRESS: what the tables hold now, sealed or not, against the newest plan on record.

    One row per cell in plan order; no row where no plan is on record.
    """
    plan = newest_plan(dataset)
    if plan is None:
        return PROGRESS.empty_table()
    return progress_of(plan, stored_outcomes(dataset))


def stored_outcomes(dataset: Dataset) -> dict[str, str]:
    """Return the outcome of each episode that the tables hold now."""
    columns = ["episode_id", "attempt", "commit_id", "outcome"]
    rows = last_attempts(delta.read_current(dataset.place.child("episodes"), "episodes", columns))
    return dict(zip(rows["episode_id"].to_pylist(), rows["outcome"].to_pylist(), strict=True))


def progress_of(plan: PlanOnRecord, outcomes: Mapping[str, str]) -> pa.Table:
    """Return PROGRESS of a plan, given the outcomes of the episodes that there are."""
    rows = []
    for cell in plan.cells:
        counts = Counter(outcomes[name] == "failed" for name in cell.episode_ids if name in outcomes)
        rows.append(
            {
                **dict(zip(CELL_COLUMNS, cell.key, strict=True)),
                "planned": cell.planned,
                "done": counts[False],
                "failed": counts[True],
                "remaining": cell.planned - counts[False] - counts[True],
            }
        )
    return pa.Table.from_pylist(rows, schema=PROGRESS)


def summed(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return a progress table summed over all but some of CELL_COLUMNS, in the order of first appearance."""
    sums = table.group_by(list(keys), use_threads=False).aggregate([(name, "sum") for name in COUNTS])
    return sums.select([*keys, *(f"{name}_sum" for name in COUNTS)]).rename_columns([*keys, *COUNTS])


def progress_line(table: pa.Table) -> str:
    """Return the sums of a progress table in one line."""
    sums = {name: sum(table[name].to_pylist()) for name in COUNTS}
    return (
        f"{sums['done']:,} of {sums['planned']:,} episodes done, {sums['failed']:,} failed, "
        f"{sums['remaining']:,} to go in {sum(left > 0 for left in table['remaining'].to_pylist()):,} of "
        f"{table.num_rows:,} cells"
    )
