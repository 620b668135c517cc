"""Training runs on workers, and PPO from an offline checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.karn.policy_card import write_policy_page
from esper.karn.splits_stored import DEFAULT_NAME
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import EsperError, SpecError
from esper.leyline.events import EventKind
from esper.leyline.grid import Algorithm, Backend, TrainedPolicy, default_name
from esper.leyline.pipelines import PpoSettings
from esper.leyline.spec_base import Spec
from esper.nissa.tensorboard import TensorBoardSink
from esper.nissa.writer import EventWriter
from flows.context import Context, RunOptions, open_context
from flows.following import VALUES_STAGE, following
from flows.orchestration import Orchestrator, Unit, results
from flows.versions import environments_of, refuse_skeleton, rewards_of

if TYPE_CHECKING:
    from esper.tamiyo.checkpoints import PolicyCard


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
        _check_start(self.start, card)
        ref = self.dataset or card.dataset
        if ref is None:
            raise SpecError(f"checkpoint {self.start} names no dataset\n  give one: --dataset NAME")
        start = LearnedPolicy(name=card.name, path=self.start, digest=card.weights_sha256)
        version = open_store(self.store).resolve(ref)
        refuse_skeleton(version)
        return start, version


class TrainJob(Spec):
    """A training run as a worker gets it.

    Attributes:
        recipe: Every field of the learner's specification.
        steps: Gradient steps of its values (0 where it has none) and of its policy.
        split: Name of the stored split whose validation seeds are held out.
        tensorboard: Write the losses for TensorBoard too.
    """

    store: str
    dataset: str
    algorithm: Algorithm
    backend: Backend
    recipe: dict[str, Any]
    steps: tuple[int, int]
    seed: int
    name: str
    override_health: str | None
    split: str = DEFAULT_NAME
    tensorboard: bool
    folder: str
    run: str


class Trained(Spec):
    """What a worker answers."""

    policy: LearnedPolicy
    metrics: dict[str, float]
    wall_s: float
    was_stored: bool


def make_job(
    context: Context,
    version: Version,
    algorithm: Algorithm,
    seed: int,
    name: str | None = None,
    override_health: str | None = None,
    *,
    backend: Backend = "esper",
    recipe: str | None = None,
    changes: Mapping[str, Any] | None = None,
    split: str = DEFAULT_NAME,
    tensorboard: bool = False,
) -> TrainJob:
    """Return the training run of a learner within a context's run.

    Args:
        context: The run.
        version: The data.
        algorithm: The learner.
        seed: Training seed.
        name: The policy's name; the learner's unless given.
        override_health: Why to train without a verdict, or against it.
        backend: Whose implementation of the learner.
        recipe: Name or TOML file of its recipe; the one of its name unless given.
        changes: Values of the recipe's fields that take the place of its own.
        split: Name of the stored split whose validation seeds are held out.
        tensorboard: Write the losses for TensorBoard too.

    Raises:
        SpecError: The recipe is unknown or wrong.
    """
    from esper.simic.training import load_recipe, total_steps

    chosen = load_recipe(algorithm, backend, recipe, changes)
    return TrainJob(
        store=context.store.url,
        dataset=version.ref,
        algorithm=algorithm,
        backend=backend,
        recipe=chosen.model_dump(mode="json"),
        steps=total_steps(chosen),
        seed=seed,
        name=name or default_name(algorithm, backend),
        override_health=override_health,
        split=split,
        tensorboard=tensorboard,
        folder=str(context.folder),
        run=context.run,
    )


def train_all(context: Context, jobs: Sequence[TrainJob]) -> list[LearnedPolicy]:
    """Carry out training runs, as many at once as there are workers; return the policies in order."""
    return [row.policy for row in train_rows(context, jobs)]


def train_rows(context: Context, jobs: Sequence[TrainJob]) -> list[TrainedPolicy]:
    """Carry out training runs as `train_all` does; return what each came to.

    What the run's folder holds already is not trained again, and what was killed in the middle goes on.
    """
    context.progress.begin("training", len(jobs))
    with following(context.folder, context.progress, {job.name: job.steps for job in jobs}):
        return results(context.orchestrator, [Unit("train", job.name, partial(_train, context, job)) for job in jobs])


def _train(context: Context, job: TrainJob) -> TrainedPolicy:
    try:
        answer = context.pool.call(train_job, job.model_dump_json()).result()
    except EsperError as error:
        if job.name not in str(error):
            raise type(error)(f"{job.name}: {error}") from error
        raise
    trained = Trained.model_validate_json(answer)
    context.events.emit(
        EventKind.TRAIN_ENDED,
        {
            "algorithm": job.algorithm,
            "policy": job.name,
            "digest": trained.policy.digest,
            "wall_s": trained.wall_s,
            "was_stored": trained.was_stored,
        },
    )
    done = "was there already" if trained.was_stored else f"in {trained.wall_s:.0f} s"
    context.progress.advance("training", f"{job.name} {done}")
    return TrainedPolicy(algorithm=job.algorithm, backend=job.backend, seed=job.seed, **dict(trained))


def train_job(job_json: str) -> str:
    """Carry out a training run in this process; return what came of it as JSON."""
    from esper.simic.training import recipe_class, train
    from esper.tamiyo.checkpoints import read_card

    started = time.monotonic()
    job = TrainJob.model_validate_json(job_json)
    version = open_store(job.store).resolve(job.dataset)
    folder = Path(job.folder)
    board = TensorBoardSink(folder) if job.tensorboard else None
    num_logs = 0
    with contextlib.ExitStack() as open_files:
        if board is not None:
            open_files.callback(board.close)
        events = open_files.enter_context(EventWriter(folder, job.run, () if board is None else (board,)))

        def on_log(values: dict[str, float]) -> None:
            nonlocal num_logs
            num_logs += 1
            stage = "" if "step" in values else VALUES_STAGE  # IQL's first half counts `value_step`
            data = {"step" if key == "value_step" else key: value for key, value in values.items()}
            events.emit(EventKind.TRAIN_STEP, {"policy": job.name + stage, **data})

        policy = train(
            job.algorithm,
            version,
            rewards=rewards_of(version),
            out=folder / "checkpoints" / job.name,
            seed=job.seed,
            name=job.name,
            override_health=job.override_health,
            backend=job.backend,
            recipe=recipe_class(job.algorithm, job.backend).parse(job.recipe, f"recipe of {job.name}"),
            split=job.split,
            resume=folder / "progress" / job.name,
            on_log=on_log,
        )
    metrics = read_card(Path(policy.path)).metrics
    wall_s = time.monotonic() - started
    return Trained(policy=policy, metrics=metrics, wall_s=wall_s, was_stored=not num_logs).model_dump_json()


def _check_start(path: str, card: PolicyCard) -> None:
    """Raise SpecError where PPO cannot go on from a checkpoint's kind of network."""
    network = card.network
    if network.kind != "tree":
        what = {"flat": "d3rlpy's network over a flat list of actions", "imitation": "an imitation policy"}
    elif network.trunk == "gru":
        what = {"tree": "recurrent (trunk gru), and PPO here learns from single decisions"}
    elif network.form == "listed":
        what = {"tree": "of form listed, which chooses from a list and has no probability per choice"}
    elif network.form == "atomic":
        what = {"tree": "one value per whole action (form atomic), without a probability per choice"}
    else:
        return
    raise SpecError(
        f"checkpoint {path} cannot be fine-tuned: it is {what[network.kind]}\n"
        "  expected: a checkpoint of bc, rwbc, iql or cql with trunk mlp and form additive"
    )


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
    write_policy_page(Path(policy.path))
    wall_s = time.monotonic() - started
    context.events.emit(
        EventKind.TRAIN_ENDED, {"algorithm": "ppo", "policy": name, "digest": policy.digest, "wall_s": wall_s}
    )
    return policy
