"""Branching: what another action would have brought, from any state of a recorded episode.

A branch replays its parent's prefix from the nearest snapshot, forces actions, and lets a controller go on. It is an
episode of its own and stores its whole history: prefix rows are marked `replayed`, forced rows have no log-probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from esper.leyline.actions import NUM_OPS, Actions
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.tolaria.recorder import BranchMark, Decisions, Recorder
from esper.tolaria.rollout import CohortRun, Crew
from esper.tolaria.runtime import code_commit


def branch_episode(
    run: CohortRun, episode: int, step: int, actions: Sequence[Actions], then: PlannedEpisode
) -> dict[str, pa.Table]:
    """Return the tables of the episode that leaves `episode` at `step` with the given actions.

    Args:
        run: A run that kept snapshots.
        episode: Index of the parent in the plan.
        step: The decision at which the first action is forced.
        actions: Canonical int8 [8] rows, one per step from `step` on.
        then: Who goes on; it has watched the whole prefix. Its root is the parent's.

    Raises:
        LifecycleError: The run kept no snapshots, or the parent never reached the step.
    """
    parent = run.plan.episodes[episode]
    then = then.model_copy(update={"root": parent.root})
    plan = CohortPlan(
        environment=run.plan.environment, reward=run.plan.reward, replicate=run.plan.replicate, episodes=(then,)
    )
    parent_id = run.recorder.identities[episode].episode_id
    forced = tuple(tuple(int(v) for v in row) for row in actions)
    identity = replace(plan.identity(then), branch=(parent_id, step, forced))
    mark = BranchMark(parent=parent_id, step=step, num_forced=len(forced), parent_actor=parent.controller.name)
    cohort = run.cohort.branch(episode, step)
    moments = [moment.of(episode) for moment in run.recorder.moments]
    recorder = Recorder(cohort, plan, [identity], branch=mark, moments=moments[: cohort.step_index])
    crew = Crew(plan, plan.environment.horizon)
    crew.begin()
    for moment in recorder.moments:
        crew.decide(moment.observation)
    observation = cohort.observe()
    while not cohort.done:
        recorder.observed(observation)
        now = cohort.step_index
        if now <= step:
            recorder.moments[-1].costs = moments[now].costs
        decisions = crew.decide(observation)
        if now < step:
            decisions = moments[now].decisions or decisions
        elif now < step + len(forced):
            decisions = _forced(forced[now - step])
        observation, applied = cohort.step(decisions.actions_KA, observation)
        recorder.decided(decisions, applied)
    recorder.observed(observation)
    return recorder.tables(code_commit())


def _forced(row: tuple[int, ...]) -> Decisions:
    undefined = np.full(1, np.nan)
    return Decisions(
        actions_KA=np.array([row], dtype=np.int8),
        logp_K=undefined,
        op_probs=np.full((1, NUM_OPS), np.nan),
        plan_K=np.full(1, -1, dtype=np.int64),
    )
