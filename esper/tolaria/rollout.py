"""The one loop: every controller, heuristic, random, scheduled or learned, drives cohorts through this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper.leyline.actions import ACTION_WIDTH, NUM_OPS, Op, is_valid
from esper.leyline.errors import MaskError, SpecError
from esper.leyline.keys import numpy_generator
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.protocols import BLOCK_ROWS, ActInputs, Carry, Controller, EpisodeStart
from esper.leyline.tree import NUM_UNIFORMS
from esper.tamiyo.registry import build_controller
from esper.tolaria.checkpoint import CheckpointSpec, has_checkpoint, load_run, remove_checkpoint, save_cohort
from esper.tolaria.cohort import Cohort, Observation
from esper.tolaria.executor import Executor
from esper.tolaria.recorder import Decisions, Recorder
from esper.tolaria.runtime import code_commit
from esper.tolaria.transitions import Applied

Watch = Callable[[Cohort, Applied | None], object]
"""Is shown a cohort when it begins or goes on (None), then after every step with what became of the actions."""


@dataclass(slots=True)
class _Group:
    """The episodes that one controller drives, and its memory of them."""

    controller: Controller
    rows: NDArray[np.int64]
    carry: Carry


@dataclass(slots=True)
class Crew:
    """The controllers of a cohort: asks each for its episodes, in blocks of BLOCK_ROWS padded rows."""

    plan: CohortPlan
    horizon: int
    groups: list[_Group] = field(default_factory=list)
    uniforms: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0, 0)))

    def begin(self) -> None:
        """Build the controllers, start their memories and draw every episode's keyed noise."""
        members: dict[str, list[int]] = {}
        for index, episode in enumerate(self.plan.episodes):
            members.setdefault(episode.controller.spec_id, []).append(index)
        for indices in members.values():
            controller = build_controller(self.plan.episodes[indices[0]].controller)
            for start in range(0, len(indices), BLOCK_ROWS):
                rows = np.array(indices[start : start + BLOCK_ROWS])
                starts = [self._start(self.plan.episodes[row]) for row in _pad(rows)]
                self.groups.append(_Group(controller, rows, controller.start(starts)))
        self.uniforms = np.stack([self._noise(episode) for episode in self.plan.episodes])

    def _start(self, episode: PlannedEpisode) -> EpisodeStart:
        return EpisodeStart(
            environment=self.plan.environment,
            replicate=self.plan.replicate,
            repetition=episode.repetition,
            epsilon=episode.epsilon,
            temperature=episode.temperature,
        )

    def _noise(self, episode: PlannedEpisode) -> NDArray[np.float64]:
        """Uniform draws [horizon, NUM_UNIFORMS] keyed by (env_seed, controller, epsilon, temperature, repetition)."""
        key = (episode.controller.spec_id, episode.epsilon, episode.temperature, episode.repetition)
        return numpy_generator(self.plan.env_seed, "behaviour", *key).random((self.horizon, NUM_UNIFORMS))

    @property
    def carries(self) -> list[Carry]:
        """The memory of every group, in order."""
        return [group.carry for group in self.groups]

    @carries.setter
    def carries(self, carries: Sequence[Carry]) -> None:
        for group, carry in zip(self.groups, carries, strict=True):
            group.carry = carry

    def decide(self, observation: Observation) -> Decisions:
        """Return every episode's decision (WAIT for those that have ended).

        Raises:
            MaskError: A controller returned an action that its mask does not allow.
        """
        num = len(self.plan.episodes)
        actions = np.zeros((num, ACTION_WIDTH), dtype=np.int8)
        logp, plans = np.zeros(num), np.full(num, -1, dtype=np.int64)
        op_probs = np.zeros((num, NUM_OPS))
        op_probs[:, Op.WAIT] = 1.0
        for group in self.groups:
            if observation.done_K[group.rows].all():
                continue
            padded = _pad(group.rows)
            inputs = ActInputs(
                columns=dict(zip(FEATURE_COLUMNS, observation.matrix[padded].T)),
                step_N=np.full(BLOCK_ROWS, observation.step),
                mask_NT=observation.mask_KT[padded],
                uniforms=self.uniforms[padded, observation.step],
            )
            decision = group.controller.act(inputs, group.carry)
            count = len(group.rows)
            group.carry = decision.carry
            actions[group.rows] = decision.actions_NA[:count]
            logp[group.rows] = decision.logp_N[:count]
            op_probs[group.rows] = decision.op_probs[:count]
            if decision.plan_N is not None:
                plans[group.rows] = decision.plan_N[:count]
            self._check(group, observation, actions)
        return Decisions(actions_KA=actions, logp_K=logp, op_probs=op_probs, plan_K=plans)

    def _check(self, group: _Group, observation: Observation, actions: NDArray[np.int8]) -> None:
        good = is_valid(actions[group.rows], observation.mask_KT[group.rows]) | observation.done_K[group.rows]
        if not good.all():
            row = group.rows[int(np.flatnonzero(~good)[0])]
            raise MaskError(
                f"controller {group.controller.name!r} chose {actions[row].tolist()} at step {observation.step}\n"
                f"  expected: a canonical action that its mask allows (valid ops "
                f"{np.flatnonzero(observation.mask_KT[row, :NUM_OPS]).tolist()})"
            )


def _pad(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Repeat the first row up to BLOCK_ROWS: a row's result must not depend on how many others there are."""
    return np.concatenate([rows, np.full(BLOCK_ROWS - len(rows), rows[0])])


@dataclass(slots=True)
class CohortRun:
    """A plan, the cohort that carries it out and what was recorded of it."""

    plan: CohortPlan
    cohort: Cohort
    recorder: Recorder

    @classmethod
    def of(
        cls,
        plan: CohortPlan,
        executor: Executor | None = None,
        keep_snapshots: bool = False,
        checkpoint: CheckpointSpec | None = None,
        watch: Watch | None = None,
        kind: type[Cohort] = Cohort,
    ) -> Self:
        """Run a plan to its end; with a checkpoint, go on from it where it is there, and write it as the run proceeds.

        Raises:
            SpecError: The checkpoint belongs to another plan or another version.
            IntegrityError: The checkpoint is damaged.
        """
        crew = Crew(plan, plan.environment.horizon)
        crew.begin()
        if checkpoint is not None and has_checkpoint(checkpoint.folder):
            run = cls._resumed(plan, crew, executor, checkpoint.folder)
            observation = run.cohort.observe()
        else:
            cohort = kind(plan.environment, plan.env_seed, [e.root for e in plan.episodes], executor, keep_snapshots)
            run = cls(plan, cohort, Recorder(cohort, plan, [plan.identity(episode) for episode in plan.episodes]))
            observation = cohort.reset()
        cohort, recorder = run.cohort, run.recorder
        if watch is not None:
            watch(cohort, None)
        while not cohort.done:
            recorder.observed(observation)
            decisions = crew.decide(observation)
            observation, applied = cohort.step(decisions.actions_KA, observation)
            recorder.decided(decisions, applied)
            if watch is not None:
                watch(cohort, applied)
            if checkpoint is not None and checkpoint.is_due(cohort):
                beside = {"plan": plan.spec_id, "carries": crew.carries, "moments": recorder.moments}
                save_cohort(cohort, checkpoint.folder, beside)
        recorder.observed(observation)
        return run

    @classmethod
    def _resumed(cls, plan: CohortPlan, crew: Crew, executor: Executor | None, folder: Path) -> Self:
        """The run as it was when its checkpoint was written; the crew gets its memories back."""
        cohort, beside = load_run(folder, executor)
        if beside.get("plan") != plan.spec_id:
            raise SpecError(
                f"checkpoint {folder} belongs to another plan\n  expected: a folder of its own for every plan"
            )
        crew.carries = beside["carries"]
        recorder = Recorder(cohort, plan, [plan.identity(episode) for episode in plan.episodes])
        recorder.moments = beside["moments"]
        return cls(plan, cohort, recorder)


def run_cohort(
    plan: CohortPlan, checkpoint: CheckpointSpec | None = None, kind: type[Cohort] = Cohort
) -> dict[str, pa.Table]:
    """Run all episodes of a plan together, then its branches.

    Returns `steps`, `costs` and `episodes` without the commit columns. Same plan, same bytes in every deterministic
    column, whatever else runs beside it and wherever it was interrupted. An episode's rows do not depend on which
    other episodes the plan holds.

    Args:
        plan: What to run.
        checkpoint: Where to keep what an interrupted run goes on from, by itself; removed at the end. The episodes
            are kept, a run that is interrupted among its branches begins those anew.
        kind: What carries it out.
    """
    if plan.branches:
        from esper.tolaria.branching import run_with_branches  # it is built on CohortRun

        tables = run_with_branches(plan, checkpoint, kind)
    else:
        tables = CohortRun.of(plan, checkpoint=checkpoint, kind=kind).recorder.tables(code_commit())
    if checkpoint is not None:
        remove_checkpoint(checkpoint.folder)
    return tables
