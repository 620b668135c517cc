"""The `esper` command: a table of lazily imported sub-commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import TracebackType

from cyclopts import App
from cyclopts.exceptions import CycloptsError

USAGE, INTERRUPTED = 2, 130

COMMANDS: tuple[tuple[str, str], ...] = (
    ("pipeline", "Run everything: matrix, episodes, health, learning, evaluation, report."),
    ("datagen", "Generate the episodes of a matrix and seal them as a version."),
    ("health", "Check a sealed version and store its verdict."),
    ("train", "Train policies (bc, rwbc, iql, cql, imitate, ppo): one, or a grid of them."),
    ("evaluate", "Compare policies and controls on held-out environment seeds."),
    ("ope", "Estimate the return of policies from logged episodes alone."),
    ("heuristic", "Run the heuristic on an environment and show every epoch."),
    ("poc", "The proof of concept: growing against not growing."),
    ("report", "Write the HTML report of a run."),
    ("sql", "Query a sealed version with SQL."),
    ("serve", "Run schedules, triggers and workers: Prefect as a service."),
    ("dataset", "Datasets: list, show, compare, verify, repair, compact, split, describe, export, import."),
)
"""Name and summary; the command is the function or app of that name in `esper.cli.NAME`, imported when it runs."""


def build_app() -> App:
    """Return the application; no command's module is imported yet."""
    app = App(
        name="esper",
        help="Grow neural networks while they train: data, offline and online learning, comparison.",
        version=version("esper"),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for name, summary in COMMANDS:
        app.command(f"esper.cli.{name}:{name}", name=name, help=summary)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 failed, 2 usage, 3 blocked by health, 4 integrity, 130 interrupted.
    """
    from esper.leyline.errors import EsperError, unknown_name
    from esper.leyline.secrets import mask

    if arguments is None:
        sys.excepthook = _masked_trace
    given = list(sys.argv[1:] if arguments is None else arguments)
    known = [name for name, _ in COMMANDS]
    try:
        # cyclopts would import every command's module before it names the nearest one
        if given and not given[0].startswith("-") and given[0] not in known:
            raise unknown_name("command", given[0], known)
        build_app()(given, exit_on_error=False, print_error=True)
    except CycloptsError:
        return USAGE
    except EsperError as error:
        print(f"error: {mask(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _masked_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody foresaw is shown whole, but for credentials."""
    import traceback

    from esper.leyline.secrets import mask

    sys.stderr.write(mask("".join(traceback.format_exception(kind, error, trace))))


if __name__ == "__main__":
    sys.exit(main())
