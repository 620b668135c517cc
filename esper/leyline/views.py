"""Views: from feature columns to the float32 matrices that networks see. Only finite numbers leave a view.

`v1` is the 27-number encoding of the imitation policy, `v3` the 23 + 31 per slot of the published recurrent policy
(followed by one blueprint index per slot, -1 for none, for a learned embedding), `v4` adds indicators for unmeasured
values and what a policy needs to transfer: host descriptors, optimiser, sizes, levers and shadow probes. `v4-hidden` is
`v4` with everything zero that says which host it is; what is measured on the host (curves, probes, gradients) stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import DWELL_EPOCHS, LEVER_SIZES, MAX_SLOTS, NUM_OPS, SEED_LR_FACTORS, TEMPO_EPOCHS
from esper.leyline.errors import SpecError, unknown_name
from esper.leyline.observations import CONTRIBUTION_PERCENTS, NUM_LAGS, Columns, slot_column
from esper.leyline.stages import BLENDED_STAGES, LIVE_STAGES, STAGE_ORDER, Stage

Floats = NDArray[np.float32]
Named = list[tuple[str, NDArray[np.floating]]]

EMBEDDED_BLUEPRINTS = LEVER_SIZES[0]


@dataclass(frozen=True, slots=True)
class View:
    """A named encoding; `encode(columns, step_N)` returns float32 [N, width]."""

    name: str
    names: tuple[str, ...]
    build: Callable[[Columns, NDArray[np.integer]], Named]
    num_blueprint_indices: int = 0

    @property
    def width(self) -> int:
        """Columns of the matrix, blueprint indices included."""
        return len(self.names)

    def encode(self, columns: Columns, step_N: NDArray[np.integer]) -> Floats:
        """Return the matrix of a batch of rows.

        Args:
            columns: Feature columns, float [N] each, NaN where unmeasured.
            step_N: Decisions taken so far, int [N].
        """
        parts = [np.asarray(values, dtype=np.float32) for _, values in self.build(columns, step_N)]
        return np.nan_to_num(np.stack(parts, axis=1), nan=0.0, posinf=0.0, neginf=0.0)


def symlog(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return sign(x) * log(1 + |x|)."""
    result: NDArray[np.floating] = np.sign(values) * np.log1p(np.abs(values))
    return result


def _fill(values: NDArray[np.floating], sentinel: float) -> NDArray[np.floating]:
    out: NDArray[np.floating] = np.where(np.isfinite(values), values, sentinel)
    return out


def _clip(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Limit to the published range of losses and differences."""
    out: NDArray[np.floating] = np.clip(values, -100, 100)
    return out


def _flag(values: NDArray[np.bool_]) -> NDArray[np.floating]:
    out: NDArray[np.floating] = np.asarray(values, dtype=np.float32)
    return out


def _lags(columns: Columns, name: str) -> list[NDArray[np.floating]]:
    """Oldest first, five values."""
    return [columns[f"{name}_lag{lag}"] for lag in range(NUM_LAGS, 0, -1)] + [columns[name]]


def _stage(columns: Columns, slot: int) -> NDArray[np.floating]:
    stage: NDArray[np.floating] = np.asarray(columns[slot_column(slot, "stage")])
    return stage


def _in_stage(columns: Columns, slot: int, stages: frozenset[Stage]) -> NDArray[np.bool_]:
    present = columns[slot_column(slot, "present")] > 0
    inside: NDArray[np.bool_] = np.isin(_stage(columns, slot), [int(stage) for stage in stages]) & present
    return inside


def _furthest(columns: Columns, name: str, empty: float) -> NDArray[np.floating]:
    """The feature of the live seed furthest in its life (stage, then epochs in it)."""
    best = np.full(len(columns["horizon"]), -1.0)
    out = np.full(len(best), empty)
    for slot in range(MAX_SLOTS):
        live = _in_stage(columns, slot, LIVE_STAGES)
        score = np.where(live, _stage(columns, slot) * 1000 + columns[slot_column(slot, "epochs_in_stage")], -1.0)
        take = live & (score > best)
        out = np.where(take, columns[slot_column(slot, name)], out)
        best = np.where(take, score, best)
    return out


def _build_v1(columns: Columns, step_N: NDArray[np.integer]) -> Named:
    def loss(values: NDArray[np.floating]) -> NDArray[np.floating]:
        return _clip(_fill(values, 10.0))

    def delta(values: NDArray[np.floating]) -> NDArray[np.floating]:
        return _clip(_fill(values, 0.0))

    step = step_N.astype(np.float32)
    live = np.zeros(len(step), dtype=bool)
    free = np.zeros(len(step))
    for slot in range(MAX_SLOTS):
        live |= _in_stage(columns, slot, LIVE_STAGES)
        free += _in_stage(columns, slot, frozenset({Stage.DORMANT}))
    out: Named = [
        ("epoch", step),
        ("global_step", step * columns["batches_per_epoch"]),
        ("train_loss", loss(columns["train_loss"])),
        ("val_loss", loss(columns["val_loss"])),
        ("loss_delta", delta(columns["val_loss_lag1"] - columns["val_loss"])),
        ("train_accuracy", 100 * _fill(columns["train_accuracy"], 0.0)),
        ("val_accuracy", 100 * _fill(columns["val_accuracy"], 0.0)),
        ("accuracy_delta", delta(100 * (columns["val_accuracy"] - columns["val_accuracy_lag1"]))),
        ("plateau_epochs", columns["plateau_epochs"]),
        ("best_val_accuracy", 100 * _fill(columns["best_val_accuracy"], 0.0)),
        ("best_val_loss", loss(columns["best_val_loss"])),
    ]
    histories = zip(_lags(columns, "val_loss"), _lags(columns, "val_accuracy"))
    pairs = list(histories)
    out += [(f"loss_history_{i}", np.clip(_fill(pair[0], 0.0), -100, 100)) for i, pair in enumerate(pairs)]
    out += [(f"accuracy_history_{i}", 100 * _fill(pair[1], 0.0)) for i, pair in enumerate(pairs)]
    out += [
        ("has_active_seed", _flag(live)),
        ("seed_stage", _furthest(columns, "stage", 0.0)),
        ("seed_epochs_in_stage", _furthest(columns, "epochs_in_stage", 0.0)),
        ("seed_alpha", _furthest(columns, "alpha", 0.0)),
        ("seed_improvement", delta(_furthest(columns, "seed_improvement", 0.0))),
        ("available_slots", free),
    ]
    return out


def _base_v3(columns: Columns, step_N: NDArray[np.integer], num_slots: int) -> Named:
    count = float(num_slots)

    def share(stages: frozenset[Stage]) -> NDArray[np.floating]:
        flags = [_flag(_in_stage(columns, slot, stages)) for slot in range(num_slots)]
        result: NDArray[np.floating] = np.sum(flags, axis=0) / count
        return result

    out: Named = [
        ("progress", step_N / columns["horizon"]),
        ("val_loss", symlog(columns["val_loss"]) / 7),
        ("val_accuracy", columns["val_accuracy"]),
    ]
    for i, values in enumerate(_lags(columns, "val_loss")):
        out.append((f"loss_history_{i}", _fill(symlog(values) / 7, -1.0)))
    for i, values in enumerate(_lags(columns, "val_accuracy")):
        out.append((f"accuracy_history_{i}", _fill(values, -1.0)))
    out += [
        ("share_training", share(frozenset({Stage.TRAINING}))),
        ("share_blending", share(frozenset({Stage.BLENDING}))),
        ("share_committed", share(frozenset({Stage.HOLDING, Stage.FOSSILIZED}))),
        ("last_executed", columns["last_executed"]),
    ]
    out += [(f"last_op_{op}", _flag(columns["last_op"] == op)) for op in range(NUM_OPS)]
    out.append(("last_op_none", _flag(columns["last_op"] < 0)))
    return out


_PUBLISHED_STAGES = (0, *(int(stage) for stage in STAGE_ORDER))
"""The published one-hot has ten places; code 0 is never used here."""


def _slot_v3(columns: Columns, slot: int) -> Named:
    def col(name: str) -> NDArray[np.floating]:
        return columns[slot_column(slot, name)]

    horizon = columns["horizon"]
    stage = col("stage")
    there = (stage != Stage.DORMANT) & (col("present") > 0)
    seeded = col("blueprint") >= 0
    blended = _in_stage(columns, slot, BLENDED_STAGES)
    blending = stage == Stage.BLENDING
    tempo = np.where(seeded, np.take(TEMPO_EPOCHS, np.clip(_fill(col("tempo"), 0), 0, None).astype(int)), 0.0)
    done = np.where(blending, np.minimum(col("epochs_in_stage"), tempo), np.where(blended, tempo, 0.0))
    blend = np.where(col("blend") < 1, 1, np.where(col("blend") < 4, 2, 3))
    named: Named = [("is_active", _flag(seeded))]
    named += [(f"stage_{code}", _flag(there & (stage == code))) for code in _PUBLISHED_STAGES]
    age = col("removal_age")
    named += [
        ("alpha", col("alpha")),
        ("counterfactual", np.clip(_fill(col("removal_cost"), 0.0) / 10, -1, 1)),
        ("contribution_velocity", np.clip(_fill(col("removal_cost_velocity"), 0.0) / 10, -1, 1)),
        ("tempo", tempo / 12),
        ("alpha_target", _flag(blended)),
        ("alpha_mode", _flag(blending) / 2),
        ("steps_total", np.where(blended, tempo, 0.0) / horizon),
        ("steps_done", done / horizon),
        ("time_to_target", np.where(blended, tempo - done, 0.0) / horizon),
        ("alpha_velocity", np.clip(_fill(col("blending_velocity"), 0.0), -1, 1)),
        ("algorithm", np.where(seeded, (blend - 1) / 2, 0.0)),
        ("interaction_sum", np.clip(_fill(col("interaction_sum"), 0.0) / 10, -1, 1)),
        ("gradient_norm", _fill(symlog(col("gradient_norm")) / 7, 0.0)),
        ("gradient_health", _fill(col("gradient_health"), 0.0)),
        ("gradient_vanishing", _flag(_fill(col("gradient_vanishing"), 0.0) > 0)),
        ("gradient_exploding", _flag(_fill(col("gradient_exploding"), 0.0) > 0)),
        ("gradient_health_previous", np.where(there, _fill(col("gradient_health_previous"), -1.0), 0.0)),
        ("epochs_in_stage", np.where(there, col("epochs_in_stage"), 0.0) / horizon),
        ("freshness", np.where(there, np.where(np.isfinite(age), 0.995 ** _fill(age, 0.0), -1.0), 0.0)),
        ("age", _fill(col("age"), 0.0) / horizon),
    ]
    return named


def _build_v3(num_slots: int) -> Callable[[Columns, NDArray[np.integer]], Named]:
    def build(columns: Columns, step_N: NDArray[np.integer]) -> Named:
        known = columns["num_slots"][np.isfinite(columns["num_slots"])]
        most = int(known.max(initial=0))
        if most > num_slots:
            raise SpecError(
                f"view v3 holds {num_slots} slots, the host has {most}\n  use view v4, which holds {MAX_SLOTS}"
            )
        out = _base_v3(columns, step_N, num_slots)
        for slot in range(num_slots):
            out += [(f"s{slot}_{name}", values) for name, values in _slot_v3(columns, slot)]
        out += [(f"s{s}_blueprint", _fill(columns[slot_column(s, "blueprint")], -1.0)) for s in range(num_slots)]
        return out

    return build


def _measured(name: str, values: NDArray[np.floating], scaled: NDArray[np.floating]) -> Named:
    """A value that may be unmeasured, as the value (0 if not) and an indicator."""
    known = np.isfinite(values)
    return [(name, np.where(known, scaled, 0.0)), (f"{name}_known", _flag(known))]


def _log10(values: NDArray[np.floating]) -> NDArray[np.floating]:
    result: NDArray[np.floating] = np.log10(np.maximum(values, 1e-12))
    return result


def _global_v4(columns: Columns, step_N: NDArray[np.integer]) -> Named:
    out = _base_v3(columns, step_N, MAX_SLOTS)
    num_slots = columns["num_slots"]
    out += _measured("train_loss", columns["train_loss"], symlog(columns["train_loss"]) / 7)
    out += _measured("train_accuracy", columns["train_accuracy"], columns["train_accuracy"])
    change, together = columns["host_weight_change"], columns["removal_cost_all"]
    out += _measured("host_weight_change", change, np.minimum(change, 1))
    out += _measured("removal_cost_all", together, np.clip(together / 10, -3, 3))
    occupied = np.zeros(len(num_slots))
    fossils = np.zeros(len(num_slots))
    for slot in range(MAX_SLOTS):
        occupied += columns[slot_column(slot, "blueprint")] >= 0
        fossils += _in_stage(columns, slot, frozenset({Stage.FOSSILIZED}))
    known_budget = np.isfinite(columns["param_budget"])
    left = np.where(known_budget, columns["param_budget"] - columns["seed_params"], 0.0)
    out += [
        ("best_val_accuracy", columns["best_val_accuracy"]),
        ("plateau", np.minimum(columns["plateau_epochs"], 10) / 10),
        ("log_learning_rate", _log10(columns["learning_rate"]) / 4),
        ("log_base_learning_rate", _log10(columns["base_learning_rate"]) / 4),
        ("adam", columns["optimiser"]),
        ("log_batch_size", np.log2(columns["batch_size"]) / 10),
        ("log_batches", np.log2(columns["batches_per_epoch"]) / 10),
        ("log_host_params", _log10(columns["host_params"]) / 8),
        ("host_depth", columns["host_depth"] / 40),
        ("growth", np.log2(1 + columns["seed_params"] / columns["host_params"]) / 5),
        ("horizon", columns["horizon"] / 100),
        ("num_slots", num_slots / MAX_SLOTS),
        ("seeds_left", (columns["max_seeds"] - occupied) / MAX_SLOTS),
        ("fossils_left", (columns["max_fossils"] - fossils) / MAX_SLOTS),
        ("budget_known", _flag(known_budget)),
        ("budget_left", np.clip(left / columns["host_params"], -1, 10) / 10),
        ("rollbacks", np.minimum(_fill(columns["num_rollbacks"], 0.0), 3) / 3),
    ]
    return out


def _levers_v4(columns: Columns, slot: int) -> Named:
    def col(name: str) -> NDArray[np.floating]:
        return columns[slot_column(slot, name)]

    def chosen(name: str, choices: tuple[float, ...], scale: float) -> NDArray[np.floating]:
        index = np.clip(_fill(col(name), 0), 0, len(choices) - 1).astype(int)
        return np.where(col(name) >= 0, np.take(choices, index) / scale, 0.0)

    out: Named = [(f"blueprint_{i}", _flag(col("blueprint") == i)) for i in range(LEVER_SIZES[0])]
    out += [(f"blend_{i}", _flag(col("blend") == i)) for i in range(LEVER_SIZES[1])]
    out += [
        ("dwell", chosen("dwell", tuple(float(v) for v in DWELL_EPOCHS), 5)),
        ("coadapt", _flag(col("isolation") == 1)),
        ("seed_lr", chosen("seed_lr", SEED_LR_FACTORS, 2)),
    ]
    return out


def _seed_measures_v4(columns: Columns, slot: int) -> Named:
    """What the levers are judged by: contributions on the way in, interaction, gradients."""

    def col(name: str) -> NDArray[np.floating]:
        return columns[slot_column(slot, name)]

    out: Named = []
    for percent in CONTRIBUTION_PERCENTS:
        kept = col(f"contribution_{percent}")
        out += _measured(f"contribution_{percent}", kept, np.clip(kept / 10, -3, 3))
    # The value itself is among the 31 of v3.
    out.append(("interaction_known", _flag(np.isfinite(col("interaction_sum")))))
    out += _measured("gradient_ratio", col("gradient_ratio"), col("gradient_ratio") / 10)
    out += _measured("gradient_variation", col("gradient_variation"), np.minimum(col("gradient_variation"), 3) / 3)
    out += _measured("stable_share", col("stable_share"), col("stable_share"))
    through = col("gradient_through_seed")
    return out + _measured("gradient_through_seed", through, symlog(through) / 7)


def _slot_v4(columns: Columns, slot: int) -> Named:
    def col(name: str) -> NDArray[np.floating]:
        return columns[slot_column(slot, name)]

    present = col("present") > 0
    out: Named = [("present", _flag(present)), *_slot_v3(columns, slot), *_levers_v4(columns, slot)]
    out += _measured("train_loss_drop", col("train_loss_drop"), np.clip(10 * col("train_loss_drop"), -3, 3))
    out += _measured("val_loss_drop", col("val_loss_drop"), np.clip(10 * col("val_loss_drop"), -3, 3))
    out += _measured("seed_improvement", col("seed_improvement"), np.clip(col("seed_improvement") / 10, -2, 2))
    out += _measured("removal_cost", col("removal_cost"), np.clip(col("removal_cost") / 10, -3, 3))
    since = col("improvement_since_stage")
    out += _measured("improvement_since_stage", since, np.clip(since / 10, -3, 3))
    out += _measured("weight_norm", col("weight_norm"), symlog(col("weight_norm")) / 7)
    out += _measured("g2_headroom", col("g2_headroom"), np.clip(col("g2_headroom") / 5, -2, 2))
    out += _seed_measures_v4(columns, slot)
    out += [
        ("growth", np.log2(1 + _fill(col("params"), 0.0) / columns["host_params"]) / 5),
        ("resolution", np.where(present, np.log2(np.maximum(_fill(col("resolution"), 1), 1)) / 6, 0.0)),
        ("channels", np.where(present, np.log2(np.maximum(_fill(col("channels"), 1), 1)) / 10, 0.0)),
        ("kernel", np.where(present, _fill(col("kernel"), 0) / 5, 0.0)),
        ("pool", np.where(present, _fill(col("pool"), 0) / 2, 0.0)),
        ("narrowed", np.where(present, _flag(_fill(col("narrowed"), 0) > 0), 0.0)),
        ("frozen", np.where(present, _fill(col("frozen"), 0), 0.0)),
    ]
    return [(name, np.where(present, _fill(values, 0.0), 0.0)) for name, values in out]


def _build_v4(columns: Columns, step_N: NDArray[np.integer]) -> Named:
    out = [(f"global_{name}", values) for name, values in _global_v4(columns, step_N)]
    for slot in range(MAX_SLOTS):
        out += [(f"s{slot}_{name}", values) for name, values in _slot_v4(columns, slot)]
    return out


HIDDEN_GLOBAL = ("log_host_params", "host_depth", "growth", "budget_left")
HIDDEN_PER_SLOT = ("growth", "resolution", "channels", "kernel", "pool", "narrowed", "frozen")
"""Columns of v4 that tell the host: its descriptors, and sizes relative to it (a known seed over an unknown host)."""

HIDDEN_COLUMNS: frozenset[str] = frozenset(
    [f"global_{name}" for name in HIDDEN_GLOBAL]
    + [f"s{slot}_{name}" for slot in range(MAX_SLOTS) for name in HIDDEN_PER_SLOT]
)


def _build_v4_hidden(columns: Columns, step_N: NDArray[np.integer]) -> Named:
    return [
        (name, np.zeros_like(values) if name in HIDDEN_COLUMNS else values)
        for name, values in _build_v4(columns, step_N)
    ]


def _make(name: str, build: Callable[[Columns, NDArray[np.integer]], Named], num_indices: int = 0) -> View:
    from esper.leyline.observations import FEATURE_COLUMNS

    empty = {column: np.zeros(1, dtype=np.float32) for column in FEATURE_COLUMNS}
    for column in ("horizon", "host_params", "batch_size", "batches_per_epoch", "num_slots"):
        empty[column] = np.ones(1, dtype=np.float32)
    names = tuple(name for name, _ in build(empty, np.zeros(1, dtype=np.int64)))
    return View(name, names, build, num_indices)


V1 = _make("v1", _build_v1)
V3 = _make("v3", _build_v3(3), num_indices=3)
V4 = _make("v4", _build_v4)
V4_HIDDEN = _make("v4-hidden", _build_v4_hidden)
VIEWS: dict[str, View] = {view.name: view for view in (V1, V3, V4, V4_HIDDEN)}

NUM_GLOBAL_V4 = sum(name.startswith("global_") for name in V4.names)
NUM_SLOT_V4 = (V4.width - NUM_GLOBAL_V4) // MAX_SLOTS
"""v4, hidden or not, is one global block, then six slot blocks of this width."""


def get_view(name: str) -> View:
    """Return a view by name; an unknown one raises UnknownNameError."""
    if name not in VIEWS:
        raise unknown_name("observation view", name, VIEWS)
    return VIEWS[name]
