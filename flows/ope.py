"""Off-policy evaluation: what policies would be worth, before any of them meets a live episode."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from esper.karn.overrides import check_reason
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import StoreError
from esper.leyline.events import EventKind
from esper.leyline.library import load
from esper.leyline.ope import BehaviourCheck, BranchCorrelation, OpeResult, PolicyEstimate
from esper.leyline.spec_base import Spec
from esper.leyline.verdict import Use
from esper.nissa.writer import EventWriter
from flows.checkpoints import named_policies
from flows.context import Context, RunOptions, open_context
from flows.orchestration import Orchestrator, Unit, results
from flows.past_estimates import RESULT, past_ranking
from flows.versions import refuse_skeleton, rewards_of

if TYPE_CHECKING:
    from esper.simic.ope.fqe import FqeSpec
    from esper.simic.ope.logged import Logged


class OpeRequest(RunOptions):
    """Value checkpoints on the data of `NAME` or `NAME@n`.

    Attributes:
        policies: Checkpoint folders.
        sampled: Value the policies' distributions instead of their most probable choices.
        behaviours: Behaviours of the data that are valued too, at most; 0 values none.
        branch_states: States from which actions are tried live, with the policy going on; 0 tries none.
        branch_actions: Actions tried in each.
        iql_critic: Fit implicit Q-learning on the data and hold its advantages against the measured ones too.
        recipe: How values are fitted.
    """

    dataset: str
    policies: Annotated[tuple[str, ...], Field(min_length=1)]
    sampled: bool = False
    behaviours: Annotated[int, Field(ge=0)] = 11
    branch_states: Annotated[int, Field(ge=0)] = 0
    branch_actions: Annotated[int, Field(ge=2)] = 4
    iql_critic: bool = False
    recipe: str = "fqe"
    seed: int = 0
    override_health: str | None = None

    def check(self) -> None:
        """Raise where the recipe, a checkpoint or the version does not exist, or the override's reason is empty."""
        if self.override_health is not None:
            check_reason(self.override_health)
        _recipe(self.recipe)
        self.resolve()

    def resolve(self) -> tuple[dict[str, LearnedPolicy], Version]:
        """Return the policies by name, and the version."""
        version = open_store(self.store).resolve(self.dataset)
        refuse_skeleton(version)
        found = named_policies(self.policies)
        changes = {"sampled": self.sampled}
        policies = {name: policy.model_copy(update=changes) for name, policy in found.items()}
        return policies, version


class OpeJob(Spec):
    """One policy or behaviour as a worker gets it, or neither: then it is the critic of implicit Q-learning.

    `behaviour` is the key of one of the data's behaviours.

    `measured` holds the policy's own branches as JSON.
    """

    store: str
    dataset: str
    recipe: str
    seed: int
    folder: str
    run: str
    policy: LearnedPolicy | None = None
    behaviour: str | None = None
    name: str
    measured: tuple[str, ...] = ()


class OpeFindings(Spec):
    """What a worker gives back."""

    policies: tuple[PolicyEstimate, ...] = ()
    behaviours: tuple[BehaviourCheck, ...] = ()
    branches: tuple[BranchCorrelation, ...] = ()


def run_ope(request: OpeRequest, orchestrator: Orchestrator) -> tuple[OpeResult, Path]:
    """Return the evaluation and the file that holds it.

    Raises:
        HealthError: The version is blocked for off-policy evaluation or was never checked, and there is no override.
    """
    from esper.simic.training import admit

    policies, version = request.resolve()
    admit(version, Use.OFF_POLICY_EVALUATION, request.override_health, by="ope")
    with open_context(request, version.name, "ope", orchestrator, events={"version": version.ref}) as context:
        result = evaluate_off_policy(
            context,
            version,
            policies,
            seed=request.seed,
            recipe=request.recipe,
            behaviours=request.behaviours,
            branch_states=request.branch_states,
            branch_actions=request.branch_actions,
            iql_critic=request.iql_critic,
        )
        return result, context.folder / RESULT


def ope_scores(
    context: Context, version: Version, policies: Mapping[str, LearnedPolicy], *, recipe: str = "fqe", seed: int = 0
) -> dict[str, float]:
    """Return each policy's estimated return, the mean over the version's environments; writes `ope.json`.

    The keys are those of `policies`; the policies are valued as they act (`sampled`).
    """
    named = {key: policy.model_copy(update={"name": key}) for key, policy in policies.items()}
    return evaluate_off_policy(context, version, named, seed=seed, recipe=recipe, behaviours=0).scores()


def evaluate_off_policy(
    context: Context,
    version: Version,
    policies: Mapping[str, LearnedPolicy],
    *,
    seed: int = 0,
    recipe: str = "fqe",
    behaviours: int = 0,
    branch_states: int = 0,
    branch_actions: int = 4,
    iql_critic: bool = False,
) -> OpeResult:
    """Value policies, each on a worker, and write `ope.json` into the run's folder; see `OpeRequest`."""
    from esper.simic.ope.calibration import rank_behaviours

    started = time.monotonic()
    view = _recipe(recipe).network.view
    measured = _run_branches(context, version, policies, view, seed, branch_states, branch_actions)
    job = partial(
        OpeJob,
        store=context.store.url,
        dataset=version.ref,
        recipe=recipe,
        seed=seed,
        folder=str(context.folder),
        run=context.run,
    )
    jobs = [job(policy=policy, name=name, measured=measured.get(name, ())) for name, policy in policies.items()]
    left_out = 0
    if behaviours:
        names, left_out = json.loads(
            context.pool.call(behaviour_names, context.store.url, version.ref, view, behaviours).result()
        )
        jobs += [job(behaviour=key, name=name) for key, name in names]
    if iql_critic:
        jobs.append(job(name="iql critic", measured=tuple(text for texts in measured.values() for text in texts)))
    context.progress.begin("off-policy evaluation", len(jobs))
    found = results(context.orchestrator, [Unit("ope", item.name, partial(_carry_out, context, item)) for item in jobs])
    checks = [item for part in found for item in part.behaviours]
    estimates = [item for part in found for item in part.policies]
    result = OpeResult(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        policies=tuple(estimates),
        behaviours=tuple(checks),
        num_behaviours_left_out=left_out,
        behaviour_ranking=tuple(rank_behaviours(checks, {item.environment: item.data_return for item in estimates})),
        branches=tuple(item for part in found for item in part.branches),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=time.monotonic() - started,
    )
    result = result.model_copy(update={"ranking": tuple(past_ranking(context.dataset, version, result))})
    _write(result, context.folder / RESULT)
    said = {f"estimate of {name}": value for name, value in result.scores().items()}
    context.events.emit(EventKind.OPE_ENDED, {"policies": len(policies), "wall_s": result.wall_s, **said})
    return result


def _write(result: OpeResult, path: Path) -> None:
    try:
        path.write_text(json.dumps(result.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None


def _recipe(name: str) -> FqeSpec:
    from esper.simic.ope.fqe import FqeSpec

    return load("recipes", name, FqeSpec)


def _carry_out(context: Context, job: OpeJob) -> OpeFindings:
    started = time.monotonic()
    found = OpeFindings.model_validate_json(context.pool.call(ope_job, job.model_dump_json()).result())
    context.progress.advance("off-policy evaluation", f"{job.name} in {time.monotonic() - started:.0f} s")
    return found


def ope_job(job_json: str) -> str:
    """Value one policy or behaviour in this process; return the findings as JSON."""
    from esper.simic.iql import IqlRecipe
    from esper.simic.ope.branch_oracle import MeasuredBranch
    from esper.simic.ope.calibration import behaviours_of
    from esper.simic.ope.estimate import iql_correlations, value_behaviour, value_policy
    from esper.tamiyo.networks import single_thread

    job = OpeJob.model_validate_json(job_json)
    spec = _recipe(job.recipe)
    logged = _logged(job.store, job.dataset, spec.network.view)
    with EventWriter(Path(job.folder), job.run) as events, single_thread():

        def on_log(values: dict[str, float]) -> None:
            data = {"step" if key == "value_step" else key: value for key, value in values.items()}
            events.emit(EventKind.TRAIN_STEP, {"policy": f"{job.name} (fqe)", **data})

        measured = [MeasuredBranch.model_validate_json(text) for text in job.measured]
        if job.behaviour is not None:
            behaviour = next(item for item in behaviours_of(logged)[0] if item.key == job.behaviour)
            checks = value_behaviour(behaviour, logged, spec, seed=job.seed, on_log=on_log)
            return OpeFindings(behaviours=tuple(checks)).model_dump_json()
        if job.policy is None:
            critic = load("recipes", "iql", IqlRecipe)
            ranks = iql_correlations(logged, critic, seed=job.seed, on_log=on_log, measured=measured)
            return OpeFindings(branches=tuple(ranks)).model_dump_json()
        valued = value_policy(job.policy, logged, spec, seed=job.seed, on_log=on_log, measured=measured)
        return OpeFindings(policies=valued.estimates, branches=valued.branches).model_dump_json()


def behaviour_names(store: str, ref: str, view: str, limit: int) -> str:
    """Return as JSON the ids and names of the behaviours to check, and how many cannot be."""
    from esper.simic.ope.calibration import behaviours_of, spread_out

    found, left_out = behaviours_of(_logged(store, ref, view))
    return json.dumps([[[item.key, item.name] for item in spread_out(found, limit)], left_out])


@lru_cache(maxsize=1)
def _logged(store: str, ref: str, view: str) -> Logged:
    """The data of a version, kept by a worker from one job to the next: a sealed version never changes."""
    from esper.simic.ope.logged import load_logged

    version = open_store(store).resolve(ref)
    return load_logged(version, view, rewards_of(version))


def _run_branches(
    context: Context,
    version: Version,
    policies: Mapping[str, LearnedPolicy],
    view: str,
    seed: int,
    num_states: int,
    num_actions: int,
) -> dict[str, tuple[str, ...]]:
    """Try actions from logged states, each policy going on after them; the episodes join the dataset as `online`."""
    if not num_states:
        return {}
    from esper.simic.ope.branch_oracle import plan_branches, read_branches
    from esper.simic.ope.logged import replay_actions
    from esper.tamiyo.registry import build_controller

    logged = _logged(context.store.url, version.ref, view)
    rewards = rewards_of(version)
    found = {}
    for name, policy in policies.items():
        greedy = replay_actions(build_controller(policy.model_copy(update={"sampled": False})), logged)
        planned = plan_branches(
            logged, policy, greedy, rewards, num_states=num_states, num_actions=num_actions, key=("ope", seed)
        )
        task = f"branches of {name}"
        context.progress.begin(task, len(planned.plans))
        tables = context.run_plans(task, planned.plans, counted=True)
        found[name] = tuple(
            item.model_dump_json() for item in read_branches(planned, tables, rewards, f"{name} itself")
        )
    return found
