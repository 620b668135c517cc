"""Branching: what another action would have brought, from any state of a recorded episode.

A branch replays its parent's prefix from the nearest snapshot, forces actions, and lets a controller go on. It is an
episode of its own and stores its whole history: prefix rows are marked `replayed`, forced rows have no log-probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esper.leyline.actions import NUM_OPS, Actions, action_from_row, is_valid
from esper.leyline.errors import MaskError
from esper.leyline.matrix import CohortPlan, PlannedBranch, PlannedEpisode
from esper.tolaria.checkpoint import CheckpointSpec
from esper.tolaria.cohort import Cohort, Observation
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
        MaskError: A forced action is not valid in its state.
    """
    parent = run.plan.episodes[episode]
    then = then.model_copy(update={"root": parent.root})
    plan = CohortPlan(
        environment=run.plan.environment, reward=run.plan.reward, replicate=run.plan.replicate, episodes=(then,)
    )
    parent_id = run.recorder.identities[episode].episode_id
    forced = tuple(tuple(int(v) for v in row) for row in actions)
    identity = run.plan.branch_identity(PlannedBranch(parent=parent, step=step, forced=forced, then=then))
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
            decisions = _forced(forced[now - step], observation)
        observation, applied = cohort.step(decisions.actions_KA, observation)
        recorder.decided(decisions, applied)
    recorder.observed(observation)
    tables = recorder.tables(code_commit())
    return {**tables, "steps": _prefix_by(tables["steps"], parent)}


def _prefix_by(steps: pa.Table, parent: PlannedEpisode) -> pa.Table:
    """Give the replayed rows the epsilon and the temperature under which their actions were drawn: the parent's."""
    for name, value in (("epsilon", parent.epsilon), ("temperature", parent.temperature)):
        drawn = pc.if_else(steps["replayed"], pa.scalar(value, pa.float64()), steps[name])
        place = steps.schema.get_field_index(name)
        steps = steps.set_column(place, steps.schema.field(place), drawn)
    return steps


def run_with_branches(
    plan: CohortPlan, checkpoint: CheckpointSpec | None = None, kind: type[Cohort] = Cohort
) -> dict[str, pa.Table]:
    """Run a plan's episodes, then its branches; return the tables of both, sorted by (episode_id, step).

    Parents that are not among the episodes are run too; their own tables are left out.

    Args:
        plan: Episodes and branches.
        checkpoint: Where an interrupted run of the episodes goes on from.
        kind: What carries it out.

    Raises:
        LifecycleError: A parent ended before the step at which a branch leaves it.
        MaskError: A forced action is not valid in its state.
    """
    index = {name: place for place, name in enumerate(plan.episode_ids())}
    running = list(plan.episodes)
    for branch in plan.branches:
        name = plan.identity(branch.parent).episode_id
        if name not in index:
            index[name] = len(running)
            running.append(branch.parent)
    alone = plan.model_copy(update={"episodes": tuple(running), "branches": ()})
    run = CohortRun.of(alone, keep_snapshots=True, checkpoint=checkpoint, kind=kind)
    parts = [run.recorder.tables(code_commit())]
    for branch in plan.branches:
        rows = [np.array(row, dtype=np.int8) for row in branch.forced]
        parent = index[plan.identity(branch.parent).episode_id]
        parts.append(branch_episode(run, parent, branch.step, rows, branch.then))
    wanted = pa.array(plan.planned_ids(), pa.string())
    return {name: _joined(name, [part[name] for part in parts], wanted) for name in parts[0]}


def _joined(name: str, parts: Sequence[pa.Table], wanted: pa.Array) -> pa.Table:
    table = pa.concat_tables(parts)
    order = ("episode_id",) if name == "episodes" else ("episode_id", "step")
    kept = table.filter(pc.is_in(table["episode_id"], wanted))
    return kept.sort_by([(column, "ascending") for column in order])


def _forced(row: tuple[int, ...], observation: Observation) -> Decisions:
    action = np.array([row], dtype=np.int8)
    if not (is_valid(action, observation.mask_KT) | observation.done_K).all():
        ops = np.flatnonzero(observation.mask_KT[0, :NUM_OPS]).tolist()
        raise MaskError(
            f"the branch forces {action_from_row(action[0])} at step {observation.step}\n"
            f"  expected: an action that the state allows (valid ops {ops})"
        )
    undefined = np.full(1, np.nan)
    return Decisions(
        actions_KA=action,
        logp_K=undefined,
        op_probs=np.full((1, NUM_OPS), np.nan),
        plan_K=np.full(1, -1, dtype=np.int64),
    )
