"""Which rows: the rows behind a failing check, with the columns that explain them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.errors import SpecError, UnknownNameError, unknown_name
from esper.leyline.observations import slot_column
from esper.leyline.schema import ACTION_FIELDS
from quality import dynamics, effect, leakage, structure
from quality.measures import Offences
from quality.rewards import audit_rewards
from quality.thresholds import load_thresholds
from quality.tree_audit import run_audit
from quality.working import prepare

__all__ = ["ROW_CHECKS", "failing_rows", "prepare"]

_STAGES = tuple(slot_column(slot, "stage") for slot in range(MAX_SLOTS))
_ALPHAS = tuple(slot_column(slot, "alpha") for slot in range(MAX_SLOTS))
_ACTION = ("op", *ACTION_FIELDS)
_REWARD = (
    *("val_accuracy", "control_val_accuracy", "seed_params", "host_params"),
    *("reward_accuracy_points", "reward_growth_log2", "final_val_accuracy", "control_final_val_accuracy"),
)
_OUTCOME = ("controller", "epsilon", "role", "replicate", "outcome", "num_steps", "final_val_accuracy")

_KEPT = [
    pa.field("environment", pa.string()),
    pa.field("episode_id", pa.string()),
    pa.field("step", pa.int32()),
    pa.field("found", pa.string()),
]


@dataclass(frozen=True, slots=True)
class RowCheck:
    """How to list the rows of a check.

    Attributes:
        find: Returns the offending rows, given the connection and how many are wanted.
        table: Where the explaining columns come from: `steps`, or `episodes` where a whole episode is wrong.
        columns: The columns that explain a row.
    """

    find: Callable[[duckdb.DuckDBPyConnection, int], duckdb.DuckDBPyRelation]
    table: str
    columns: tuple[str, ...]


def _all(relation: Offences) -> Callable[[duckdb.DuckDBPyConnection, int], duckdb.DuckDBPyRelation]:
    return lambda connection, _: relation(connection)


def _wrong(relation: Offences) -> Callable[[duckdb.DuckDBPyConnection, int], duckdb.DuckDBPyRelation]:
    return lambda connection, _: relation(connection).filter("wrong").project("environment, episode_id, step, found")


def _audited(kind: str) -> Callable[[duckdb.DuckDBPyConnection, int], duckdb.DuckDBPyRelation]:
    def find(connection: duckdb.DuckDBPyConnection, limit: int) -> duckdb.DuckDBPyRelation:
        if kind in ("steps", "episodes"):
            kept = getattr(audit_rewards(connection, {}, keep=limit), kind).kept
        else:
            kept = getattr(run_audit(connection, keep=limit), kind).kept
        return connection.from_arrow(pa.Table.from_pylist(kept, schema=pa.schema(_KEPT)))

    return find


ROW_CHECKS: Mapping[str, RowCheck] = {
    "structure": RowCheck(_all(structure.broken), "episodes", _OUTCOME),
    "required_values": RowCheck(_all(structure.missing), "steps", ("is_last", *_ACTION, "executed")),
    "episode_ends": RowCheck(_all(structure.wrong_ends), "steps", ("horizon", "is_last", "terminated", "truncated")),
    "finite_values": RowCheck(_all(structure.not_finite), "steps", ("actor", "is_last")),
    "feature_ranges": RowCheck(_all(structure.out_of_range), "steps", ("actor", "is_last")),
    "legal_transitions": RowCheck(_all(dynamics.illegal), "steps", (*_ACTION, "executed", *_STAGES)),
    "interventions_have_effect": RowCheck(
        _all(dynamics.without_effect), "steps", (*_ACTION, "executed", "host_key", *_STAGES)
    ),
    "executed_flags": RowCheck(_all(dynamics.wrong_flags), "steps", ("op", "action_slot", "executed", "refused_by")),
    "alpha_range": RowCheck(_all(dynamics.wrong_alpha), "steps", (*_ALPHAS, *_STAGES)),
    "paired_control": RowCheck(
        _all(dynamics.unpaired), "steps", ("host_key", "val_loss", "control_val_loss", "val_accuracy")
    ),
    "valid_actions": RowCheck(_audited("actions"), "steps", (*_ACTION, "valid_ops", "valid_slots")),
    "masks_recompute": RowCheck(
        _audited("masks"), "steps", ("valid_ops", "valid_slots", "forced", "max_seeds", "max_fossils", *_STAGES)
    ),
    "propensity_consistent": RowCheck(
        _audited("propensities"), "steps", ("actor", "epsilon", "op", "behaviour_logp", "op_probs", "forced")
    ),
    "germinations_make_seeds": RowCheck(_wrong(effect.births), "steps", (*_ACTION, "executed", *_STAGES)),
    "seeds_receive_gradient": RowCheck(
        _wrong(effect.seeds),
        "steps",
        tuple(slot_column(slot, name) for name in ("gradient_norm", "blueprint") for slot in range(MAX_SLOTS)),
    ),
    "growth_changes_host": RowCheck(_wrong(effect.grown), "episodes", (*_OUTCOME, "num_fossils")),
    "reward_recompute": RowCheck(_audited("steps"), "steps", _REWARD),
    "return_telescopes": RowCheck(_audited("episodes"), "episodes", (*_OUTCOME, "control_final_val_accuracy")),
    "duplicates": RowCheck(_all(leakage.doubled), "episodes", _OUTCOME),
    "seed_split_leak": RowCheck(_all(leakage.leaked), "episodes", ("env_seed", *_OUTCOME)),
}
"""The checks that single rows fail; the others are properties of the whole."""


def failing_rows(connection: duckdb.DuckDBPyConnection, check_name: str, limit: int = 100) -> pa.Table:
    """Return the rows that fail a check, in order of (environment, episode_id, step).

    Args:
        connection: A connection with the views `steps` and `episodes`, as `karn.catalogue.connect` returns it.
        check_name: The check.
        limit: The greatest number of rows.

    Returns:
        Columns environment, episode_id, step (null where the whole episode is wrong), found (what is wrong, in words)
        and the columns of `steps` or `episodes` that explain it.

    Raises:
        UnknownNameError: There is no such check.
        SpecError: The check has no rows.
    """
    if check_name not in load_thresholds():
        raise unknown_name("health check", check_name, load_thresholds())
    if check_name not in ROW_CHECKS:
        raise _without_rows(check_name)
    prepare(connection)
    chosen = ROW_CHECKS[check_name]
    first = "environment, episode_id, step, found"
    found = chosen.find(connection, limit).order("environment, episode_id, step, found").limit(limit)
    keyed = pa.table(found.project(first).to_arrow_table())
    offending = connection.from_arrow(keyed.append_column("place", pa.array(range(keyed.num_rows), pa.int64())))
    explaining = ", ".join(f"any_value({name}) AS {name}" for name in chosen.columns)
    keys = "episode_id AS of_episode" + (", step AS of_step" if chosen.table == "steps" else "")
    wanted = (
        connection.table(chosen.table).filter(_among(keyed))
        if keyed.num_rows
        else connection.table(chosen.table).limit(0)
    )
    grouped = wanted.aggregate(f"{keys}, {explaining}", "episode_id" + (", step" if chosen.table == "steps" else ""))
    on = "episode_id = of_episode" + (" AND step = of_step" if chosen.table == "steps" else "")
    joined = offending.join(grouped, on, how="left").order("place")
    return joined.project(", ".join((first, *chosen.columns))).to_arrow_table()


def _among(keyed: pa.Table) -> str:
    ids = sorted(set(keyed["episode_id"].to_pylist()))
    return "episode_id IN (" + ", ".join("'" + name.replace("'", "''") + "'" for name in ids) + ")"


def _without_rows(check_name: str) -> UnknownNameError | SpecError:
    listed = ", ".join(ROW_CHECKS)
    return SpecError(f"check {check_name!r} is a property of the whole dataset and has no rows\n  with rows: {listed}")
