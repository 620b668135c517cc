"""Are the logged propensities ones that (1 - epsilon) policy + epsilon u can have, and what is their ratio to u."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esper.leyline.actions import NUM_OPS, Bools
from quality.arrays import Floats, Ints, flags, numbers
from quality.audit import RatioSums, TreeAudit
from quality.support import Calibration

LOGP_TOLERANCE = 1e-6
CERTAIN = 1 - 1e-9

DETERMINISTIC_KINDS = ("heuristic", "never-act", "schedule")
"""Controllers whose greedy action is certain: at epsilon 0 their propensity is 1."""


def op_probabilities(batch: pa.Table) -> Floats:
    """Return `op_probs`, float64 [N, 5]; NaN where null or of another length."""
    lists = batch["op_probs"].combine_chunks()
    told = np.asarray(pc.equal(pc.list_value_length(lists), NUM_OPS).fill_null(False))
    probs = np.full((batch.num_rows, NUM_OPS), np.nan)
    values = pc.list_flatten(lists.filter(pa.array(told)))
    probs[told] = values.to_numpy(zero_copy_only=False).reshape(-1, NUM_OPS)
    return probs


def impossible(
    batch: pa.Table, valid_N5: Bools, forced_N: Bools, uniform_N5: Floats, op_N: Ints, logp_u: Floats
) -> Bools:
    """Return bool [N]: the propensity contradicts (1 - epsilon) policy + epsilon u.

    Args:
        batch: The rows.
        valid_N5: Which ops are valid, bool [N, 5].
        forced_N: WAIT alone is valid, bool [N].
        uniform_N5: u's op probabilities, float64 [N, 5].
        op_N: The op taken, int64 [N].
        logp_u: u's log-probability of the action, float64 [N], NaN where the action is invalid.
    """
    logp, epsilon = numbers(batch, "behaviour_logp"), numbers(batch, "epsilon")
    known = np.isfinite(logp)
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.log(epsilon) + logp_u
        mass, least = np.exp(logp), epsilon * np.exp(logp_u)
        wrong = known & ((logp > LOGP_TOLERANCE) | (logp < floor - LOGP_TOLERANCE))
    kind = batch["kind"].to_numpy()
    certain = np.isin(kind.astype(str), DETERMINISTIC_KINDS) | ((kind == "random") & (epsilon == 1))
    certain &= np.isnan(numbers(batch, "temperature"))
    greedy = np.abs(mass - least - (1 - epsilon)) <= LOGP_TOLERANCE
    explored = (epsilon > 0) & (np.abs(mass - least) <= LOGP_TOLERANCE)
    wrong |= known & certain & ~greedy & ~explored
    wrong |= known & forced_N & (np.abs(logp) > LOGP_TOLERANCE)
    probs = op_probabilities(batch)
    told = np.isfinite(probs).all(axis=1)
    chosen = np.take_along_axis(probs, np.clip(op_N, 0, NUM_OPS - 1)[:, None], axis=1)[:, 0]
    with np.errstate(invalid="ignore"):
        off = np.abs(probs.sum(axis=1) - 1) > LOGP_TOLERANCE
        off |= (probs < epsilon[:, None] * uniform_N5 - LOGP_TOLERANCE).any(axis=1)
        off |= (~valid_N5 & (probs > LOGP_TOLERANCE)).any(axis=1)
        off |= known & (mass > chosen + LOGP_TOLERANCE)
    return np.asarray(wrong | (told & off), dtype=bool)


def add_ratios(audit: TreeAudit, batch: pa.Table, usable: Bools, logp_u: Floats) -> None:
    """Add u / mu - 1 of the rows that were drawn with 0 < epsilon < 1 (at 1, mu is u and the ratio says nothing)."""
    logp, epsilon = numbers(batch, "behaviour_logp"), numbers(batch, "epsilon")
    known = usable & np.isfinite(logp) & ~flags(batch, "replayed")
    log_ratio = np.where(known, logp_u - np.where(known, logp, 0.0), np.nan).astype(np.float32)
    audit.log_ratios.append(
        (batch["number"].to_numpy().astype(np.int32), batch["step"].to_numpy().astype(np.int32), log_ratio)
    )
    take = known & (epsilon > 0) & (epsilon < 1) & np.isnan(numbers(batch, "plan")) & ~flags(batch, "forced")
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


def add_calibration(audit: TreeAudit, batch: pa.Table, usable: Bools, op_N: Ints) -> None:
    """Add the op probabilities of the rows that left something to chance, and the ops that were taken there."""
    probs = op_probabilities(batch)
    with np.errstate(invalid="ignore"):
        chance = usable & np.isfinite(probs).all(axis=1) & (probs.max(axis=1, initial=0) < CERTAIN)
    chance &= ~flags(batch, "replayed") & ~flags(batch, "forced") & np.isfinite(numbers(batch, "behaviour_logp"))
    if not chance.any():
        return
    places = batch["environment"].to_numpy().astype(str)
    for name in np.unique(places[chance]):
        of = chance & (places == name)
        predicted, taken = probs[of], op_N[of][:, None] == np.arange(NUM_OPS)
        open_ = (predicted > 0) & (predicted < CERTAIN)
        audit.calibration.setdefault(str(name), Calibration()).add(predicted[open_], taken[open_])
