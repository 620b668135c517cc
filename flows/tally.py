"""How far a data generation is, cell by cell, while it runs: in the terminal, and as an artifact under Prefect."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

import pyarrow as pa

from esper.karn.progress_table import PlanOnRecord, progress_of
from esper.leyline.matrix import CohortPlan
from flows.context import Context
from flows.orchestration import under_prefect

ARTIFACT_EVERY_S = 60.0


class Tally:
    """Counts what becomes of the episodes of a plan.

    Args:
        plan: What is planned.
        outcomes: The outcomes of the episodes that are stored already.
    """

    def __init__(self, plan: PlanOnRecord, outcomes: Mapping[str, str]) -> None:
        self.plan = plan
        self._outcomes = dict(outcomes)

    def known_ids(self, *, failed: bool) -> set[str]:
        """Return the ids of the episodes that have ended; `failed=False` leaves out the failed ones."""
        return {name for name, outcome in self._outcomes.items() if failed or outcome != "failed"}

    def failed_ids(self) -> frozenset[str]:
        """Return the ids of the episodes that failed."""
        return frozenset(name for name, outcome in self._outcomes.items() if outcome == "failed")

    def forget(self, ids: Iterable[str]) -> None:
        """Count episodes as not run: they run again."""
        for name in ids:
            self._outcomes.pop(name, None)

    def ended(self, part: CohortPlan, *, failed: bool = False) -> None:
        """Count the episodes and branches of a part of a cohort."""
        self._outcomes |= dict.fromkeys(part.planned_ids(), "failed" if failed else "completed")

    def table(self) -> pa.Table:
        """Return the table of progress (see `esper.karn.progress_table`)."""
        return progress_of(self.plan, self._outcomes)


class Shown:
    """Keeps a tally in sight while cohorts run; use as a context manager, whose end shows it once more."""

    def __init__(self, context: Context, tally: Tally) -> None:
        self._context = context
        self._tally = tally
        self._under_prefect = under_prefect(context.orchestrator)
        self._published = -ARTIFACT_EVERY_S

    def update(self, *, at_end: bool = False) -> None:
        """Show the tally: on the screen as its reporter does, as an artifact at most once a minute, and at the end."""
        self._context.progress.table(self._tally.table, at_end=at_end)
        now = time.monotonic()
        if self._under_prefect and (at_end or now - self._published >= ARTIFACT_EVERY_S):
            from flows.progress_artifact import publish_progress

            publish_progress(self._context.dataset.name, self._tally.table())
            self._published = now

    def __enter__(self) -> Self:
        self.update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.update(at_end=True)
