"""Pieces of a dataset's card: Markdown that no value can break out of, and the columns with their units."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from esper.leyline.observations import FEATURES, slot_column
from esper.leyline.schema import SCHEMAS

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")

UNITS: Mapping[str, str] = {
    "env_seed": "seed",
    "step": "host epochs",
    "epsilon": "probability",
    "temperature": "1",
    "valid_ops": "bitmap of ops",
    "valid_slots": "bitmap of slots, one per op",
    "tree_mask": "packed bits of the action tree",
    "behaviour_logp": "nats",
    "op_probs": "probability, one per op",
    "reward_accuracy_points": "points",
    "reward_growth_log2": "doublings",
    "control_val_loss": "nats",
    "control_val_accuracy": "fraction",
    "final_val_accuracy": "fraction",
    "final_test_accuracy": "fraction",
    "uncommitted_val_accuracy": "fraction",
    "uncommitted_test_accuracy": "fraction",
    "control_final_val_accuracy": "fraction",
    "control_final_test_accuracy": "fraction",
    "shapley": "points, one per slot",
    "final_seed_params": "parameters",
    "host_params": "parameters",
    "train_flops": "operations",
    "num_steps": "decisions",
    "num_rollbacks": "rollbacks",
    "num_fossils": "seeds",
    **{f"num_{op}": "decisions" for op in ("wait", "germinate", "advance", "fossilize", "prune")},
    "created_at": "time, UTC",
    "cpu_s_alone": "CPU seconds",
    "cpu_s_shared": "CPU seconds",
    "riders": "episodes",
    "attempt": "count from 1",
}
"""Units of the columns that are no observed feature; where there is none the column is a name, an index or a flag."""


def text(value: object) -> str:
    """Return a value as Markdown that reads as that text and nothing else, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def code(value: object) -> str:
    """Return a value as a piece of code on one line."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39)).replace('|', '¦')}`"


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: Any) -> str:
    """Return a number for people: thousands apart, four significant digits; `–` for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else text(value)


def brief(value: Any) -> str:
    """Return a specification's value in one line, as plain text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {brief(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return " ".join(brief(item) for item in value) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def schema_section() -> list[str]:
    """Return every column of the three tables with type and unit; the six slots of a feature in one line."""
    parts = []
    for name, schema in SCHEMAS.items():
        parts += [f"### `{name}`", table(("column", "type", "unit and range"), _columns(schema))]
    return parts


def _columns(schema: pa.Schema) -> Iterable[tuple[str, str, str]]:
    features = {column: feature for feature in FEATURES for column in feature.columns}
    for field in schema:
        feature = features.get(field.name)
        if feature is None:
            yield code(field.name), _type(field), text(UNITS.get(field.name, ""))
        elif feature.scope == "global":
            yield code(field.name), _type(field), _range(feature.unit, feature.low, feature.high)
        elif field.name == feature.columns[0]:
            names = f"{code(field.name)} … {code(slot_column(len(feature.columns) - 1, feature.name))}"
            yield names, _type(field), _range(feature.unit, feature.low, feature.high)


def _type(field: pa.Field) -> str:
    return text(field.type) + ("" if field.nullable else ", never null")


def _range(unit: str, low: float, high: float) -> str:
    return f"{text(unit)}; {low:g} to {high:g}".replace("inf", "∞").replace("-", "−") if unit else ""
