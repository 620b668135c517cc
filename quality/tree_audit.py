"""Masks, actions and propensities, recomputed with leyline's own tree operations, one batch of decision rows at a time.

Masks repeat from row to row, and so do the columns that they follow from: what depends on them alone is computed once
per distinct combination of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esper.leyline.actions import (
    ACTION_WIDTH,
    DWELL_EPOCHS,
    LEVER_SIZES,
    LEVERS,
    MAX_SLOTS,
    NUM_OPS,
    OP_SLICE,
    TEMPO_EPOCHS,
    TREE_WIDTH,
    Bools,
    Op,
    is_forced,
    is_valid,
    lever_slice,
    pack_mask,
    slot_slice,
    unpack_mask,
)
from esper.leyline.masks import LeverRules, build_mask
from esper.leyline.observations import slot_column
from esper.leyline.schema import ACTION_FIELDS
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import Stage
from esper.leyline.tree import log_prob, log_softmax, uniform_logits
from quality.arrays import Floats, Ints, flags, numbers, ops
from quality.audit import Tally, TreeAudit
from quality.measures import rows
from quality.propensities import add_calibration, add_ratios, impossible

BATCH_ROWS = 131_072
MASK_BYTES = (TREE_WIDTH + 7) // 8

_MASK_FEATURES = (
    *("num_slots", "max_seeds", "max_fossils", "param_budget", "seed_params"),
    *(slot_column(slot, name) for name in ("stage", "epochs_in_stage", "dwell", "tempo") for slot in range(MAX_SLOTS)),
)
_OTHERS = (
    *("environment", "environment_id", "env_seed", "role", "episode_id", "number", "step", "kind", "replayed"),
    *("forced", "valid_ops", "valid_slots", "tree_mask", "op", "epsilon", "temperature", "plan"),
    *("behaviour_logp", "op_probs"),
)

GERMINATE_ENTRIES = np.zeros(TREE_WIDTH, dtype=bool)
GERMINATE_ENTRIES[Op.GERMINATE] = True
GERMINATE_ENTRIES[slot_slice(Op.GERMINATE)] = True
GERMINATE_ENTRIES[lever_slice(0, 0).start :] = True


def _mask_key() -> str:
    """The SQL of a hash of all that the stored mask is compared with.

    Epochs count up to the longest dwell alone; up to the longest tempo while blending, where every gate is asked.
    """
    parts = ["environment_id", "tree_mask", "valid_ops", "valid_slots", "forced", "param_budget IS NULL"]
    for name in _MASK_FEATURES:
        if name.endswith("_epochs_in_stage"):
            blends = f"asks AND {name.replace('epochs_in_stage', 'stage')} = {int(Stage.BLENDING)}"
            longest = f"CASE WHEN {blends} THEN {max(TEMPO_EPOCHS)} ELSE {max(DWELL_EPOCHS)} END"
            parts.append(f"least({name}, {longest})")
        elif name.endswith("_tempo"):
            parts.append(f"CASE WHEN asks THEN {name} END")
        elif name not in ("param_budget", "seed_params"):
            parts.append(name)
    return f"hash({', '.join(parts)})"


def batches(connection: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """Yield the sound decision rows with the columns that the audit reads."""
    columns = ", ".join((*_OTHERS, *_MASK_FEATURES, *ACTION_FIELDS))
    decided = connection.table("health_rows").filter("NOT is_last AND op IS NOT NULL")
    for batch in decided.project(f"{columns}, {_mask_key()} AS mask_key").to_arrow_reader(BATCH_ROWS):
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def coherent(mask_NT: Bools) -> Bools:
    """Return bool [N]: WAIT is valid and every valid choice leads to a whole action."""
    good = mask_NT[:, Op.WAIT].copy()
    for op in list(Op)[1:]:
        good &= mask_NT[:, op] == mask_NT[:, slot_slice(op)].any(axis=1)
    for slot in range(MAX_SLOTS):
        needed = mask_NT[:, slot_slice(Op.GERMINATE)][:, slot]
        for lever in range(len(LEVERS)):
            good &= ~needed | mask_NT[:, lever_slice(slot, lever)].any(axis=1)
    return good


def _stored_masks(batch: pa.Table) -> tuple[Bools, Bools]:
    """Return the masks of rows, bool [U, T], and which of them have the wrong length (WAIT alone stands for them)."""
    column = batch["tree_mask"].combine_chunks()
    bad = np.asarray(pc.not_equal(pc.binary_length(column), MASK_BYTES).to_numpy(zero_copy_only=False)).astype(bool)
    wait_only = np.zeros((1, TREE_WIDTH), dtype=bool)
    wait_only[0, Op.WAIT] = True
    column = pc.if_else(pa.array(bad), pa.scalar(pack_mask(wait_only).tobytes(), column.type), column)
    packed = np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint8).reshape(-1, MASK_BYTES)
    return unpack_mask(packed), bad


def _expected_masks(batch: pa.Table, rules: dict[str, LeverRules]) -> Bools:
    """Return the masks that the columns imply without a parameter budget (blueprint sizes are not in the rows)."""
    columns = {name: numbers(batch, name) for name in _MASK_FEATURES}
    columns["param_budget"] = np.full(batch.num_rows, np.nan)
    expected = np.zeros((batch.num_rows, TREE_WIDTH), dtype=bool)
    ids = batch["environment_id"].to_numpy().astype(str)
    for environment_id in np.unique(ids):
        of = ids == environment_id
        expected[of] = build_mask({name: values[of] for name, values in columns.items()}, rules[str(environment_id)])
    return expected


def _bitmaps_agree(batch: pa.Table, masks_UT: Bools) -> Bools:
    """Return bool [U]: `valid_ops`, `valid_slots` and `forced` say what the mask says."""
    ops_U = masks_UT[:, OP_SLICE] @ (1 << np.arange(NUM_OPS))
    powers = 1 << np.arange(MAX_SLOTS)
    slots_U = np.zeros((len(masks_UT), NUM_OPS), dtype=np.int64)
    for op in range(1, NUM_OPS):
        slots_U[:, op] = masks_UT[:, slot_slice(op)] @ powers
    good = batch["valid_ops"].to_numpy() == ops_U
    good &= flags(batch, "forced") == is_forced(masks_UT)
    lists = batch["valid_slots"].combine_chunks()
    told = np.asarray(pc.equal(pc.list_value_length(lists), NUM_OPS).fill_null(False))
    good &= told
    stored = pc.list_flatten(lists.filter(pa.array(told))).to_numpy().reshape(-1, NUM_OPS)
    good[told] &= (stored == slots_U[told]).all(axis=1)
    return np.asarray(good, dtype=bool)


@dataclass(frozen=True, slots=True)
class _Masks:
    """The distinct masks of a batch, bool [U, T], the index of each row among them, and which are coherent."""

    masks_UT: Bools
    index_N: Ints
    sound_U: Bools


def _check_masks(audit: TreeAudit, batch: pa.Table, rules: dict[str, LeverRules]) -> _Masks:
    """Tally wrong masks; return the distinct ones."""
    _, first, index_N = np.unique(batch["mask_key"].to_numpy(), return_index=True, return_inverse=True)
    distinct = batch.take(pa.array(first))
    stored, bad = _stored_masks(distinct)
    sound_U = coherent(stored)
    # A parameter budget can only take GERMINATE choices away.
    budget = np.isfinite(numbers(distinct, "param_budget"))
    allowed = budget[:, None] & GERMINATE_ENTRIES & ~stored
    differs = (stored != _expected_masks(distinct, rules)) & ~allowed
    wrong_U = bad | ~sound_U | differs.any(axis=1)
    other_U = ~wrong_U & ~_bitmaps_agree(distinct, stored)
    audit.masks.add(batch, wrong_U[index_N], "tree_mask is not what the columns imply")
    audit.masks.add(batch, other_U[index_N], "valid_ops, valid_slots or forced differ")
    return _Masks(stored, index_N, sound_U)


def _distinct_actions(batch: pa.Table, index_N: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the distinct (mask, action) pairs: the mask's index [P], the action [P, A], and each row's pair [N]."""
    heads = [numbers(batch, name) for name in ACTION_FIELDS]
    actions = np.nan_to_num(np.stack([ops(batch).astype(np.float64), *heads], axis=1), nan=-1).astype(np.int64)
    codes = index_N.astype(np.int64)
    for column in range(ACTION_WIDTH):
        codes = codes * 32 + np.clip(actions[:, column], -1, 30) + 1
    _, first, pair_N = np.unique(codes, return_index=True, return_inverse=True)
    return index_N[first], actions[first], pair_N


def _audit_batch(audit: TreeAudit, batch: pa.Table, rules: dict[str, LeverRules]) -> None:
    masks = _check_masks(audit, batch, rules)
    mask_P, actions_P, pair_N = _distinct_actions(batch, masks.index_N)
    masks_PT = masks.masks_UT[mask_P]
    valid_P = is_valid(actions_P, masks_PT)
    audit.actions.add(batch, ~valid_P[pair_N], "the action is not canonical or not in its mask")
    usable_P = valid_P & masks.sound_U[mask_P]
    uniform_UT = np.full(masks.masks_UT.shape, -np.inf)
    some = masks.sound_U
    if some.any():
        uniform_UT[some] = log_softmax(uniform_logits(int(some.sum())), masks.masks_UT[some])
    logp_P: Floats = np.full(len(mask_P), np.nan)
    if usable_P.any():
        logp_P[usable_P] = log_prob(uniform_UT[mask_P[usable_P]], actions_P[usable_P], masks_PT[usable_P])
    usable, logp_u, op_N = usable_P[pair_N], logp_P[pair_N], actions_P[:, 0][pair_N]
    wrong = impossible(
        batch,
        masks.masks_UT[:, OP_SLICE][masks.index_N],
        is_forced(masks.masks_UT)[masks.index_N],
        np.exp(uniform_UT[:, OP_SLICE])[masks.index_N],
        op_N,
        logp_u,
    )
    wrong &= usable & ~flags(batch, "replayed")  # a replayed prefix was drawn by its parent
    audit.propensities.add(batch, wrong, "behaviour_logp or op_probs cannot be")
    add_ratios(audit, batch, usable & ~wrong, logp_u)
    add_calibration(audit, batch, usable & ~wrong, op_N)


def lever_rules(connection: duckdb.DuckDBPyConnection) -> dict[str, LeverRules]:
    """Return by environment id what GERMINATE offers, all blueprints at no cost."""
    specs = rows(connection.sql("SELECT environment_id, min(environment_spec) AS spec FROM episodes GROUP BY ALL"))
    free = np.zeros((MAX_SLOTS, LEVER_SIZES[0]), dtype=np.int64)
    return {
        row["environment_id"]: LeverRules.of(EnvironmentSpec.model_validate_json(row["spec"]), free) for row in specs
    }


def run_audit(connection: duckdb.DuckDBPyConnection, *, keep: int = 0) -> TreeAudit:
    """Return what one pass over the sound decision rows finds; `keep` rows of each kind of offence are kept."""
    rules = lever_rules(connection)
    audit = TreeAudit(masks=Tally(keep), actions=Tally(keep), propensities=Tally(keep))
    for batch in batches(connection):
        _audit_batch(audit, batch, rules)
    return audit
