"""`esper train`: offline learners, and PPO from one of their checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from esper.cli.launch import default_workers, launch
from esper.cli.output import note_verdict

if TYPE_CHECKING:
    from esper.leyline.controller_specs import LearnedPolicy

train = App(
    name="train",
    help="Train a controller; the checkpoint is safetensors and JSON in the run's folder.",
    result_action="return_value",
)

Flag = Annotated[bool, Parameter(negative="")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What every offline learner takes.

    Attributes:
        seed: Training seed.
        name: The policy's name (default: the algorithm's).
        override_health: Reason to train without a verdict or against it; every later report prints it.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time).
    """

    seed: int = 0
    name: str | None = None
    override_health: str | None = None
    store: str | None = None
    no_prefect: Flag = False
    run_name: str | None = None


DEFAULTS = Options()


@train.command
def bc(dataset: str, /, *, options: Options = DEFAULTS) -> None:
    """Behaviour cloning: imitate the actions of a sealed version.

    Args:
        dataset: NAME or NAME@n.
        options: What every offline learner takes.
    """
    _offline("bc", dataset, options)


@train.command
def iql(dataset: str, /, *, options: Options = DEFAULTS) -> None:
    """Implicit Q-learning: expectile values, then an advantage-weighted policy.

    Args:
        dataset: NAME or NAME@n.
        options: What every offline learner takes.
    """
    _offline("iql", dataset, options)


@train.command
def cql(dataset: str, /, *, options: Options = DEFAULTS) -> None:
    """Conservative Q-learning.

    Args:
        dataset: NAME or NAME@n.
        options: What every offline learner takes.
    """
    _offline("cql", dataset, options)


def _offline(algorithm: str, dataset: str, options: Options) -> None:
    from esper.karn.store import open_store
    from flows.training import TrainRequest, run_training

    given = asdict(options)
    prefect = not given.pop("no_prefect")
    request = TrainRequest.parse({"algorithm": algorithm, "dataset": dataset, **given}, f"esper train {algorithm}")
    note_verdict(open_store(request.store).resolve(request.dataset))
    _print_policy(launch(f"train-{algorithm}", request, run_training, prefect=prefect), request.dataset)


@train.command
def ppo(
    *,
    start: Annotated[str, Parameter(name="--from")],
    dataset: str | None = None,
    updates: int | None = None,
    episodes_per_update: int | None = None,
    env_seeds_per_update: int | None = None,
    seed: int = 0,
    name: str = "ppo",
    store: str | None = None,
    workers: int | None = None,
    no_prefect: Flag = False,
    run_name: str | None = None,
) -> None:
    """Fine-tune a checkpoint with PPO on live episodes, which join the dataset with role `online`.

    Args:
        start: Folder of the checkpoint to start from.
        dataset: NAME or NAME@n whose environments are used (default: the checkpoint's).
        updates: Policy updates.
        episodes_per_update: Episodes for each.
        env_seeds_per_update: Environment seeds for each.
        seed: Training seed.
        name: The policy's name.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        workers: Worker processes (default: one per core); 0 runs in this process.
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time).
    """
    from flows.training import PpoRequest, run_ppo

    sizes = {
        "updates": updates,
        "episodes_per_update": episodes_per_update,
        "env_seeds_per_update": env_seeds_per_update,
    }
    request = PpoRequest.parse(
        {
            "start": start,
            "dataset": dataset,
            "seed": seed,
            "name": name,
            "settings": {key: value for key, value in sizes.items() if value is not None},
            "store": store,
            "workers": default_workers() if workers is None else workers,
            "run_name": run_name,
        },
        "esper train ppo",
    )
    policy = launch("train-ppo", request, run_ppo, prefect=not no_prefect)
    note_verdict(request.resolve()[1])
    _print_policy(policy, dataset)


def _print_policy(policy: LearnedPolicy, dataset: str | None) -> None:
    print(f"policy      {policy.name}   digest {policy.digest[:16]}")
    print(f"checkpoint  {policy.path}")
    print(f"next: esper evaluate {dataset or 'NAME'} --policy {policy.path}")
