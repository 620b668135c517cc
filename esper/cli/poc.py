"""`esper poc`: the proof of concept. What does growing bring over not growing?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from esper.cli.launch import default_workers, launch

if TYPE_CHECKING:
    from esper.leyline.poc import IncubationTable, PocTable

poc = App(
    name="poc",
    help="The proof of concept: growing against not growing, at equal epochs and at equal operations.",
    result_action="return_value",
)

Flag = Annotated[bool, Parameter(negative="")]
Names = Annotated[list[str] | None, Parameter(consume_multiple=True)]

GROWTH_TASKS = ("cifar10", "cifar-impaired")
SUNK_COST_TASKS = ("digits-gap", "cifar16-gap")
PAGE, INCUBATION_PAGE = "docs/results/poc.md", "docs/results/incubation.md"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What every study takes.

    Attributes:
        data: Folder of the host's data, for example that of CIFAR-10 as Parquet (default: $ESPER_DATA).
        seeds: Environment seeds, at least 2.
        workers: Worker processes (default: one per core); 0 runs in this process.
        train_rows: Training rows, one pass over them an epoch, validation on a fifth as many (default: the
            environment's).
        resolution: Height and width of the images, pixels (default: the environment's).
        max_epochs: Most epochs of an episode; never more than the environment has, which is the default.
        max_batches: Most training batches of an epoch (default: the environment's).
        learning_rate: The optimiser's, before its schedule (default: the environment's).
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time).
    """

    data: str | None = None
    seeds: int = 8
    workers: int | None = None
    train_rows: int | None = None
    resolution: int | None = None
    max_epochs: int | None = None
    max_batches: int | None = None
    learning_rate: float | None = None
    store: str | None = None
    no_prefect: Flag = False
    run_name: str | None = None

    def sizes(self) -> dict[str, Any]:
        """What of an environment is replaced."""
        names = ("train_rows", "resolution", "max_epochs", "max_batches", "learning_rate")
        return {name: getattr(self, name) for name in names}

    def run(self) -> dict[str, Any]:
        """What a flow's request has beside its studies."""
        return {
            "data": self.data,
            "seeds": self.seeds,
            "workers": default_workers() if self.workers is None else self.workers,
            "store": self.store,
            "run_name": self.run_name,
        }


DEFAULTS = Options()


@poc.default
def everything(*, out: str = PAGE, options: Options = DEFAULTS) -> None:
    """Growth on CIFAR-10 and on an impaired host, and the sunk cost on two environments, on one page.

    Sizes apply to the CIFAR-10 environments alone. What the store holds already is not run again, so the same command
    goes on after an interruption.

    Args:
        out: The Markdown page; raw values are written to the JSON file beside it.
        options: What every study takes.
    """
    studies = [{"study": "growth", "task": task, "sizes": options.sizes()} for task in GROWTH_TASKS]
    studies += [{"study": "sunk-cost", "task": task, "sizes": {}} for task in SUNK_COST_TASKS]
    _studies(studies, out, options)


@poc.command
def growth(*, task: str = "cifar10", arms: Names = None, out: str = PAGE, options: Options = DEFAULTS) -> None:
    """Growing against the host alone, a wider host and the bigger network from scratch, at equal epochs.

    Args:
        task: Name of an environment.
        arms: Only these arms, and those to which they are compared (default: all).
        out: The Markdown page; raw values are written to the JSON file beside it.
        options: What every study takes.
    """
    _studies([{"study": "growth", "task": task, "sizes": options.sizes(), "arms": arms}], out, options)


@poc.command
def sunk_cost(
    *,
    task: str = "digits-gap",
    warm_epochs: int = 20,
    further_epochs: int = 6,
    arms: Names = None,
    out: str = PAGE,
    options: Options = DEFAULTS,
) -> None:
    """Growing a host that is trained already, against continuing it and against a new bigger network.

    Args:
        task: Name of an environment.
        warm_epochs: Epochs in which the host was trained.
        further_epochs: Epochs of growth, at least 5; the other arms get the same operations.
        arms: Only these arms, and those to which they are compared (default: all).
        out: The Markdown page; raw values are written to the JSON file beside it.
        options: What every study takes.
    """
    study = {"study": "sunk-cost", "task": task, "sizes": options.sizes(), "arms": arms}
    _studies([study | {"warm_epochs": warm_epochs, "further_epochs": further_epochs}], out, options)


@poc.command
def incubation(*, task: str = "digits-gap", out: str = INCUBATION_PAGE, options: Options = DEFAULTS) -> None:
    """Both ways of incubation for 1, 3 and 6 epochs: final gain, what the shadow probes foretell, cost.

    Args:
        task: Name of an environment.
        out: The Markdown page; raw values are written to the JSON file beside it.
        options: What every study takes.
    """
    from flows.incubation import IncubationRequest, run_incubation

    given = {"task": task, "sizes": options.sizes(), "out": out, **options.run()}
    request = IncubationRequest.parse(given, "esper poc incubation")
    table = launch("poc-incubation", request, run_incubation, prefect=not options.no_prefect)
    _print_incubation(table)
    print(f"page  {out}")


def _studies(studies: list[dict[str, Any]], out: str, options: Options) -> None:
    from flows.poc import PocRequest, run_poc

    request = PocRequest.parse({"studies": studies, "out": out, **options.run()}, "esper poc")
    for table in launch("poc", request, run_poc, prefect=not options.no_prefect):
        _print_poc(table)
    print(f"page  {out}")


def _print_poc(table: PocTable) -> None:
    from esper.cli.output import rich_table
    from esper.karn.poc_page import TITLES, findings, headings, row

    title = f"{TITLES[table.study]}: {table.environment}, {len(table.replicates)} environment seeds, 95 % intervals"
    print(rich_table(headings(table), [row(table, arm) for arm in table.arms], title), end="")
    for line in findings(table):
        print(f"  {line.replace('`', '')}")
    print()


def _print_incubation(table: IncubationTable) -> None:
    from esper.cli.output import rich_table
    from esper.karn.incubation_page import sections

    for title, head, rows in sections(table):
        print(rich_table(head, rows, f"{table.environment}: {title}"))
