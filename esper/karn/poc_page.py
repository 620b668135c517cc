"""The proof of concept as a Markdown page, and its raw values in the JSON file beside it.

A page gathers the tables of several commands: a new table of the same study on the same environment takes the place of
the old one, the others stay.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from esper.karn.comparison_table import number
from esper.leyline.comparison import Interval
from esper.leyline.errors import SchemaError, SpecError, StoreError
from esper.leyline.poc import PocArmResult, PocFile, PocTable, RunOrigin, Study
from esper.leyline.spec_base import Spec

File = TypeVar("File", bound=Spec)

TITLES: dict[Study, str] = {
    "growth": "Growth at equal epochs",
    "sunk-cost": "Sunk cost: the host is trained already",
}

GROWN: dict[Study, tuple[str, ...]] = {
    "growth": ("published", "early-mid", "early-all", "heuristic"),
    "sunk-cost": ("grown", "grown-by-actions"),
}
"""The arms that grow: what the study asks about."""

INTRODUCTION = """\
# Proof of concept: what growing brings over not growing

Every arm starts from the same initial weights and sees the same data order per environment seed, so differences are
paired. Accuracies are on the test set, of the committed network. In brackets 95 % intervals over environment seeds
(Student's t below 20 seeds, BCa from 20). No seed is left out. `CPU s` are seconds of one core for one episode that
runs alone, validation included. Raw values per seed: `{json}`.
"""

PUBLISHED = """\
### The published figures, and why they cannot be read against each other

| figure | test % | what it was |
|---|---|---|
| host alone | 69.31 | one seed, 10 epochs at 0.01, no drop |
| grown, fixed schedule | 80.16 | one seed, 25 epochs: 15 at 0.01, then 10 at 0.001 |
| grown, heuristic | 82.16 | one seed, up to 40 epochs and up to 3 seeds, blending at half the learning rate |
| bigger network from scratch | 65.97 | one seed, 25 epochs at 0.01, no drop, last epoch |
| re-run: host alone | 64.8 / 74.3 | one seed, JPEG images: 10 epochs / 25 epochs with the drop |
| re-run: grown, fixed schedule | 78.3 | one seed, JPEG images, 25 epochs with the drop |
| re-run: bigger from scratch | 81.7 | one seed, JPEG images, 25 epochs with the drop |

The published grown network trained for more epochs than its host and had a tenfold learning-rate drop that neither the
host nor the bigger network got; 32 x 32 images with crop and flip, 50,000 training rows in 391 batches of 128, a host
of 32/64/128 channels, one heavy seed of the same size in the middle slot with batch norm (here group norm), and a blend
a s(h) + (1 - a) h with h detached (here h + a d(h), co-adapting).
"""


def update_poc_page(page: Path, table: PocTable) -> PocFile:
    """Put a table into the JSON file beside the page, write the page anew, and return all of its tables.

    Raises:
        SchemaError: The JSON file is there and is not one of ours.
        StoreError: One of the two cannot be read or written.
    """
    known = read_raw(page, PocFile)
    others = [old for old in known.tables if (old.study, old.environment) != (table.study, table.environment)]
    tables = sorted([*others, table], key=lambda each: (list(TITLES).index(each.study), each.environment))
    file = PocFile(tables=tuple(tables))
    write_page(page, file, poc_markdown(file, raw_path(page).name))
    return file


def check_page(page: Path, kind: type[Spec]) -> None:
    """Raise where a page could not be written in the end: a study takes hours, its name is checked before.

    Raises:
        SpecError: It is no Markdown file.
        SchemaError: The JSON file beside it is there and is not one of ours.
        StoreError: Its folder cannot be made or written.
    """
    if page.suffix != ".md":
        raise SpecError(f"--out {str(page)!r} is no Markdown file\n  expected: a path that ends in .md")
    folder = next(parent for parent in (page.parent, *page.parent.parents) if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or page.is_dir():
        raise StoreError(f"cannot write {page}\n  expected: a file in a folder that may be written; see --out")
    read_raw(page, kind)


def raw_path(page: Path) -> Path:
    """Return the JSON file that belongs to a page."""
    return page.with_suffix(".json")


def read_raw(page: Path, kind: type[File]) -> File:
    """Return what the JSON file beside a page holds; empty where there is none."""
    path = raw_path(page)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return kind()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError:
        raise SchemaError(
            f"{path} does not hold the raw values of such a page\n  move it away or choose another page with --out"
        ) from None


def write_page(page: Path, file: Spec, text: str) -> None:
    """Write a page and its JSON file; StoreError where one cannot be written."""
    for path, content in ((raw_path(page), file.model_dump_json(indent=1) + "\n"), (page, text)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from None


def poc_markdown(file: PocFile, json_name: str) -> str:
    """Return the whole page."""
    parts = [INTRODUCTION.format(json=json_name)]
    parts += [_section(table) for table in file.tables]
    if any(table.study == "growth" and table.data.startswith("cifar10") for table in file.tables):
        parts.append(PUBLISHED)
    return "\n".join(parts)


def headings(table: PocTable) -> list[str]:
    """Return the headings of a table's rows."""
    differences = [f"minus {name}" for name in table.references]
    return ["arm", "epochs", "test %", *differences, "committed", "parameters", "train GFLOP", "CPU s"]


def row(table: PocTable, arm: PocArmResult) -> list[str]:
    """Return an arm as one row of text."""
    mishaps = [(arm.num_diverged, "diverged"), (arm.num_rolled_back, "rolled back")]
    told = "".join(f", {count} {word}" for count, word in mishaps if count)
    differences = [arm.differences.get(name) for name in table.references]
    return [
        arm.name + told,
        str(arm.num_epochs),
        bracketed(arm.test_accuracy_percent),
        *("–" if each is None else bracketed(each, signed=True) for each in differences),
        f"{arm.num_fossils:.3g}",
        f"{arm.params:,.0f}",
        f"{arm.train_gflops:,.3g}" if arm.train_gflops < 1000 else f"{arm.train_gflops:,.0f}",
        f"{arm.cpu_s:.3g}",
    ]


def findings(table: PocTable) -> list[str]:
    """Return one sentence per arm that grows and reference: higher, lower, or undecided."""
    said = []
    for arm in table.arms:
        if arm.name not in GROWN[table.study]:
            continue
        for name, interval in arm.differences.items():
            word = "higher than" if interval.low > 0 else "lower than" if interval.high < 0 else "not told apart from"
            said.append(f"`{arm.name}` is {word} `{name}`: {bracketed(interval, signed=True)} points.")
    return said


def bracketed(interval: Interval, *, signed: bool = False) -> str:
    """Return a mean and, in brackets, the ends of its interval."""
    mean, low, high = (number(value, 1, signed=signed) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} … {high})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def origin_text(origin: RunOrigin) -> str:
    """Return the command, machine and data of a table, as Markdown."""
    machine = origin.machine
    return (
        f"```console\n$ {origin.command}\n```\n\n"
        f"Data: {origin.source}, digest `{origin.digest}`. "
        f"Machine: {machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('system')}, "
        f"Python {machine.get('python')}; commit {origin.code_commit[:12]}, "
        f"{origin.ended_at}; the command took {origin.wall_s:,.0f} s (what was stored before is not run again).\n"
    )


def _section(table: PocTable) -> str:
    rows = [row(table, arm) for arm in table.arms]
    parts = [
        f"## {TITLES[table.study]}: {table.environment}\n",
        f"{len(table.replicates)} environment seeds. Host: {table.host}. Data: {table.data}. "
        f"Training: {table.clock}.\n",
        markdown_table(headings(table), rows),
        "\n".join(f"- {line}" for line in findings(table)) + "\n",
        "\n".join(f"- `{arm.name}`: {arm.what}." for arm in table.arms) + "\n",
        "\n".join(table.notes) + "\n",
        origin_text(table.origin),
    ]
    return "\n".join(parts)
