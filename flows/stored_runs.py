"""Cohorts whose episodes a dataset holds already are read instead of run: the same spec gives the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from esper.karn import delta
from esper.karn.tables import attempt_keys, last_attempts
from esper.leyline.schema import SCHEMAS
from flows.context import cohort_name
from flows.planning import remaining

if TYPE_CHECKING:
    from esper.leyline.matrix import CohortPlan
    from esper.tolaria.workers import Tables
    from flows.context import Context

_TABLES = ("episodes", "steps")


class StoredRuns:
    """What a dataset held when an evaluation began."""

    def __init__(self, context: Context, columns: Mapping[str, Sequence[str]]) -> None:
        """Note which episodes there are.

        Args:
            context: The run.
            columns: What is read of `episodes` and of `steps`, with `episode_id`.
        """
        self._context = context
        self._columns = columns
        self._known = context.dataset.episode_ids(failed=False)

    def run(self, task: str, plans: Sequence[CohortPlan]) -> list[Tables]:
        """Return the tables of the cohorts in plan order; only what is missing is run, and every cohort counts once.

        Args:
            task: What they are for: their units of progress.
            plans: The cohorts.
        """
        fresh = iter(self._context.run_plans(task, remaining(plans, self._known), counted=True))
        found = []
        for plan in plans:
            held = [name for name in plan.planned_ids() if name in self._known]
            ran = [next(fresh)] if len(held) < plan.num_planned else []
            if not ran:
                self._context.progress.advance(task, f"{cohort_name(plan)}: stored already")
            parts = [*ran, *([self._read(held)] if held else [])]
            found.append(parts[0] if len(parts) == 1 else _joined(parts, self._columns))
        return found

    def _read(self, ids: Sequence[str]) -> Tables:
        wanted = pa.array(sorted(ids), pa.string())
        return {name: table.filter(pc.is_in(table["episode_id"], wanted)) for name, table in self._stored.items()}

    @cached_property
    def _stored(self) -> Tables:
        """The last attempts of the episodes that were known, and their steps."""
        key = ["episode_id", "attempt", "commit_id"]
        known = pa.array(sorted(self._known), pa.string())
        root = self._context.dataset.path
        read = {
            name: delta.read_current(root / name, name, list(dict.fromkeys([*key, *self._columns[name]])))
            for name in _TABLES
        }
        episodes = last_attempts(read["episodes"])
        episodes = episodes.filter(pc.is_in(episodes["episode_id"], known))
        steps = read["steps"].filter(pc.is_in(attempt_keys(read["steps"]), attempt_keys(episodes)))
        return {"episodes": episodes.select(self._columns["episodes"]), "steps": steps.select(self._columns["steps"])}


def _joined(parts: Sequence[Tables], columns: Mapping[str, Sequence[str]]) -> Tables:
    """Rows of what was run and what was stored, typed as the schema has them."""
    joined = {}
    for name in _TABLES:
        fields = pa.schema([SCHEMAS[name].field(column) for column in columns[name]])
        joined[name] = pa.concat_tables([part[name].select(columns[name]).cast(fields) for part in parts])
    return joined
