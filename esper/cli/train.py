"""`esper train`: offline learners, one or a grid of them, and PPO from one of their checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from esper.cli.launch import default_workers, launch, workers_for
from esper.cli.output import note_verdict

if TYPE_CHECKING:
    from esper.leyline.controller_specs import LearnedPolicy
    from esper.leyline.grid import TrainingTable
    from flows.grid import TrainingResult
    from flows.selection import Selected

train = App(
    name="train",
    help="Train controllers; a checkpoint is safetensors, JSON and a model card in the run's folder.",
    result_action="return_value",
)

Flag = Annotated[bool, Parameter(negative="")]
Seeds = Annotated[list[int] | None, Parameter(name=["--seeds", "--seed"], negative="", consume_multiple=True)]

LEARNERS = ("bc", "rwbc", "iql", "cql", "imitate", "ppo")
LIVE_ENV_SEEDS = 20


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What every training run takes.

    Attributes:
        grid: Name of a grid, or a TOML file: every combination of its field values is a policy (without a learner's
            name the default is `offline`: every learner with its own recipe).
        seeds: Training seeds; every recipe is trained with each (default: 0).
        patience: Stop a learner after so many measurements without a lower loss on held-out environment seeds
            (default: the recipe's).
        split: Name of the stored split of the version whose validation seeds are held out (`esper dataset splits`).
        tensorboard: Write the losses under the run's folder for `tensorboard --logdir`.
        select: Rank the policies by off-policy evaluation, try the first three on live selection episodes, and report
            the winner beside every control on held-out environment seeds.
        pipeline: Name of a pipeline, or a TOML file: its evaluation cells are where `--select` runs live.
        override_health: Reason to train without a verdict or against it; every later report prints it.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        workers: Worker processes (default: one per core); 0 runs in this process.
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time). The same name goes on where that run stopped.
    """

    grid: str | None = None
    seeds: Seeds = None
    patience: int | None = None
    split: str = "default"
    tensorboard: Flag = False
    select: Flag = False
    pipeline: str = "demo"
    override_health: str | None = None
    store: str | None = None
    workers: int | None = None
    no_prefect: Flag = False
    run_name: str | None = None

    def request(self) -> dict[str, Any]:
        """The same as fields of a request."""
        fields = asdict(self)
        fields.pop("no_prefect")
        workers, seeds = fields.pop("workers"), fields.pop("seeds")
        return {
            **fields,
            "workers": default_workers() if workers is None else workers,
            "seeds": seeds or [0],
        }


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Learner(Options):
    """What one learner takes.

    Attributes:
        recipe: Name of a recipe, or a TOML file (default: the learner's own).
        name: The policy's name (default: the learner's).
    """

    recipe: str | None = None
    name: str | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Backed(Learner):
    """What a learner takes that d3rlpy has too.

    Attributes:
        backend: Whose implementation: Esper's on the action tree, or d3rlpy's on a flat list of the data's actions.
    """

    backend: Literal["esper", "d3rlpy"] = "esper"


ALL, ONE, EITHER = Options(), Learner(), Backed()


@train.default
def every(dataset: str, /, *rest: Annotated[str, Parameter(show=False)], options: Options = ALL) -> None:
    """Train every learner of a grid.

    Args:
        dataset: NAME or NAME@n.
        rest: Nothing; a second word means that the first one was to be a learner.
        options: What every training run takes.
    """
    if rest:
        from esper.leyline.errors import unknown_name

        raise unknown_name("learner", dataset, LEARNERS)
    _offline(None, dataset, options)


@train.command
def bc(dataset: str, /, *, options: Backed = EITHER) -> None:
    """Behaviour cloning: imitate the actions of a sealed version.

    Args:
        dataset: NAME or NAME@n.
        options: What the learner takes.
    """
    _offline("bc", dataset, options)


@train.command
def rwbc(dataset: str, /, *, options: Learner = ONE) -> None:
    """Return-weighted behaviour cloning: imitate the better episodes more often.

    Args:
        dataset: NAME or NAME@n.
        options: What the learner takes.
    """
    _offline("rwbc", dataset, options)


@train.command
def iql(dataset: str, /, *, options: Backed = EITHER) -> None:
    """Implicit Q-learning: expectile values, then an advantage-weighted policy.

    Args:
        dataset: NAME or NAME@n.
        options: What the learner takes.
    """
    _offline("iql", dataset, options)


@train.command
def cql(dataset: str, /, *, options: Backed = EITHER) -> None:
    """Conservative Q-learning.

    Args:
        dataset: NAME or NAME@n.
        options: What the learner takes.
    """
    _offline("cql", dataset, options)


@train.command
def imitate(
    dataset: str,
    /,
    *,
    live_env_seeds: int | None = None,
    heuristic: str | None = None,
    options: Learner = ONE,
) -> None:
    """The imitation policy of the concept documents: a small classifier of the heuristic's decisions.

    Args:
        dataset: NAME or NAME@n.
        live_env_seeds: Selection environment seeds on which it meets the heuristic (default: 20 for one policy); 0 for
            none.
        heuristic: The rule beside it: `heuristic` or a behaviour (default: the one whose levers it uses).
        options: What the learner takes.
    """
    one = options.grid is None and len(options.seeds or [0]) == 1
    live = (LIVE_ENV_SEEDS if one else 0) if live_env_seeds is None else live_env_seeds
    _offline("imitate", dataset, options, live_env_seeds=live, heuristic=heuristic)


def _offline(algorithm: str | None, dataset: str, options: Options, **more: Any) -> None:
    from esper.karn.store import open_store
    from flows.grid import TrainRequest, run_training

    command = "train" if algorithm is None else f"train-{algorithm}"
    given = {"algorithm": algorithm, "dataset": dataset, **options.request(), **more}
    request = TrainRequest.parse(given, f"esper {command.replace('-', ' ')}")
    note_verdict(open_store(request.store).resolve(request.dataset))
    result = launch(command, request, run_training, prefect=not options.no_prefect)
    _print_result(result, request.dataset, options.tensorboard)
    if result.selected is not None:
        from flows.evaluation import require_controls

        require_controls(result.selected.evaluation)


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
    devices: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
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
        workers: Worker processes (default: one per core, or one per device); 0 runs in this process.
        devices: What each worker computes on, `cpu` or `cuda:N`; of the kind that the version's environments declare.
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
            "workers": workers_for(workers, devices),
            "devices": devices,
            "run_name": run_name,
        },
        "esper train ppo",
    )
    policy = launch("train-ppo", request, run_ppo, prefect=not no_prefect)
    note_verdict(request.resolve()[1])
    _print_policy(policy, dataset)


def _print_result(result: TrainingResult, dataset: str, tensorboard: bool) -> None:
    if result.imitation is not None:
        from esper.cli.imitation import print_imitation

        print_imitation(result.imitation)
    table = result.table
    if tensorboard:
        print(f"losses      tensorboard --logdir {table.folder}/tensorboard")
    if len(table.rows) == 1 and result.selected is None:
        _print_policy(table.rows[0].policy, dataset)
        return
    _print_table(table)
    print(f"checkpoints  {table.folder}/checkpoints")
    if result.selected is None:
        print(f"next: esper ope {dataset} --policy {table.folder}/checkpoints/*")
    else:
        _print_selected(result.selected, dataset)


def _print_selected(selected: Selected, dataset: str) -> None:
    from esper.cli.comparison import print_comparison
    from esper.cli.output import rich_table

    found = selected.selection
    rows = [(trial.policy, trial.predicted_return, trial.live_return) for trial in found.candidates]
    title = f"selected: {found.winner}, on {found.num_selection_seeds} selection seeds of each environment"
    print(rich_table(("policy", "predicted return", "live return"), rows, title), end="")
    print_comparison(selected.evaluation)
    print(f"page  {selected.page}")
    print(f"next: esper report {dataset} --run-name {selected.page.parent.name}")


def _print_table(table: TrainingTable) -> None:
    from esper.cli.output import rich_table

    heads = ("policy", "seed", "held-out loss", "", "step", "seconds", "weights")
    rows = []
    for row in table.rows:
        name, loss = row.held_out or ("", None)
        step = row.metrics.get("chosen_step", row.metrics.get("step"))
        wall_s = None if row.was_stored else round(row.wall_s, 1)
        rows.append(
            (row.policy.name, row.seed, loss, name, None if step is None else int(step), wall_s, row.policy.digest[:16])
        )
    print(rich_table(heads, rows, f"{table.dataset}: {len(rows)} policies"), end="")


def _print_policy(policy: LearnedPolicy, dataset: str | None) -> None:
    print(f"policy      {policy.name}   digest {policy.digest[:16]}")
    print(f"checkpoint  {policy.path}")
    print(f"next: esper evaluate {dataset or 'NAME'} --policy {policy.path}")
