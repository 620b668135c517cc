"""Matrices (which episodes to generate) and pipelines (everything from a matrix to a report)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.leyline.controller_specs import ELEVEN_BEHAVIOURS, ControllerSpec, ScheduleSampler, UniformRandom, behaviour
from esper.leyline.errors import SpecError
from esper.leyline.identity import SELECTION_START, EpisodeIdentity, Role, Root, check_replicate, env_seed
from esper.leyline.rewards import RewardSpec
from esper.leyline.spec_base import Spec
from esper.leyline.specs import EnvironmentSpec


class Cell(Spec):
    """One environment's row of a matrix: behaviours x epsilons, plus explorers, on `replicates` environment seeds."""

    environment: str
    reward: str
    behaviours: tuple[str, ...] = tuple(ELEVEN_BEHAVIOURS)
    epsilons: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0.0, 0.1, 0.2)
    temperature: Annotated[float, Field(gt=0)] | None = None
    repetitions: Annotated[int, Field(ge=1)] = 1
    explorers: Annotated[int, Field(ge=0)] = 0
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
        return self


class MatrixSpec(Spec):
    """Which episodes a dataset holds."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    cells: tuple[Cell, ...]

    @model_validator(mode="after")
    def _cells(self) -> Self:
        if not self.cells:
            raise ValueError("the matrix has no cells; add at least one [[cells]] table")
        names = [cell.environment for cell in self.cells]
        if len(set(names)) != len(names):
            raise ValueError(f"an environment appears in two cells: {names}")
        for cell in self.cells:
            if not cell.behaviours and not cell.explorers:
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


class CohortPlan(Spec):
    """All episodes of one environment and one environment seed that run together."""

    environment: EnvironmentSpec
    reward: RewardSpec
    replicate: int
    episodes: tuple[PlannedEpisode, ...]

    @model_validator(mode="after")
    def _roles(self) -> Self:
        for episode in self.episodes:
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


def plan_episodes(cell: Cell, environment: EnvironmentSpec, pool: str) -> tuple[PlannedEpisode, ...]:
    """Return the episodes of one cohort of a cell: the row of behaviours x epsilons, then the explorers."""
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
    if cell.explorers:
        sampler = ScheduleSampler(
            pool=pool,
            num_plans=cell.explorers,
            num_slots=environment.host.num_slots,
            max_birth_epoch=environment.horizon // 2,
        )
        planned += [PlannedEpisode(controller=sampler, repetition=plan) for plan in range(cell.explorers)]
    return tuple(planned)


class PpoSettings(Spec):
    """How far PPO goes in a pipeline; what it is stands with the learner."""

    updates: Annotated[int, Field(ge=1)] = 10
    episodes_per_update: Annotated[int, Field(ge=1)] = 16
    env_seeds_per_update: Annotated[int, Field(ge=1)] = 4


class EvaluationCell(Spec):
    """One environment's evaluation: held-out seeds, and the schedules among which the best fixed one is chosen."""

    environment: str
    reward: str
    env_seeds: Annotated[int, Field(ge=2)]
    selection_seeds: Annotated[int, Field(ge=2)]


class ControlBounds(Spec):
    """What a healthy run shows on one environment; outside of it the engine is wrong."""

    environment: str
    never_act_percent: tuple[float, float] | None = None
    best_fixed_gain_points: tuple[float, float]
    best_fixed_lower_bound_points: float | None = None


class PipelineSpec(Spec):
    """From a matrix to a report."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    matrix: str
    algorithms: tuple[Literal["bc", "iql", "cql"], ...] = ("bc", "iql", "cql")
    training_seed: int = 0
    ppo: PpoSettings | None = PpoSettings()
    ppo_from: Literal["bc", "iql", "cql"] = "iql"
    evaluation: tuple[EvaluationCell, ...]
    controls: tuple[ControlBounds, ...] = ()

    @model_validator(mode="after")
    def _ppo_has_a_start(self) -> Self:
        if self.ppo is not None and self.ppo_from not in self.algorithms:
            raise ValueError(f"ppo_from {self.ppo_from!r} is not among the algorithms {self.algorithms}")
        return self
