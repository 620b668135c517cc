"""Matrices: which episodes to generate."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from esper.leyline.actions import (
    ACTION_WIDTH,
    MAX_SLOTS,
    SEED_LR_FACTORS,
    Action,
    Actions,
    Blend,
    Isolation,
    Op,
    action_from_row,
    is_canonical,
)
from esper.leyline.blueprint_names import blueprint_code, check_blueprint
from esper.leyline.controller_specs import (
    ELEVEN_BEHAVIOURS,
    ControllerSpec,
    ScheduleSampler,
    TrialKeep,
    UniformRandom,
    behaviour,
)
from esper.leyline.errors import SpecError, UnknownNameError
from esper.leyline.host_specs import BLUEPRINTS, Topology
from esper.leyline.identity import SELECTION_START, EpisodeIdentity, Role, Root, check_replicate, env_seed
from esper.leyline.rewards import RewardSpec
from esper.leyline.spec_base import Spec
from esper.leyline.specs import EnvironmentSpec


class Cell(Spec):
    """One environment's row of a matrix: behaviours and trials x epsilons, plus explorers, on `replicates` env_seeds.

    Where there are no trials the cell has the id of one before there were any.
    """

    environment: str
    reward: str
    behaviours: tuple[str, ...] = tuple(ELEVEN_BEHAVIOURS)
    epsilons: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0.0, 0.1, 0.2)
    temperature: Annotated[float, Field(gt=0)] | None = None
    repetitions: Annotated[int, Field(ge=1)] = 1
    explorers: Annotated[int, Field(ge=0)] = 0
    trials: tuple[TrialKeep, ...] = ()
    first_replicate: Annotated[int, Field(ge=0)] = 0
    replicates: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for name in ("behaviours", "epsilons"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names something twice: {list(values)}")
        if self.first_replicate + self.replicates > SELECTION_START:
            raise ValueError(
                f"replicates reach {self.first_replicate + self.replicates}; data ends at {SELECTION_START}"
            )
        trials = [trial.name for trial in self.trials]
        if len(set(trials)) != len(trials) or set(trials) & set(ELEVEN_BEHAVIOURS):
            raise ValueError(f"trials {trials} need names of their own")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_trials(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if not self.trials:
            fields.pop("trials", None)
        return fields


_LEVERS = ("blueprint", "blend", "tempo_epochs", "dwell_epochs", "isolation", "seed_lr_factor")


class ForcedAction(Spec):
    """One action in words. What its op does not read must be left out; a lever that is left out has its default.

    The blueprint is one of the host's topology; that is checked where the row is made.
    """

    op: Literal["WAIT", "GERMINATE", "ADVANCE", "FOSSILIZE", "PRUNE"]
    slot: Annotated[int, Field(ge=0, lt=MAX_SLOTS)] | None = None
    blueprint: str | None = None
    blend: Blend | None = None
    tempo_epochs: Literal[3, 5, 8, 12] | None = None
    dwell_epochs: Literal[1, 2, 3, 5] | None = None
    isolation: Isolation | None = None
    seed_lr_factor: float | None = None

    @model_validator(mode="after")
    def _reads(self) -> Self:
        if (self.slot is None) != (self.op == "WAIT"):
            raise ValueError(f"{self.op} {'needs a slot' if self.slot is None else 'reads no slot'}")
        given = [name for name in _LEVERS if getattr(self, name) is not None]
        if self.op != "GERMINATE" and given:
            raise ValueError(f"{self.op} does not read {', '.join(given)}")
        if self.op == "GERMINATE":
            try:
                check_blueprint(str(self.blueprint))
            except UnknownNameError as error:
                raise ValueError(str(error)) from None
        if self.seed_lr_factor is not None and self.seed_lr_factor not in SEED_LR_FACTORS:
            raise ValueError(f"seed_lr_factor {self.seed_lr_factor} is not one of {SEED_LR_FACTORS}")
        return self

    def to_row(self, topology: Topology) -> Actions:
        """Return the canonical int8 [A] row on a host of that topology.

        Raises:
            UnknownNameError: The topology does not have the blueprint.
        """
        given = {name: getattr(self, name) for name in _LEVERS[1:] if getattr(self, name) is not None}
        if self.blueprint is not None:
            given["blueprint"] = blueprint_code(self.blueprint, topology)
        return Action(op=Op[self.op], slot=self.slot or 0, **given).to_row()

    @classmethod
    def of_row(cls, row: Actions, topology: Topology) -> Self:
        """Return the words of a canonical row on a host of that topology."""
        action = action_from_row(row)
        if action.op is Op.WAIT:
            return cls(op="WAIT")
        levers = {name: getattr(action, name) for name in _LEVERS} if action.op is Op.GERMINATE else {}
        if levers:
            levers["blueprint"] = BLUEPRINTS[topology][action.blueprint]
        return cls.model_validate({"op": action.op.name, "slot": action.slot, **levers})


class BranchActor(Spec):
    """Who acts before a branching, or after it.

    Attributes:
        controller: A behaviour, `never-act`, before it `schedule-sampler` too, after it `complete` too: every live
            seed is advanced and fossilised as soon as it can be.
        epsilon: As in a cell; `random` has 1, whatever else is left out 0.
        temperature: As in a cell.
        repetition: As in a cell; for the schedule-sampler the plan.
        pool: The pool of the schedule-sampler: the name of the matrix that planned it.
    """

    controller: str = "never-act"
    epsilon: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    repetition: Annotated[int, Field(ge=0)] = 0
    pool: str | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.controller not in ("never-act", "complete", "schedule-sampler"):
            behaviour(self.controller)
        if (self.pool is None) == (self.controller == "schedule-sampler"):
            raise ValueError(f"controller {self.controller!r}: the schedule-sampler needs a pool, no other has one")
        return self


class Branch(Spec):
    """One branching: leave a parent at a step by a forced action, and let somebody go on."""

    environment: str
    reward: str
    replicate: Annotated[int, Field(ge=0, lt=SELECTION_START)]
    step: Annotated[int, Field(ge=0)]
    parent: BranchActor = BranchActor()
    action: ForcedAction
    then: BranchActor = BranchActor(controller="complete")

    @model_validator(mode="after")
    def _places(self) -> Self:
        if self.parent.controller == "complete":
            raise ValueError("'complete' goes on after a branching; a parent is a behaviour or never-act")
        if self.then.controller == "schedule-sampler":
            raise ValueError("the schedule-sampler cannot go on after a branching; use 'complete'")
        return self


class MatrixSpec(Spec):
    """Which episodes a dataset holds."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    cells: tuple[Cell, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def spec_id(self) -> str:
        """The id; without branchings that of the matrix before there were any."""
        return self.id_without() if self.branches else self.id_without("branches")

    @model_validator(mode="after")
    def _branches(self) -> Self:
        if len(set(self.branches)) != len(self.branches):
            raise ValueError("a branching is named twice")
        rewards = {cell.environment: cell.reward for cell in self.cells}
        for branch in self.branches:
            if rewards.setdefault(branch.environment, branch.reward) != branch.reward:
                raise ValueError(
                    f"environment {branch.environment!r} has two rewards: "
                    f"{rewards[branch.environment]!r} and {branch.reward!r}"
                )
        return self

    @model_validator(mode="after")
    def _cells(self) -> Self:
        if not self.cells and not self.branches:
            raise ValueError("the matrix has no cells; add at least one [[cells]] or [[branches]] table")
        names = [cell.environment for cell in self.cells]
        if len(set(names)) != len(names):
            raise ValueError(f"an environment appears in two cells: {names}")
        for cell in self.cells:
            if not cell.behaviours and not cell.explorers and not cell.trials:
                raise ValueError(f"cell {cell.environment!r} plans no episode")
            for name in cell.behaviours:
                behaviour(name)
        return self


class PlannedEpisode(Spec):
    """One episode to run in a cohort."""

    controller: ControllerSpec
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] | None = None
    repetition: Annotated[int, Field(ge=0)] = 0
    root: str = Root.HOST.value
    role: Role = Role.DATA


class PlannedBranch(Spec):
    """One episode that leaves another one, its parent, at a step by forced actions: canonical rows, one per step."""

    parent: PlannedEpisode
    step: Annotated[int, Field(ge=0)]
    forced: tuple[tuple[int, ...], ...]
    then: PlannedEpisode

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        for row in self.forced:
            if len(row) != ACTION_WIDTH or not is_canonical(np.array([row])).all():
                raise ValueError(f"forced action {row} is not a canonical row of {ACTION_WIDTH} numbers")
        return self


class CohortPlan(Spec):
    """All episodes of one environment and one environment seed that run together.

    A branch's parent need not be among the episodes: it is then run, and not stored.
    """

    environment: EnvironmentSpec
    reward: RewardSpec
    replicate: int
    episodes: tuple[PlannedEpisode, ...]
    branches: tuple[PlannedBranch, ...] = ()

    @model_validator(mode="after")
    def _roles(self) -> Self:
        for episode in (*self.episodes, *(actor for b in self.branches for actor in (b.parent, b.then))):
            try:
                check_replicate(self.replicate, episode.role)
            except SpecError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def env_seed(self) -> int:
        """The environment seed."""
        return env_seed(self.environment.task.task_id, self.replicate)

    def identity(self, episode: PlannedEpisode) -> EpisodeIdentity:
        """Return the identity of one of the episodes."""
        return EpisodeIdentity(
            environment_id=self.environment.spec_id,
            env_seed=self.env_seed,
            root=episode.root,
            controller_id=episode.controller.spec_id,
            epsilon=episode.epsilon,
            temperature=episode.temperature,
            repetition=episode.repetition,
        )

    def episode_ids(self) -> list[str]:
        """Return the ids of the episodes, in order."""
        return [self.identity(episode).episode_id for episode in self.episodes]

    def branch_identity(self, branch: PlannedBranch) -> EpisodeIdentity:
        """Return the identity of a branch: that of who goes on, from the parent's root, and where it left whom."""
        goes_on = branch.then.model_copy(update={"root": branch.parent.root})
        parent_id = self.identity(branch.parent).episode_id
        return replace(self.identity(goes_on), branch=(parent_id, branch.step, branch.forced))

    def branch_ids(self) -> list[str]:
        """Return the ids of the branches, in order."""
        return [self.branch_identity(branch).episode_id for branch in self.branches]

    def planned_ids(self) -> list[str]:
        """Return the ids of everything that is stored: the episodes, then the branches."""
        return [*self.episode_ids(), *self.branch_ids()]

    @property
    def num_planned(self) -> int:
        """Episodes and branches."""
        return len(self.episodes) + len(self.branches)


def explorer(pool: str, num_plans: int, environment: EnvironmentSpec) -> ScheduleSampler:
    """Return the schedule-sampler of a pool in an environment: it plans for the slots that may be used."""
    return ScheduleSampler(
        pool=pool,
        num_plans=num_plans,
        num_slots=int(environment.enabled_slots.sum()),
        max_birth_epoch=environment.horizon // 2,
    )


def plan_episodes(cell: Cell, environment: EnvironmentSpec, pool: str) -> tuple[PlannedEpisode, ...]:
    """Return the episodes of one cohort of a cell: behaviours x epsilons, trials x epsilons, then the explorers."""
    planned = []
    for name in cell.behaviours:
        spec = behaviour(name)
        epsilons = (1.0,) if isinstance(spec, UniformRandom) else cell.epsilons
        for epsilon in epsilons:
            for repetition in range(cell.repetitions):
                temperature = None if isinstance(spec, UniformRandom) else cell.temperature
                planned.append(
                    PlannedEpisode(controller=spec, epsilon=epsilon, temperature=temperature, repetition=repetition)
                )
    planned += [
        PlannedEpisode(controller=trial, epsilon=epsilon, repetition=repetition)
        for trial in cell.trials
        for epsilon in cell.epsilons
        for repetition in range(cell.repetitions if epsilon else 1)
    ]
    if cell.explorers:
        sampler = explorer(pool, cell.explorers, environment)
        planned += [PlannedEpisode(controller=sampler, repetition=plan) for plan in range(cell.explorers)]
    return tuple(planned)
