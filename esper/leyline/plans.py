"""From a matrix to the cohorts that carry it out."""

from __future__ import annotations

from esper.leyline.controller_specs import (
    ControllerSpec,
    FixedSchedule,
    NeverAct,
    UniformRandom,
    behaviour,
)
from esper.leyline.errors import SpecError
from esper.leyline.library import load, load_environment, load_environments
from esper.leyline.matrix import (
    Branch,
    BranchActor,
    CohortPlan,
    MatrixSpec,
    PlannedBranch,
    PlannedEpisode,
    explorer,
    plan_episodes,
)
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec

COMPLETE = FixedSchedule(name="complete", plants=())
"""Who goes on after a branching to the end of every seed's life: ADVANCE and FOSSILIZE as soon as they are valid."""

MAX_PLANS = 10_000
"""Plans of a pool to which the parent of a branching may belong; the number has no part in its id."""


def expand(matrix: MatrixSpec) -> list[CohortPlan]:
    """Return one cohort per environment and replicate: the cells' in matrix order, then those of branchings alone.

    A cell of a family has a row of cohorts for each of its members. The parents of branchings are episodes of their
    cohorts, so that no branch is stored without its parent.

    Raises:
        UnknownNameError: An environment or a reward is unknown.
        SpecError: An environment is in two cells, once by name and once in its family; it has two rewards; a
            branching leaves after the last step, or forces a slot that the host does not have.
    """
    plans: dict[tuple[str, int], CohortPlan] = {}
    taken: set[str] = set()
    for cell in matrix.cells:
        reward = load("rewards", cell.reward, RewardSpec)
        for environment in load_environments(cell.environment):
            if environment.name in taken:
                raise SpecError(f"matrix {matrix.name!r}: environment {environment.name!r} is in two cells")
            taken.add(environment.name)
            episodes = plan_episodes(cell, environment, pool=matrix.name)
            first = cell.first_replicate
            for replicate in range(first, first + cell.replicates):
                plans[environment.name, replicate] = CohortPlan(
                    environment=environment, reward=reward, replicate=replicate, episodes=episodes
                )
    for branch in matrix.branches:
        plan = _empty(branch)
        key = (plan.environment.name, branch.replicate)
        before = plans.get(key, plan)
        if before.reward != plan.reward:
            raise SpecError(
                f"matrix {matrix.name!r}: environment {plan.environment.name!r} has two rewards: "
                f"{before.reward.name!r} and {plan.reward.name!r}"
            )
        plans[key] = _with_branch(before, branch)
    return list(plans.values())


def _empty(branch: Branch) -> CohortPlan:
    environment = load_environment(branch.environment)
    reward = load("rewards", branch.reward, RewardSpec)
    return CohortPlan(environment=environment, reward=reward, replicate=branch.replicate, episodes=())


def _with_branch(plan: CohortPlan, branch: Branch) -> CohortPlan:
    planned = plan_branch(branch, plan.environment)
    known = plan.identity(planned.parent).episode_id in plan.episode_ids()
    episodes = plan.episodes if known else (*plan.episodes, planned.parent)
    return plan.model_copy(update={"episodes": episodes, "branches": (*plan.branches, planned)})


def plan_branch(branch: Branch, environment: EnvironmentSpec) -> PlannedBranch:
    """Return the branch as a cohort of the environment carries it out.

    Raises:
        SpecError: It leaves after the last step, or forces a slot or a blueprint that the host does not have.
    """
    where = f"branching of {branch.parent.controller!r} in {environment.name!r}, replicate {branch.replicate}"
    if branch.step >= environment.horizon:
        raise SpecError(f"{where}: step {branch.step}\n  expected: 0 to {environment.horizon - 1}")
    if (branch.action.slot or 0) >= environment.host.num_slots:
        raise SpecError(f"{where}: slot {branch.action.slot}\n  expected: 0 to {environment.host.num_slots - 1}")
    return PlannedBranch(
        parent=plan_actor(branch.parent, environment),
        step=branch.step,
        forced=(tuple(int(value) for value in branch.action.to_row(environment.host.topology)),),
        then=plan_actor(branch.then, environment),
    )


def plan_actor(actor: BranchActor, environment: EnvironmentSpec) -> PlannedEpisode:
    """Return an actor of a branching as an episode; a parent gets the identity that its cell gave it."""
    controller = _controller(actor, environment)
    default = 1.0 if isinstance(controller, UniformRandom) else 0.0
    return PlannedEpisode(
        controller=controller,
        epsilon=default if actor.epsilon is None else actor.epsilon,
        temperature=actor.temperature,
        repetition=actor.repetition,
    )


def _controller(actor: BranchActor, environment: EnvironmentSpec) -> ControllerSpec:
    if actor.controller == "never-act":
        return NeverAct()
    if actor.controller == "complete":
        return COMPLETE
    if actor.pool is not None:
        return explorer(actor.pool, MAX_PLANS, environment)
    return behaviour(actor.controller)
