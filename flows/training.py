"""Training: offline learners, each on a worker of its own, and PPO from an offline checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from esper.karn.overrides import check_reason
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError
from esper.leyline.events import EventKind
from esper.leyline.matrix import PpoSettings
from esper.leyline.spec_base import Spec
from esper.nissa.writer import EventWriter
from flows.context import Context, RunOptions, open_context
from flows.orchestration import Orchestrator, Unit, results
from flows.versions import environments_of, rewards_of

Algorithm = Literal["bc", "iql", "cql"]


class TrainRequest(RunOptions):
    """Train one offline learner on `NAME` or `NAME@n`."""

    dataset: str
    algorithm: Algorithm
    seed: int = 0
    name: str | None = None
    override_health: str | None = None

    def check(self) -> None:
        """Raise where the version does not exist, or the reason for the override says nothing."""
        if self.override_health is not None:
            check_reason(self.override_health)
        open_store(self.store).resolve(self.dataset)


class PpoRequest(RunOptions):
    """Fine-tune a checkpoint on the environments of `NAME` or `NAME@n`; its episodes join that dataset."""

    start: str
    dataset: str | None = None
    seed: int = 0
    name: str = "ppo"
    settings: PpoSettings = PpoSettings()

    def check(self) -> None:
        """Raise where the checkpoint or the version does not exist."""
        self.resolve()

    def resolve(self) -> tuple[LearnedPolicy, Version]:
        """Return the policy to start from and the version: the given one, else the one that it was trained on."""
        from esper.tamiyo.checkpoints import read_card

        card = read_card(Path(self.start))
        ref = self.dataset or card.dataset
        if ref is None:
            raise SpecError(f"checkpoint {self.start} names no dataset\n  give one: --dataset NAME")
        start = LearnedPolicy(name=card.name, path=self.start, digest=card.weights_sha256)
        return start, open_store(self.store).resolve(ref)


class TrainJob(Spec):
    """A training run as a worker gets it."""

    store: str
    dataset: str
    algorithm: Algorithm
    seed: int
    name: str
    override_health: str | None
    folder: str
    run: str


def run_training(request: TrainRequest, orchestrator: Orchestrator) -> LearnedPolicy:
    """Train a policy; return its specification (checkpoint folder and digest).

    Raises:
        HealthError: The version is blocked or was never checked, and there is no `override_health`.
    """
    version = open_store(request.store).resolve(request.dataset)
    command = f"train-{request.algorithm}"
    with open_context(request, version.name, command, orchestrator, events={"version": version.ref}) as context:
        job = make_job(context, version, request.algorithm, request.seed, request.name, request.override_health)
        return train_all(context, [job])[0]


def make_job(
    context: Context,
    version: Version,
    algorithm: Algorithm,
    seed: int,
    name: str | None = None,
    override_health: str | None = None,
) -> TrainJob:
    """Return the training run of a learner within a context's run."""
    return TrainJob(
        store=str(context.store.root),
        dataset=version.ref,
        algorithm=algorithm,
        seed=seed,
        name=name or algorithm,
        override_health=override_health,
        folder=str(context.folder),
        run=context.run,
    )


def train_all(context: Context, jobs: Sequence[TrainJob]) -> list[LearnedPolicy]:
    """Carry out training runs, as many at once as there are workers; return the policies in order."""
    context.progress.begin("training", len(jobs))
    return results(context.orchestrator, [Unit("train", job.name, partial(_train, context, job)) for job in jobs])


def _train(context: Context, job: TrainJob) -> LearnedPolicy:
    started = time.monotonic()
    policy = LearnedPolicy.model_validate_json(context.pool.call(train_job, job.model_dump_json()).result())
    wall_s = time.monotonic() - started
    context.events.emit(
        EventKind.TRAIN_ENDED,
        {"algorithm": job.algorithm, "policy": job.name, "digest": policy.digest, "wall_s": wall_s},
    )
    context.progress.advance("training", f"{job.name} in {wall_s:.0f} s")
    return policy


def train_job(job_json: str) -> str:
    """Carry out a training run in this process; return the policy's specification as JSON."""
    from esper.simic.training import train

    job = TrainJob.model_validate_json(job_json)
    version = open_store(job.store).resolve(job.dataset)
    with EventWriter(Path(job.folder), job.run) as events:

        def on_log(values: dict[str, float]) -> None:
            stage = "" if "step" in values else " (values)"  # IQL's first half counts `value_step`
            data = {"step" if key == "value_step" else key: value for key, value in values.items()}
            events.emit(EventKind.TRAIN_STEP, {"policy": job.name + stage, **data})

        policy = train(
            job.algorithm,
            version,
            rewards=rewards_of(version),
            out=Path(job.folder) / "checkpoints" / job.name,
            seed=job.seed,
            name=job.name,
            override_health=job.override_health,
            recipe=None,
            on_log=on_log,
        )
    return policy.model_dump_json()


def run_ppo(request: PpoRequest, orchestrator: Orchestrator) -> LearnedPolicy:
    """Fine-tune a checkpoint; by default on the version that it was trained on."""
    start, version = request.resolve()
    with open_context(request, version.name, "train-ppo", orchestrator, events={"from": request.start}) as context:
        return fine_tune_policy(context, version, start, request.settings, request.seed, request.name)


def fine_tune_policy(
    context: Context, version: Version, start: LearnedPolicy, settings: PpoSettings, seed: int, name: str = "ppo"
) -> LearnedPolicy:
    """Fine-tune with PPO on the version's environments, cohorts on the workers; its episodes join the dataset."""
    from esper.simic.ppo import fine_tune
    from esper.tolaria.runtime import single_thread

    single_thread()
    rewards = rewards_of(version)
    context.progress.begin(name, settings.updates)

    def on_log(values: dict[str, float]) -> None:
        context.events.emit(EventKind.PPO_UPDATE, {"policy": name, **values})
        context.progress.advance(name)

    started = time.monotonic()
    policy = fine_tune(
        start,
        settings=settings,
        environments=[(spec, rewards[key]) for key, spec in environments_of(version).items()],
        run=partial(context.run_plans, name),
        out=context.folder / "checkpoints" / name,
        seed=seed,
        on_log=on_log,
        on_tables=lambda tables: None,  # each cohort was stored as it ended
        name=name,
    )
    wall_s = time.monotonic() - started
    context.events.emit(
        EventKind.TRAIN_ENDED, {"algorithm": "ppo", "policy": name, "digest": policy.digest, "wall_s": wall_s}
    )
    return policy
