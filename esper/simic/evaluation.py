"""The comparison: every arm on held-out environment seeds, one cohort each, so that all differences are paired."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from esper.leyline.comparison import (
    AlgorithmResult,
    ArmResult,
    BanditResult,
    BestFixed,
    ControlResult,
    Evaluation,
    Group,
)
from esper.leyline.controller_specs import (
    HEURISTIC,
    ControllerSpec,
    FixedSchedule,
    LearnedPolicy,
    NeverAct,
    TrialKeep,
    UniformRandom,
)
from esper.leyline.errors import SpecError, unknown_name
from esper.leyline.identity import EVALUATION_START, SELECTION_START, Role, Root
from esper.leyline.matrix import PlannedEpisode
from esper.leyline.pipelines import ControlBounds, EvaluationCell
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.verdict import Level
from esper.simic.arms import BANDIT, BEST_FIXED, BIGGER, CONTROL_ARMS, HEURISTIC_ARM, NEVER_ACT, RANDOM, WIDER, Arm
from esper.simic.bandit import run_bandit
from esper.simic.comparing import algorithm_results, arm_results, bound_controls, seed_controls
from esper.simic.contest import Contest, Field, Outcomes, Runner, carry_out, contest, open_field
from esper.simic.schedules import candidate_schedules, describe

OnTables = Callable[[dict[str, pa.Table]], None]
Predicted = Mapping[str, Mapping[str, float]]

WiderFactor = Callable[[EnvironmentSpec, float], float]
"""The host's width factor whose training operations an epoch come to a number."""

BIGGER_BLUEPRINT = "conv_heavy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """The best fixed schedule of a field, and what training with it costs an epoch, by environment."""

    schedule: FixedSchedule
    result: BestFixed
    train_flops_per_epoch: dict[str, float]


def evaluate(
    cells: Sequence[EvaluationCell],
    policies: Mapping[str, LearnedPolicy],
    *,
    run: Runner,
    bounds: Sequence[ControlBounds],
    dataset: str,
    version: int,
    verdict: Level | None,
    on_tables: OnTables,
    wider_factor: WiderFactor | None = None,
    predicted: Predicted | None = None,
) -> Evaluation:
    """Compare learned policies with every control on held-out environment seeds.

    The best fixed schedule is chosen by mean return on selection seeds (replicates from 100,000), and so is what the
    schedule bandit settles on; all arms then meet on evaluation seeds (from 200,000), one cohort each. On a family both
    are one schedule for all its members. Environment seeds whose trunk diverged or rolled back, or with a failed
    episode, are left out for all arms alike, and counted among the controls.

    Args:
        cells: One environment or one family each.
        policies: Learned policies by the name of their arm; they act by their argmax. Names that differ in `-s0`,
            `-s1`, ... alone are controller seeds of one algorithm.
        run: Carries out cohorts, in this process or on workers.
        bounds: What a healthy run shows; judged here, enforced by the caller (`Evaluation.failed_controls`).
        dataset: Name of the dataset that the policies learned from.
        version: Its version.
        verdict: Its verdict.
        on_tables: Called with the tables of every cohort before they are judged; pulls of the bandit are not among
            them.
        wider_factor: `esper.tolaria.cost.wider_factor` where None.
        predicted: What off-policy evaluation says of the policies, by name and environment: shown beside what they
            came to, on a family where it speaks of every member.

    Raises:
        SpecError: Nothing to evaluate, a policy named like a control, or bounds of an environment not evaluated.
        ControlError: Fewer than two environment seeds of an environment have a valid control.
        IntegrityError: The tables contradict themselves (see `arms.cell_outcomes`).
    """
    started = time.perf_counter()
    _check_request(cells, policies, bounds)
    match = wider_factor if wider_factor is not None else _tolaria_wider_factor()
    fields = [open_field(cell) for cell in cells]
    selections = [_selection(field) for field in fields]
    picks = [_pick(held, found) for held, found in zip(selections, carry_out(selections, run, on_tables))]
    bandits = [_bandit(field, run) for field in fields]
    contests = [
        contest(
            field,
            _arms(pick, None if bandit is None else bandit[0], field.cell.trials, policies, match),
            _held_out(field),
        )
        for field, pick, bandit in zip(fields, picks, bandits)
    ]
    table = _Table(predicted or {})
    for held, outcomes in zip(contests, carry_out(contests, run, on_tables)):
        table.add(held, outcomes, bounds)
    return Evaluation(
        dataset=dataset,
        version=version,
        verdict=verdict,
        arms=tuple(table.arms),
        members=tuple(table.members),
        algorithms=tuple(table.algorithms),
        families={field.name: tuple(member.name for member in field.members) for field in fields if field.is_family},
        best_fixed=tuple(pick.result for pick in picks),
        bandits=tuple(bandit[1] for bandit in bandits if bandit is not None),
        controls=tuple(table.controls),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=time.perf_counter() - started,
    )


class _Table:
    """The rows of an evaluation as they come in."""

    def __init__(self, predicted: Predicted) -> None:
        self.predicted = predicted
        self.arms: list[ArmResult] = []
        self.members: list[ArmResult] = []
        self.algorithms: list[AlgorithmResult] = []
        self.controls: list[ControlResult] = []

    def add(self, held: Contest, outcomes: Outcomes, bounds: Sequence[ControlBounds]) -> None:
        """Add the rows of one contest: pooled, then member by member."""
        name = held.field.name
        predicted = self._predicted([member.name for member in held.field.members])
        pooled = arm_results(name, held.arms, outcomes, predicted)
        self.arms += pooled
        self.algorithms += algorithm_results(name, held.arms, outcomes, predicted)
        self.controls += seed_controls(held, outcomes)
        self.controls += bound_controls(held, bounds, {result.arm: result for result in pooled})
        if held.field.is_family:
            for index, meeting in enumerate(held.meetings):
                own, member = outcomes.member(index), meeting.environment.name
                predicted = self._predicted([member])
                self.members += arm_results(member, meeting.arms, own, predicted)
                self.algorithms += algorithm_results(member, meeting.arms, own, predicted)

    def _predicted(self, members: Sequence[str]) -> dict[str, float]:
        """The mean over some environments, where all of them are spoken of."""
        return {
            policy: sum(values[member] for member in members) / len(members)
            for policy, values in self.predicted.items()
            if all(member in values for member in members)
        }


def _check_request(
    cells: Sequence[EvaluationCell], policies: Mapping[str, LearnedPolicy], bounds: Sequence[ControlBounds]
) -> None:
    names = [cell.environment for cell in cells]
    if not names or len(set(names)) != len(names):
        raise SpecError(f"cannot evaluate on environments {names}\n  expected: at least one, each of them once")
    trials = {trial.name for cell in cells for trial in cell.trials}
    for name in (*policies, *trials):
        if name in CONTROL_ARMS or (name in policies and name in trials):
            raise SpecError(
                f"a policy or trial cannot be called {name!r}\n"
                "  that is the name of a control or of another arm; choose another"
            )
    for bound in bounds:
        if bound.environment not in names:
            raise unknown_name("evaluated environment", bound.environment, names)


def _tolaria_wider_factor() -> WiderFactor:
    from esper.tolaria.cost import wider_factor

    return wider_factor


def _held_out(field: Field) -> range:
    return range(EVALUATION_START, EVALUATION_START + field.cell.env_seeds)


def _selection(field: Field) -> Contest:
    """The candidates for the best fixed schedule: those of the member with the fewest slots serve all."""
    smallest = min(field.members, key=lambda member: int(member.enabled_slots.sum()))
    arms = [
        Arm(
            name=schedule.name,
            group="schedule",
            episode=PlannedEpisode(controller=schedule, role=Role.SELECTION),
        )
        for schedule in candidate_schedules(smallest)
    ]
    return contest(field, lambda member: arms, range(SELECTION_START, SELECTION_START + field.cell.selection_seeds))


def _bandit(field: Field, run: Runner) -> tuple[FixedSchedule, BanditResult] | None:
    if field.cell.bandit is None:
        return None
    return run_bandit(field.name, field.cell.bandit, field.members, field.reward, run)


def _arms(
    pick: Pick,
    bandit: FixedSchedule | None,
    trials: Sequence[TrialKeep],
    policies: Mapping[str, LearnedPolicy],
    match: WiderFactor,
) -> Callable[[EnvironmentSpec], list[Arm]]:
    """The arms of a field's members; the wider host differs between them."""

    def arm(name: str, group: Group, controller: ControllerSpec, *, epsilon: float = 0.0, root: str = "") -> Arm:
        planned = PlannedEpisode(
            controller=controller, epsilon=epsilon, root=root or Root.HOST.value, role=Role.EVALUATION
        )
        return Arm(name=name, group=group, episode=planned)

    def of(environment: EnvironmentSpec) -> list[Arm]:
        factor = match(environment, pick.train_flops_per_epoch[environment.name])
        return [
            arm(NEVER_ACT, "control", NeverAct()),
            arm(RANDOM, "control", UniformRandom(), epsilon=1.0),
            arm(HEURISTIC_ARM, "rule", HEURISTIC),
            arm(BEST_FIXED, "schedule", pick.schedule),
            *([] if bandit is None else [arm(BANDIT, "schedule", bandit)]),
            *(arm(trial.name, "rule", trial) for trial in trials),
            arm(BIGGER, "from scratch", NeverAct(), root=f"{Root.BIGGER.value}:{BIGGER_BLUEPRINT}"),
            arm(WIDER, "from scratch", NeverAct(), root=f"{Root.WIDER.value}:{factor}"),
            *(arm(name, "learned", policy.model_copy(update={"sampled": False})) for name, policy in policies.items()),
        ]

    return of


def _pick(held: Contest, outcomes: Outcomes) -> Pick:
    """The candidate with the highest mean return; the more promising one where two tie."""
    means = {arm.name: float(outcomes.values(arm.name, "episode_return").mean()) for arm in held.arms}
    best = max(held.arms, key=lambda arm: means[arm.name])
    schedule = best.episode.controller
    if not isinstance(schedule, FixedSchedule):
        raise SpecError(f"candidate {best.name!r} is a {schedule.kind}\n  expected: a fixed schedule")
    flops = {
        meeting.environment.name: float(member.values(best.name, "train_flops").mean()) / meeting.environment.horizon
        for meeting, member in zip(held.meetings, outcomes.members)
    }
    return Pick(
        schedule=schedule,
        result=BestFixed(
            environment=held.field.name,
            schedule=schedule.name,
            description=describe(schedule),
            selection_return=means[best.name],
            num_candidates=len(held.arms),
            num_selection_seeds=outcomes.num_env_seeds,
        ),
        train_flops_per_epoch=flops,
    )
