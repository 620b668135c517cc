"""A contest: arms that meet on every environment seed of an environment, or of every member of a family.

On a family an environment seed is a block: the mean over the members, whose hosts train on the same batches from keyed
weights. Seeds are what is drawn independently, so blocks are what intervals are made from. (A bootstrap with the
seeds as clusters draws whole blocks: for a mean it is the same.) A block counts where all its members do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from esper.leyline.errors import ControlError, IntegrityError
from esper.leyline.library import load, load_environments
from esper.leyline.matrix import CohortPlan
from esper.leyline.pipelines import EvaluationCell
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec
from esper.simic.arms import Arm, CellOutcomes, Floats, cell_outcomes

Runner = Callable[[Sequence[CohortPlan]], list[dict[str, pa.Table]]]
"""Carries out cohorts; results in plan order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Where a contest is held: one environment, or all members of a family, under one reward."""

    cell: EvaluationCell
    name: str
    members: tuple[EnvironmentSpec, ...]
    reward: RewardSpec

    @property
    def is_family(self) -> bool:
        """Whether there are several members."""
        return len(self.members) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """The arms on one environment, and one cohort per environment seed."""

    environment: EnvironmentSpec
    arms: tuple[Arm, ...]
    plans: tuple[CohortPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """A meeting of the same arms on every member of a field."""

    field: Field
    meetings: tuple[Meeting, ...]

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms, as the first member has them."""
        return self.meetings[0].arms

    @property
    def plans(self) -> list[CohortPlan]:
        """All cohorts, member by member."""
        return [plan for meeting in self.meetings for plan in meeting.plans]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What a contest came to: per member, and in blocks of all members.

    Attributes:
        members: Every seed that counts on that member.
        blocks: The seeds that count on all members, per member.
    """

    members: tuple[CellOutcomes, ...]
    blocks: tuple[CellOutcomes, ...]

    @classmethod
    def of(cls, members: Sequence[CellOutcomes]) -> Outcomes:
        """Return the outcomes of a contest from those of its members."""
        common = [r for r in members[0].replicates if all(r in member.replicates for member in members)]
        return cls(members=tuple(members), blocks=tuple(member.on(common) for member in members))

    @property
    def num_env_seeds(self) -> int:
        """Environment seeds that count on all members."""
        return self.blocks[0].num_env_seeds

    @property
    def num_control_invalid(self) -> int:
        """Trunks that were not valid, over all members."""
        return sum(member.num_control_invalid for member in self.members)

    @property
    def num_failed(self) -> int:
        """Episodes that failed, over all members."""
        return sum(member.num_failed for member in self.members)

    def values(self, arm: str, field: str) -> Floats:
        """Return the mean over the members of one field of an arm's outcomes, float64 [environment seeds]."""
        mean: Floats = np.mean([block.values(arm, field) for block in self.blocks], axis=0)
        return mean

    def count(self, arm: str, field: str) -> int:
        """Return in how many episodes of an arm a field is true."""
        return int(sum(block.values(arm, field).sum() for block in self.blocks))

    def member(self, index: int) -> Outcomes:
        """Return the outcomes of one member as if it had been alone."""
        return Outcomes.of([self.members[index]])


def open_field(cell: EvaluationCell) -> Field:
    """Return where a cell's contests are held.

    Raises:
        UnknownNameError: The environment, the family or the reward is unknown.
    """
    members = load_environments(cell.environment)
    name = members[0].name if len(members) == 1 else cell.environment
    return Field(cell=cell, name=name, members=members, reward=load("rewards", cell.reward, RewardSpec))


def contest(field: Field, arms_of: Callable[[EnvironmentSpec], Sequence[Arm]], replicates: range) -> Contest:
    """Plan one cohort per member and environment seed, with every distinct episode of the arms."""
    meetings = []
    for environment in field.members:
        arms = tuple(arms_of(environment))
        plans = tuple(_cohort(field, environment, arms, replicate) for replicate in replicates)
        meetings.append(Meeting(environment=environment, arms=arms, plans=plans))
    return Contest(field=field, meetings=tuple(meetings))


def _cohort(field: Field, environment: EnvironmentSpec, arms: Sequence[Arm], replicate: int) -> CohortPlan:
    plan = CohortPlan(
        environment=environment,
        reward=field.reward,
        replicate=replicate,
        episodes=tuple(arm.episode for arm in arms),
    )
    distinct = dict(zip(plan.episode_ids(), plan.episodes))
    return plan.model_copy(update={"episodes": tuple(distinct.values())})


def carry_out(
    contests: Sequence[Contest], run: Runner, on_tables: Callable[[dict[str, pa.Table]], None]
) -> list[Outcomes]:
    """Run the cohorts of all contests in one go, so that workers stay busy, and read them contest by contest.

    Raises:
        ControlError: Fewer than two environment seeds of a contest count.
        IntegrityError: The tables contradict themselves (see `arms.cell_outcomes`).
    """
    plans = [plan for held in contests for plan in held.plans]
    tables = run(plans)
    if len(tables) != len(plans):
        raise IntegrityError(f"{len(plans)} cohorts were asked for and {len(tables)} came back")
    for of_cohort in tables:
        on_tables(of_cohort)
    rest: list[Mapping[str, pa.Table]] = list(reversed(tables))
    return [_read(held, rest) for held in contests]


def _read(held: Contest, rest: list[Mapping[str, pa.Table]]) -> Outcomes:
    """Take the tables of a contest's cohorts from the end of the list."""
    found = Outcomes.of(
        [
            cell_outcomes(meeting.arms, held.field.reward, meeting.plans, [rest.pop() for _ in meeting.plans])
            for meeting in held.meetings
        ]
    )
    if found.num_env_seeds < 2:
        raise ControlError(
            f"{held.field.name}: {found.num_env_seeds} of {len(held.meetings[0].plans)} environment seeds can "
            f"be compared\n  found: {found.num_control_invalid} without a valid control, "
            f"{found.num_failed} failed episodes\n  expected: at least two seeds whose trunk trains to the end"
        )
    return found
