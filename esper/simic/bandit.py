"""The schedule bandit: the bar that a learned policy must clear, beside the best fixed schedule.

It looks for one schedule of a whole environment or family on live episodes of the selection role, and never sees a
state: on a family the members come in rotation, whatever it chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import Blend
from esper.leyline.bandit import BanditSpec
from esper.leyline.blueprint_names import counterpart
from esper.leyline.comparison import BanditResult
from esper.leyline.controller_specs import FixedSchedule, Plant
from esper.leyline.errors import ControlError, SpecError
from esper.leyline.identity import SELECTION_START, Role
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec
from esper.simic.arms import Arm, cell_outcomes
from esper.simic.contest import Runner
from esper.simic.schedules import describe
from esper.simic.thompson import Thompson, shared_covariance

FIRST_REPLICATE = SELECTION_START + 10_000
"""Beyond the seeds on which fixed schedules and policies are chosen."""

BLUEPRINT, PLACE, BIRTH, TEMPO = range(4)

SHARES: tuple[tuple[tuple[int, ...], float], ...] = (
    ((), 3.0**2),
    ((BLUEPRINT,), 0.2),
    ((PLACE,), 0.3),
    ((BLUEPRINT, PLACE), 0.2),
    ((BIRTH,), 0.1),
    ((TEMPO,), 0.1),
    ((BLUEPRINT, PLACE, BIRTH, TEMPO), 0.1),
)
"""Which parts of its value an arm shares with others: where and what matter more than when and how fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleArms:
    """The schedules of a bandit, and the setting of each lever of each of them, int64 [A, 4]."""

    schedules: tuple[FixedSchedule, ...]
    levers_AL: NDArray[np.int64]


def schedule_arms(spec: BanditSpec, environment: EnvironmentSpec) -> ScheduleArms:
    """Return what a bandit chooses among in an environment: what it does not offer is left out.

    Raises:
        SpecError: Nothing is left, or the environment allows no committed seed.
    """
    slots = np.flatnonzero(environment.enabled_slots).tolist()
    cap = min(environment.seeds_cap, environment.fossils_cap, len(slots))
    places: list[tuple[int, ...]] = [(slot,) for slot in slots] if cap else []
    if 1 < len(slots) <= cap:
        places.append(tuple(slots))
    blueprints = [counterpart(name, environment.host.topology) for name in spec.blueprints]
    tempos = [tempo for tempo in spec.tempos if tempo in environment.tempos]
    births = [birth for birth in spec.births if birth < environment.horizon]
    sizes = [range(len(values)) for values in (blueprints, places, births, tempos)]
    levers = list(product(*sizes))
    if not levers:
        raise SpecError(
            f"environment {environment.name!r} offers a schedule bandit nothing to choose\n"
            f"  found: {len(places)} places, births {births}, tempos {tempos}\n  expected: at least one of each"
        )
    schedules = tuple(_schedule(environment, blueprints[b], places[p], births[e], tempos[t]) for b, p, e, t in levers)
    return ScheduleArms(schedules=schedules, levers_AL=np.array(levers, dtype=np.int64))


def _schedule(
    environment: EnvironmentSpec, blueprint: str, slots: Sequence[int], birth: int, tempo: int
) -> FixedSchedule:
    plants = [
        Plant.parse(
            {
                "slot": slot,
                "blueprint": blueprint,
                "birth_epoch": birth,
                "blend": Blend.LINEAR if Blend.LINEAR in environment.blends else environment.blends[0],
                "tempo_epochs": tempo,
                "dwell_epochs": min(environment.dwells),
                "seed_lr_factor": 1.0 if 1.0 in environment.seed_lr_factors else environment.seed_lr_factors[0],
            },
            "a schedule of the bandit",
        )
        for slot in slots
    ]
    where = "+".join(str(slot) for slot in slots)
    slower = "" if tempo == min(environment.tempos) else f"-t{tempo}"  # equal schedules are one episode: one name
    return FixedSchedule(name=f"{blueprint}-s{where}-e{birth}{slower}", plants=tuple(plants))


def thompson(spec: BanditSpec, arms: ScheduleArms, num_members: int) -> Thompson:
    """Return the beliefs of a bandit that has seen nothing yet."""
    prior = shared_covariance(arms.levers_AL, SHARES)
    return Thompson(prior, prior_sd=spec.prior_sd, noise_sd=spec.noise_sd, num_contexts=num_members)


def run_bandit(
    name: str, spec: BanditSpec, members: Sequence[EnvironmentSpec], reward: RewardSpec, run: Runner
) -> tuple[FixedSchedule, BanditResult]:
    """Return the schedule that a bandit settles on, and what it believes of it.

    Args:
        name: The environment or the family.
        spec: Arms and budget.
        members: The environments that take turns; the one with the fewest slots says which arms there are.
        reward: What an episode is worth.
        run: Carries out cohorts; one episode each, of the selection role.

    Raises:
        SpecError: There is nothing to choose among.
        ControlError: No pull had a valid outcome.
    """
    arms = schedule_arms(spec, min(members, key=lambda member: int(member.enabled_slots.sum())))
    beliefs = thompson(spec, arms, len(members))
    pulled = lost = 0
    while pulled < spec.pulls:
        count = min(spec.pulls_per_round, spec.pulls - pulled)
        chosen = beliefs.choose(count, key=(spec.spec_id, name, pulled))
        turns = range(pulled, pulled + count)
        plans = [_pull(arms.schedules[arm], members, reward, turn) for arm, turn in zip(chosen, turns)]
        for arm, turn, plan, tables in zip(chosen, turns, plans, run(plans), strict=True):
            planned = Arm(name="pull", group="schedule", episode=plan.episodes[0])
            found = cell_outcomes([planned], reward, [plan], [tables]).by_arm["pull"]
            for outcome in found:
                beliefs.observe(arm, turn % len(members), outcome.episode_return)
            lost += not found
        pulled += count
    return _settle(name, arms, beliefs, num_pulls=pulled, num_lost=lost)


def _pull(schedule: FixedSchedule, members: Sequence[EnvironmentSpec], reward: RewardSpec, turn: int) -> CohortPlan:
    """The cohort of one pull: the next member, and an environment seed that no other pull on it has."""
    return CohortPlan(
        environment=members[turn % len(members)],
        reward=reward,
        replicate=FIRST_REPLICATE + turn // len(members),
        episodes=(PlannedEpisode(controller=schedule, role=Role.SELECTION),),
    )


def _settle(
    name: str, arms: ScheduleArms, beliefs: Thompson, *, num_pulls: int, num_lost: int
) -> tuple[FixedSchedule, BanditResult]:
    """The schedule with the highest posterior mean among those that were tried."""
    times = beliefs.times_pulled()
    if not times.any():
        raise ControlError(
            f"{name}: none of the {num_pulls} episodes of the schedule bandit has a valid outcome\n"
            "  expected: trunks that train to the end"
        )
    mean, covariance = beliefs.posterior()
    best = int(np.where(times > 0, mean, -np.inf).argmax())
    schedule = arms.schedules[best]
    return schedule, BanditResult(
        environment=name,
        schedule=schedule.name,
        description=describe(schedule),
        num_arms=len(arms.schedules),
        num_pulls=num_pulls,
        num_lost=num_lost,
        times_pulled=int(times[best]),
        posterior_mean=float(mean[best]),
        posterior_sd=float(np.sqrt(max(0.0, covariance[best, best]))),
        noise_sd=beliefs.noise_sd,
    )
