"""The one loop: every controller, heuristic, random, scheduled or learned, drives cohorts through this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper.leyline.actions import ACTION_WIDTH, NUM_OPS, Op, is_valid
from esper.leyline.errors import MaskError
from esper.leyline.keys import numpy_generator
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.protocols import BLOCK_ROWS, ActInputs, Carry, Controller, EpisodeStart
from esper.leyline.tree import NUM_UNIFORMS
from esper.tamiyo.registry import build_controller
from esper.tolaria.cohort import Cohort, Observation
from esper.tolaria.executor import Executor
from esper.tolaria.recorder import Decisions, Recorder
from esper.tolaria.runtime import code_commit


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
    def of(cls, plan: CohortPlan, executor: Executor | None = None, keep_snapshots: bool = False) -> Self:
        """Run a plan to its end."""
        roots = [episode.root for episode in plan.episodes]
        cohort = Cohort(plan.environment, plan.env_seed, roots, executor, keep_snapshots)
        recorder = Recorder(cohort, plan, [plan.identity(episode) for episode in plan.episodes])
        crew = Crew(plan, plan.environment.horizon)
        crew.begin()
        observation = cohort.reset()
        while not cohort.done:
            recorder.observed(observation)
            decisions = crew.decide(observation)
            observation, applied = cohort.step(decisions.actions_KA, observation)
            recorder.decided(decisions, applied)
        recorder.observed(observation)
        return cls(plan, cohort, recorder)


def run_cohort(plan: CohortPlan) -> dict[str, pa.Table]:
    """Run all episodes of a plan together, then its branches.

    Returns `steps`, `costs` and `episodes` without the commit columns. Same plan, same bytes in every deterministic
    column, whatever else runs beside it. An episode's rows do not depend on which other episodes the plan holds.
    """
    if plan.branches:
        from esper.tolaria.branching import run_with_branches  # it is built on CohortRun

        return run_with_branches(plan)
    return CohortRun.of(plan).recorder.tables(code_commit())
