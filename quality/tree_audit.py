"""Masks, actions and propensities, recomputed with leyline's own tree operations, one batch of decision rows at a time.

Masks repeat from row to row, so what depends on the mask alone is computed once per distinct mask of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper.leyline.actions import (
    LEVER_SIZES,
    LEVERS,
    MAX_SLOTS,
    NUM_OPS,
    OP_SLICE,
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
from esper.leyline.tree import log_prob, log_softmax, uniform_logits
from quality.measures import Measure, rows

BATCH_ROWS = 65_536
LOGP_TOLERANCE = 1e-6
MASK_BYTES = (TREE_WIDTH + 7) // 8

DETERMINISTIC_KINDS = ("heuristic", "never-act", "schedule")
"""Controllers whose greedy action is certain: at epsilon 0 their propensity is 1."""

_MASK_FEATURES = (
    *("num_slots", "max_seeds", "max_fossils", "param_budget", "seed_params"),
    *(slot_column(slot, name) for name in ("stage", "epochs_in_stage", "dwell") for slot in range(MAX_SLOTS)),
)
_OTHERS = (
    *("environment", "environment_id", "env_seed", "role", "episode_id", "step", "kind", "replayed", "forced"),
    *("valid_ops", "valid_slots", "tree_mask", "op", "epsilon", "temperature", "plan", "behaviour_logp", "op_probs"),
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
GERMINATE_ENTRIES = np.zeros(TREE_WIDTH, dtype=bool)
GERMINATE_ENTRIES[Op.GERMINATE] = True
GERMINATE_ENTRIES[slot_slice(Op.GERMINATE)] = True
GERMINATE_ENTRIES[lever_slice(0, 0).start :] = True


@dataclass
class _Tally:
    """Offences of one kind by environment."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, batch: pa.Table, wrong: Bools, what: str) -> None:
        """Count the rows that are wrong and keep the first as an example."""
        found = batch.select(["environment", "episode_id", "step"]).filter(pa.array(wrong))
        for environment, number in zip(*np.unique(found["environment"].to_numpy(), return_counts=True)):
            self.counts[environment] = self.counts.get(environment, 0) + int(number)
            if environment not in self.examples:
                row = found.filter(pa.compute.equal(found["environment"], environment)).slice(0, 1).to_pylist()[0]
                self.examples[environment] = f"{what} (episode {row['episode_id']} step {row['step']})"

    def measures(self, check: str, names: Sequence[str], sound: str) -> list[Measure]:
        """Return the count of every environment."""
        return [
            Measure(
                check=check,
                environment=name,
                value=float(self.counts.get(name, 0)),
                message=f"{self.counts[name]} rows; for example {self.examples[name]}"
                if name in self.counts
                else sound,
            )
            for name in names
        ]


@dataclass(frozen=True, slots=True)
class RatioSums:
    """Of the rows of one env_seed: the sum of u(a) / mu(a) - 1, of its square, and their number."""

    total: float = 0.0
    squares: float = 0.0
    rows: int = 0

    def __add__(self, other: RatioSums) -> RatioSums:
        """Return the sums over both sets of rows."""
        return RatioSums(self.total + other.total, self.squares + other.squares, self.rows + other.rows)


@dataclass
class TreeAudit:
    """What one pass over the decision rows found.

    Attributes:
        masks: Masks that do not follow from the row's own columns.
        actions: Actions that are not canonical or not in their mask.
        propensities: Propensities that no mixture of a policy with u can have.
        ratios: What the propensity audit needs, by (environment, env_seed).
    """

    masks: _Tally = field(default_factory=_Tally)
    actions: _Tally = field(default_factory=_Tally)
    propensities: _Tally = field(default_factory=_Tally)
    ratios: dict[tuple[str, int], RatioSums] = field(default_factory=dict)


def batches(connection: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """Yield the sound decision rows with the columns that the audit reads."""
    columns = ", ".join((*_OTHERS, *_MASK_FEATURES, *ACTION_FIELDS))
    joined = connection.sql(
        "SELECT s.*, e.environment_id FROM health_rows AS s JOIN health_episodes AS e USING (episode_id) "
        "WHERE NOT s.is_last AND s.op IS NOT NULL"
    )
    reader = joined.project(columns).to_arrow_reader(BATCH_ROWS)
    for batch in reader:
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def numbers(batch: pa.Table, name: str) -> Floats:
    """Return a column as float64 [N], NaN where null."""
    column = batch[name].cast(pa.float64()).combine_chunks()
    result: Floats = pa.compute.fill_null(column, np.nan).to_numpy(zero_copy_only=False)
    return result


def flags(batch: pa.Table, name: str) -> Bools:
    """Return a boolean column, bool [N]; null is false."""
    return np.asarray(pa.compute.fill_null(batch[name], False).to_numpy(), dtype=bool)


def ops(batch: pa.Table) -> Ints:
    """Return the codes of `op`, int64 [N]; -1 where the name is unknown or null."""
    found = pa.compute.index_in(batch["op"].cast(pa.string()), pa.array([op.name for op in Op]))
    return np.asarray(pa.compute.fill_null(found, -1).to_numpy(), dtype=np.int64)


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


def _distinct_masks(batch: pa.Table) -> tuple[Bools, Ints, Bools]:
    """Return the distinct masks, each row's index among them, and the rows whose mask has the wrong length."""
    column = batch["tree_mask"].combine_chunks()
    bad = np.asarray(pa.compute.not_equal(pa.compute.binary_length(column), MASK_BYTES).to_numpy(zero_copy_only=False))
    wait_only = np.zeros((1, TREE_WIDTH), dtype=bool)
    wait_only[0, Op.WAIT] = True
    column = pa.compute.if_else(pa.array(bad), pa.scalar(pack_mask(wait_only).tobytes(), column.type), column)
    encoded = column.dictionary_encode()
    packed = np.frombuffer(b"".join(encoded.dictionary.to_pylist()), dtype=np.uint8).reshape(-1, MASK_BYTES)
    return unpack_mask(packed), encoded.indices.to_numpy().astype(np.int64), bad.astype(bool)


def _expected_masks(batch: pa.Table, rules: dict[str, LeverRules]) -> Bools:
    """Return the masks that the columns imply without a parameter budget (blueprint sizes are not in the rows)."""
    columns = {name: numbers(batch, name) for name in _MASK_FEATURES}
    columns["param_budget"] = np.full(batch.num_rows, np.nan)
    expected = np.zeros((batch.num_rows, TREE_WIDTH), dtype=bool)
    ids = batch["environment_id"].to_numpy()
    for environment_id in np.unique(ids):
        of = ids == environment_id
        expected[of] = build_mask({name: values[of] for name, values in columns.items()}, rules[environment_id])
    return expected


def _bitmaps_agree(batch: pa.Table, masks_UT: Bools, index_N: Ints) -> Bools:
    """Return bool [N]: `valid_ops`, `valid_slots` and `forced` say what the mask says."""
    ops_U = masks_UT[:, OP_SLICE] @ (1 << np.arange(NUM_OPS))
    powers = 1 << np.arange(MAX_SLOTS)
    slots_U = np.zeros((len(masks_UT), NUM_OPS), dtype=np.int64)
    for op in range(1, NUM_OPS):
        slots_U[:, op] = masks_UT[:, slot_slice(op)] @ powers
    good = batch["valid_ops"].to_numpy() == ops_U[index_N]
    good &= flags(batch, "forced") == is_forced(masks_UT)[index_N]
    lists = batch["valid_slots"].combine_chunks()
    if (pa.compute.list_value_length(lists).to_numpy() != NUM_OPS).any():
        return np.zeros(batch.num_rows, dtype=bool)
    stored = pa.compute.list_flatten(lists).to_numpy().reshape(-1, NUM_OPS)
    return np.asarray(good & (stored == slots_U[index_N]).all(axis=1), dtype=bool)


def _check_masks(audit: TreeAudit, batch: pa.Table, rules: dict[str, LeverRules]) -> tuple[Bools, Ints, Bools]:
    """Tally wrong masks; return the distinct masks, the index of each row, and which distinct ones are coherent."""
    masks_UT, index_N, bad = _distinct_masks(batch)
    sound_U = coherent(masks_UT)
    stored, expected = masks_UT[index_N], _expected_masks(batch, rules)
    differs = stored != expected
    # A parameter budget can only take GERMINATE choices away.
    budget = np.isfinite(numbers(batch, "param_budget"))
    allowed = budget[:, None] & GERMINATE_ENTRIES & ~stored
    wrong = bad | ~sound_U[index_N] | (differs & ~allowed).any(axis=1)
    audit.masks.add(batch, wrong, "tree_mask is not what the columns imply")
    audit.masks.add(
        batch, ~wrong & ~_bitmaps_agree(batch, masks_UT, index_N), "valid_ops, valid_slots or forced differ"
    )
    return masks_UT, index_N, sound_U


def _audit_batch(audit: TreeAudit, batch: pa.Table, rules: dict[str, LeverRules]) -> None:
    masks_UT, index_N, sound_U = _check_masks(audit, batch, rules)
    heads = [numbers(batch, name) for name in ACTION_FIELDS]
    actions = np.nan_to_num(np.stack([ops(batch).astype(np.float64), *heads], axis=1), nan=-1).astype(np.int64)
    valid = is_valid(actions, masks_UT[index_N])
    audit.actions.add(batch, ~valid, "the action is not canonical or not in its mask")
    usable = valid & sound_U[index_N]
    logp_u = np.full(batch.num_rows, np.nan)
    uniform_UT = np.full(masks_UT.shape, -np.inf)
    uniform_UT[sound_U] = log_softmax(uniform_logits(int(sound_U.sum())), masks_UT[sound_U])
    logp_u[usable] = log_prob(uniform_UT[index_N[usable]], actions[usable], masks_UT[index_N[usable]])
    wrong = _impossible(batch, masks_UT[index_N], np.exp(uniform_UT[index_N][:, OP_SLICE]), actions[:, 0], logp_u)
    audit.propensities.add(batch, wrong & usable, "behaviour_logp or op_probs cannot be")
    _add_ratios(audit, batch, usable & ~wrong, logp_u)


def _impossible(batch: pa.Table, mask_NT: Bools, uniform_ops_N5: Floats, op_N: Ints, logp_u: Floats) -> Bools:
    """Return bool [N]: the propensity contradicts (1 - epsilon) policy + epsilon u."""
    logp, epsilon = numbers(batch, "behaviour_logp"), numbers(batch, "epsilon")
    known = np.isfinite(logp)
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.log(epsilon) + logp_u
        mass, least = np.exp(logp), epsilon * np.exp(logp_u)
        wrong = known & ((logp > LOGP_TOLERANCE) | (logp < floor - LOGP_TOLERANCE))
    kind = batch["kind"].to_numpy()
    certain = np.isin(kind, DETERMINISTIC_KINDS) | ((kind == "random") & (epsilon == 1))
    certain &= np.isnan(numbers(batch, "temperature"))
    greedy = np.abs(mass - least - (1 - epsilon)) <= LOGP_TOLERANCE
    explored = (epsilon > 0) & (np.abs(mass - least) <= LOGP_TOLERANCE)
    wrong |= known & certain & ~greedy & ~explored
    wrong |= known & is_forced(mask_NT) & (np.abs(logp) > LOGP_TOLERANCE)
    lists = batch["op_probs"].combine_chunks()
    told = np.asarray(pa.compute.equal(pa.compute.list_value_length(lists), NUM_OPS).fill_null(False))
    probs = np.full((batch.num_rows, NUM_OPS), np.nan)
    told_lists = lists.filter(pa.array(told))
    probs[told] = pa.compute.list_flatten(told_lists).to_numpy(zero_copy_only=False).reshape(-1, NUM_OPS)
    told &= np.isfinite(probs).all(axis=1)
    chosen = np.take_along_axis(probs, np.clip(op_N, 0, NUM_OPS - 1)[:, None], axis=1)[:, 0]
    with np.errstate(invalid="ignore"):
        off = np.abs(probs.sum(axis=1) - 1) > LOGP_TOLERANCE
        off |= (probs < epsilon[:, None] * uniform_ops_N5 - LOGP_TOLERANCE).any(axis=1)
        off |= (~mask_NT[:, OP_SLICE] & (probs > LOGP_TOLERANCE)).any(axis=1)
        off |= known & (mass > chosen + LOGP_TOLERANCE)
    return np.asarray(wrong | (told & off), dtype=bool)


def _add_ratios(audit: TreeAudit, batch: pa.Table, usable: Bools, logp_u: Floats) -> None:
    """Add u / mu - 1 of the rows that were drawn with 0 < epsilon < 1 (at 1, mu is u and the ratio says nothing)."""
    logp, epsilon = numbers(batch, "behaviour_logp"), numbers(batch, "epsilon")
    take = usable & np.isfinite(logp) & (epsilon > 0) & (epsilon < 1) & np.isnan(numbers(batch, "plan"))
    take &= ~flags(batch, "replayed") & ~flags(batch, "forced")
    if not take.any():
        return
    excess = np.exp(logp_u[take] - logp[take]) - 1
    drawn = batch.select(["environment", "env_seed"]).filter(pa.array(take))
    drawn = drawn.append_column("excess", pa.array(excess)).append_column("square", pa.array(excess**2))
    sums = drawn.group_by(["environment", "env_seed"]).aggregate(
        [("excess", "sum"), ("square", "sum"), ("excess", "count")]
    )
    for row in sums.to_pylist():
        key = (row["environment"], row["env_seed"])
        new = RatioSums(row["excess_sum"], row["square_sum"], row["excess_count"])
        audit.ratios[key] = audit.ratios.get(key, RatioSums()) + new


def lever_rules(connection: duckdb.DuckDBPyConnection) -> dict[str, LeverRules]:
    """Return by environment id what GERMINATE offers, all blueprints at no cost."""
    specs = rows(connection.sql("SELECT environment_id, min(environment_spec) AS spec FROM episodes GROUP BY ALL"))
    free = np.zeros((MAX_SLOTS, LEVER_SIZES[0]), dtype=np.int64)
    return {
        row["environment_id"]: LeverRules(free, EnvironmentSpec.model_validate_json(row["spec"]).lever_masks())
        for row in specs
    }


def run_audit(connection: duckdb.DuckDBPyConnection) -> TreeAudit:
    """Return what one pass over the sound decision rows finds."""
    rules = lever_rules(connection)
    audit = TreeAudit()
    for batch in batches(connection):
        _audit_batch(audit, batch, rules)
    return audit
