"""The comparison: every arm on held-out environment seeds, one cohort each, so that all differences are paired."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from esper.leyline.comparison import ArmResult, BestFixed, ControlResult, Evaluation
from esper.leyline.controller_specs import HEURISTIC, ControllerSpec, LearnedPolicy, NeverAct, UniformRandom
from esper.leyline.errors import ControlError, IntegrityError, SpecError, unknown_name
from esper.leyline.identity import EVALUATION_START, SELECTION_START, Role, Root
from esper.leyline.library import load, load_environment
from esper.leyline.matrix import CohortPlan, ControlBounds, EvaluationCell, PlannedEpisode
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.verdict import Level
from esper.simic.arms import (
    BEST_FIXED,
    BIGGER,
    CONTROL_ARMS,
    HEURISTIC_ARM,
    NEVER_ACT,
    RANDOM,
    REFERENCES,
    WIDER,
    Arm,
    CellOutcomes,
    Group,
    cell_outcomes,
)
from esper.simic.schedules import candidate_schedules, describe
from esper.simic.statistics import mean_interval, paired_interval

Runner = Callable[[Sequence[CohortPlan]], list[dict[str, pa.Table]]]
"""Carries out cohorts; results in plan order."""

WiderFactor = Callable[[EnvironmentSpec, float], float]
"""The host's width factor whose training operations an epoch come to a number."""

BIGGER_BLUEPRINT = "conv_heavy"
MAX_LEFT_OUT_SHARE = 0.2
"""Where more trunks than this diverge or roll back, it is the environment that does not train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """The arms that meet on one environment, and the cohorts in which they do."""

    cell: EvaluationCell
    environment: EnvironmentSpec
    reward: RewardSpec
    arms: tuple[Arm, ...]
    plans: tuple[CohortPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """The best fixed schedule of an environment, and what training with it costs."""

    arm: Arm
    result: BestFixed
    train_flops_per_epoch: float


def evaluate(
    cells: Sequence[EvaluationCell],
    policies: Mapping[str, LearnedPolicy],
    *,
    run: Runner,
    bounds: Sequence[ControlBounds],
    dataset: str,
    version: int,
    verdict: Level | None,
    on_tables: Callable[[dict[str, pa.Table]], None],
    wider_factor: WiderFactor | None = None,
) -> Evaluation:
    """Compare learned policies with every control on held-out environment seeds.

    The best fixed schedule is chosen by mean return on selection seeds (replicates from 100,000); all arms then meet
    on evaluation seeds (from 200,000), one cohort each. Environment seeds whose trunk diverged or rolled back, or with
    a failed episode, are left out for all arms alike, and counted among the controls.

    Args:
        cells: One environment each.
        policies: Learned policies by the name of their arm; they act by their argmax.
        run: Carries out cohorts, in this process or on workers.
        bounds: What a healthy run shows; judged here, enforced by the caller (`Evaluation.failed_controls`).
        dataset: Name of the dataset that the policies learned from.
        version: Its version.
        verdict: Its verdict.
        on_tables: Called with the tables of every cohort before they are judged.
        wider_factor: `esper.tolaria.cost.wider_factor` where None.

    Raises:
        SpecError: Nothing to evaluate, a policy named like a control, or bounds of an environment not evaluated.
        ControlError: Fewer than two environment seeds of an environment have a valid control.
        IntegrityError: The tables contradict themselves (see `arms.cell_outcomes`).
    """
    started = time.perf_counter()
    _check_request(cells, policies, bounds)
    match = wider_factor if wider_factor is not None else _tolaria_wider_factor()
    selections = [_selection(cell) for cell in cells]
    selected = _carry_out(selections, run, on_tables)
    picks = [_pick(contest, outcomes) for contest, outcomes in zip(selections, selected)]
    contests = [_evaluation(contest, pick, policies, match) for contest, pick in zip(selections, picks)]
    results: list[ArmResult] = []
    controls: list[ControlResult] = []
    for contest, outcomes in zip(contests, _carry_out(contests, run, on_tables)):
        of_cell = [_arm_result(contest, arm, outcomes) for arm in contest.arms]
        results += of_cell
        controls += _seed_controls(contest, outcomes)
        controls += _bound_controls(contest, bounds, {result.arm: result for result in of_cell})
    return Evaluation(
        dataset=dataset,
        version=version,
        verdict=verdict,
        arms=tuple(results),
        best_fixed=tuple(pick.result for pick in picks),
        controls=tuple(controls),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=time.perf_counter() - started,
    )


def _check_request(
    cells: Sequence[EvaluationCell], policies: Mapping[str, LearnedPolicy], bounds: Sequence[ControlBounds]
) -> None:
    names = [cell.environment for cell in cells]
    if not names or len(set(names)) != len(names):
        raise SpecError(f"cannot evaluate on environments {names}\n  expected: at least one, each of them once")
    for name in policies:
        if name in CONTROL_ARMS:
            raise SpecError(f"a policy cannot be called {name!r}\n  that is the name of a control; choose another")
    for bound in bounds:
        if bound.environment not in names:
            raise unknown_name("evaluated environment", bound.environment, names)


def _tolaria_wider_factor() -> WiderFactor:
    from esper.tolaria.cost import wider_factor

    return wider_factor


def _contest(
    cell: EvaluationCell,
    environment: EnvironmentSpec,
    reward: RewardSpec,
    arms: Sequence[Arm],
    *,
    replicates: range,
) -> Contest:
    """Plan one cohort per environment seed with every distinct episode of the arms."""
    plans = []
    for replicate in replicates:
        plan = CohortPlan(
            environment=environment, reward=reward, replicate=replicate, episodes=tuple(arm.episode for arm in arms)
        )
        distinct = dict(zip(plan.episode_ids(), plan.episodes))
        plans.append(plan.model_copy(update={"episodes": tuple(distinct.values())}))
    return Contest(cell=cell, environment=environment, reward=reward, arms=tuple(arms), plans=tuple(plans))


def _selection(cell: EvaluationCell) -> Contest:
    environment = load_environment(cell.environment)
    arms = [
        Arm(
            name=schedule.name,
            group="schedule",
            episode=PlannedEpisode(controller=schedule, role=Role.SELECTION),
        )
        for schedule in candidate_schedules(environment)
    ]
    reward = load("rewards", cell.reward, RewardSpec)
    replicates = range(SELECTION_START, SELECTION_START + cell.selection_seeds)
    return _contest(cell, environment, reward, arms, replicates=replicates)


def _evaluation(selection: Contest, pick: Pick, policies: Mapping[str, LearnedPolicy], match: WiderFactor) -> Contest:
    environment = selection.environment
    factor = match(environment, pick.train_flops_per_epoch)

    def arm(name: str, group: Group, controller: ControllerSpec, *, epsilon: float = 0.0, root: str = "") -> Arm:
        planned = PlannedEpisode(
            controller=controller, epsilon=epsilon, root=root or Root.HOST.value, role=Role.EVALUATION
        )
        return Arm(name=name, group=group, episode=planned)

    arms = [
        arm(NEVER_ACT, "control", NeverAct()),
        arm(RANDOM, "control", UniformRandom(), epsilon=1.0),
        arm(HEURISTIC_ARM, "rule", HEURISTIC),
        arm(BEST_FIXED, "schedule", pick.arm.episode.controller),
        arm(BIGGER, "from scratch", NeverAct(), root=f"{Root.BIGGER.value}:{BIGGER_BLUEPRINT}"),
        arm(WIDER, "from scratch", NeverAct(), root=f"{Root.WIDER.value}:{factor}"),
        *(arm(name, "learned", policy.model_copy(update={"sampled": False})) for name, policy in policies.items()),
    ]
    replicates = range(EVALUATION_START, EVALUATION_START + selection.cell.env_seeds)
    return _contest(selection.cell, environment, selection.reward, arms, replicates=replicates)


def _carry_out(
    contests: Sequence[Contest], run: Runner, on_tables: Callable[[dict[str, pa.Table]], None]
) -> list[CellOutcomes]:
    """Run the cohorts of all contests in one go, so that workers stay busy, and read them contest by contest."""
    plans = [plan for contest in contests for plan in contest.plans]
    tables = run(plans)
    if len(tables) != len(plans):
        raise IntegrityError(f"{len(plans)} cohorts were asked for and {len(tables)} came back")
    for of_cohort in tables:
        on_tables(of_cohort)
    rest = iter(tables)
    found = []
    for contest in contests:
        outcomes = cell_outcomes(contest.arms, contest.reward, contest.plans, [next(rest) for _ in contest.plans])
        if outcomes.num_env_seeds < 2:
            raise ControlError(
                f"{contest.environment.name}: {outcomes.num_env_seeds} of {len(contest.plans)} environment seeds can "
                f"be compared\n  found: {outcomes.num_control_invalid} without a valid control, "
                f"{outcomes.num_failed} failed episodes\n  expected: at least two seeds whose trunk trains to the end"
            )
        found.append(outcomes)
    return found


def _pick(contest: Contest, outcomes: CellOutcomes) -> Pick:
    """The candidate with the highest mean return; the more promising one where two tie."""
    means = {arm.name: float(outcomes.values(arm.name, "episode_return").mean()) for arm in contest.arms}
    best = max(contest.arms, key=lambda arm: means[arm.name])
    schedule = best.episode.controller
    if schedule.kind != "schedule":
        raise SpecError(f"candidate {best.name!r} is a {schedule.kind}\n  expected: a fixed schedule")
    return Pick(
        arm=best,
        result=BestFixed(
            environment=contest.environment.name,
            schedule=schedule.name,
            description=describe(schedule),
            selection_return=means[best.name],
            num_candidates=len(contest.arms),
            num_selection_seeds=outcomes.num_env_seeds,
        ),
        train_flops_per_epoch=float(outcomes.values(best.name, "train_flops").mean()) / contest.environment.horizon,
    )


def _arm_result(contest: Contest, arm: Arm, outcomes: CellOutcomes) -> ArmResult:
    environment = contest.environment.name
    test = outcomes.values(arm.name, "test_percent")
    returns = outcomes.values(arm.name, "episode_return")
    added = outcomes.values(arm.name, "added_params")
    key = ("evaluation", environment, arm.name)
    others = [reference for reference in REFERENCES if reference != arm.name]
    return ArmResult(
        environment=environment,
        arm=arm.name,
        group=arm.group,
        test_accuracy_percent=mean_interval(test, key=(*key, "test")),
        mean_return=mean_interval(returns, key=(*key, "return")),
        gain_over={
            other: paired_interval(test, outcomes.values(other, "test_percent"), key=(*key, "test", other))
            for other in others
        },
        return_over={
            other: paired_interval(returns, outcomes.values(other, "episode_return"), key=(*key, "return", other))
            for other in others
        },
        seed_params=float(added.mean()),
        growth_factor=float(1.0 + (added / outcomes.values(arm.name, "host_params")).mean()),
        train_gflops=float(outcomes.values(arm.name, "train_flops").mean()) / 1e9,
        num_diverged=int(outcomes.values(arm.name, "diverged").sum()),
        num_rolled_back=int(outcomes.values(arm.name, "rolled_back").sum()),
    )


def _control(environment: str, name: str, value: float, low: float, high: float) -> ControlResult:
    return ControlResult(
        environment=environment, name=name, value=value, low=low, high=high, passed=low <= value <= high
    )


def _seed_controls(contest: Contest, outcomes: CellOutcomes) -> list[ControlResult]:
    """Whatever was left out of the comparison, and how much of it is tolerated."""
    name = contest.environment.name
    tolerated = float(int(MAX_LEFT_OUT_SHARE * len(contest.plans)))
    return [
        _control(name, "seeds without a valid control", outcomes.num_control_invalid, 0.0, tolerated),
        _control(name, "failed episodes", outcomes.num_failed, 0.0, 0.0),
    ]


def _bound_controls(
    contest: Contest, bounds: Sequence[ControlBounds], results: Mapping[str, ArmResult]
) -> list[ControlResult]:
    found = []
    environment = contest.environment.name
    best_gain = results[BEST_FIXED].gain_over[NEVER_ACT]
    for bound in bounds:
        if bound.environment != contest.cell.environment:
            continue
        if bound.never_act_percent is not None:
            never = results[NEVER_ACT].test_accuracy_percent.mean
            found.append(_control(environment, "never-act test accuracy (%)", never, *bound.never_act_percent))
        found.append(_control(environment, "best fixed gain (points)", best_gain.mean, *bound.best_fixed_gain_points))
        if bound.best_fixed_lower_bound_points is not None:
            name = "lower 95 % bound of it (points)"
            found.append(_control(environment, name, best_gain.low, bound.best_fixed_lower_bound_points, 100.0))
    return found
