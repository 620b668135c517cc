"""The incubation study as a Markdown page, and its raw values in the JSON file beside it."""

from __future__ import annotations

from pathlib import Path

from esper.karn.comparison_table import number
from esper.karn.poc_page import markdown_table, origin_text, raw_path, read_raw, write_page
from esper.leyline.poc import IncubationFile, IncubationTable, Spread

Section = tuple[str, list[str], list[list[str]]]
"""Title, headings and rows."""

INTRODUCTION = """\
# Incubation: through the own pass, or linearised

One seed per episode, born at epoch 1, blended linearly over 3 epochs, co-adapting, and committed. `own_pass` trains it
through its own pass of the suffix, on batch statistics; `linearised` from the gradient that the host computes at the
slot. Six epochs are one more than the longest dwell of the action tree: the five-epoch schedule with one WAIT forced.
Raw values per environment seed: `{json}`.
"""


def update_incubation_page(page: Path, table: IncubationTable) -> IncubationFile:
    """Put a table into the JSON file beside the page, write the page anew, and return all of its tables.

    Raises:
        SchemaError: The JSON file is there and is not one of ours.
        StoreError: One of the two cannot be read or written.
    """
    known = read_raw(page, IncubationFile)
    others = [old for old in known.tables if old.environment != table.environment]
    file = IncubationFile(tables=tuple(sorted([*others, table], key=lambda each: each.environment)))
    parts = [INTRODUCTION.format(json=raw_path(page).name)]
    for each in file.tables:
        parts.append(f"## {each.environment}: {len(each.replicates)} environment seeds\n")
        for title, head, rows in sections(each):
            parts.append(f"### {title}\n\n{markdown_table(head, rows)}")
        parts.append(origin_text(each.origin))
    write_page(page, file, "\n".join(parts))
    return file


def sections(table: IncubationTable) -> list[Section]:
    """Return the tables of the study: gains, what the probes foretell, cost."""
    return [_gains(table), _probes(table), _costs(table)]


def _plus_minus(value: Spread, digits: int = 1, *, signed: bool = True) -> str:
    return f"{number(value.mean, digits, signed=signed)} ± {value.sd:.{digits}f}"


def _gains(table: IncubationTable) -> Section:
    columns = list(dict.fromkeys((arm.incubation, arm.incubation_epochs) for arm in table.arms))
    cells = {(a.blueprint, a.slot, a.incubation, a.incubation_epochs): a.gain_points for a in table.arms}
    seeds = list(dict.fromkeys((arm.blueprint, arm.slot) for arm in table.arms))
    rows = [
        [f"{blueprint}, {slot}", *(_plus_minus(cells[blueprint, slot, way, epochs]) for way, epochs in columns)]
        for blueprint, slot in seeds
    ]
    head = ["seed", *(f"{way} {epochs}" for way, epochs in columns)]
    return "Final paired gain, points (mean ± sd over environment seeds) by incubation epochs", head, rows


def _probes(table: IncubationTable) -> Section:
    epochs = list(range(1, 1 + max(cell.epoch for cell in table.probes)))
    cells = {(c.incubation, c.incubation_epochs, c.probe, c.epoch): c for c in table.probes}
    lines = list(dict.fromkeys((c.incubation, c.incubation_epochs, c.probe) for c in table.probes))
    rows = []
    for line in lines:
        texts = []
        for epoch in epochs:
            cell = cells.get((*line, epoch))
            texts.append("" if cell is None else f"{_correlation(cell.overall)} ({_correlation(cell.within)})")
        rows.append([f"{line[0]}, {line[1]} epochs, {line[2]}", *texts])
    title = "Correlation of each shadow probe with the final gain by incubation epoch (within environment seed)"
    return title, ["way, length, probe", *(f"epoch {epoch}" for epoch in epochs)], rows


def _correlation(value: float | None) -> str:
    return "–" if value is None else number(value, 2)


def _costs(table: IncubationTable) -> Section:
    rows = [
        [
            f"{cost.incubation_epochs}",
            _plus_minus(cost.cpu_ratio, 2, signed=False),
            _plus_minus(cost.operations_ratio, 2, signed=False),
        ]
        for cost in table.costs
    ]
    head = ["incubation epochs", "CPU seconds", "training operations"]
    return "Cost of a whole episode, own pass over linearised", head, rows
