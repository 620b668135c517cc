"""Pipelines: everything from a matrix to a report, and what an evaluation compares."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from esper.leyline.bandit import BanditSpec
from esper.leyline.controller_specs import TrialKeep
from esper.leyline.grid import Algorithm
from esper.leyline.spec_base import Spec


class PpoSettings(Spec):
    """How far PPO goes in a pipeline; what it is stands with the learner."""

    updates: Annotated[int, Field(ge=1)] = 10
    episodes_per_update: Annotated[int, Field(ge=1)] = 16
    env_seeds_per_update: Annotated[int, Field(ge=1)] = 4


class EvaluationCell(Spec):
    """The evaluation on one environment, or on all members of a family.

    Attributes:
        environment: An environment, a member of a family, or a family.
        env_seeds: Held-out seeds, of each member.
        selection_seeds: Seeds of each member on which the best fixed schedule is chosen, and policies are.
        bandit: The schedule bandit, another bar beside the best fixed schedule; left out, there is none.
        trials: Further rules: they try seeds, and keep one by hand or by its probe.
    """

    environment: str
    reward: str
    env_seeds: Annotated[int, Field(ge=2)]
    selection_seeds: Annotated[int, Field(ge=2)]
    bandit: BanditSpec | None = None
    trials: tuple[TrialKeep, ...] = ()


class ControlBounds(Spec):
    """What a healthy run shows on one environment or family; outside of it the engine is wrong."""

    environment: str
    never_act_percent: tuple[float, float] | None = None
    best_fixed_gain_points: tuple[float, float]
    best_fixed_lower_bound_points: float | None = None


class PipelineSpec(Spec):
    """From a matrix to a report.

    Attributes:
        algorithms: The learners, each by its own recipe.
        grid: Name of a grid, or a TOML file, in place of them.
        training_seed: The first controller seed.
        controller_seeds: How many there are; with several, policies are called `bc-s0`, `bc-s1`, ...
        ppo: How far PPO goes; `false` leaves it out.
        ppo_from: The learner from which PPO starts, trained from the first seed.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    matrix: str
    algorithms: tuple[Algorithm, ...] = ("bc", "iql", "cql")
    grid: str | None = None
    training_seed: Annotated[int, Field(ge=0)] = 0
    controller_seeds: Annotated[int, Field(ge=1)] = 1
    ppo: PpoSettings | None = PpoSettings()
    ppo_from: Literal["bc", "iql", "cql"] = "iql"
    evaluation: tuple[EvaluationCell, ...]
    controls: tuple[ControlBounds, ...] = ()

    @field_validator("ppo", mode="before")
    @classmethod
    def _no_ppo(cls, settings: object) -> object:
        return None if settings is False else settings

    @model_validator(mode="after")
    def _ppo_has_a_start(self) -> Self:
        if self.ppo is not None and self.grid is not None:
            raise ValueError("a grid names its own policies, from which PPO cannot choose; set ppo = false")
        if self.ppo is not None and self.ppo_from not in self.algorithms:
            raise ValueError(f"ppo_from {self.ppo_from!r} is not among the algorithms {self.algorithms}")
        return self
