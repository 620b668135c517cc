"""From riders to feature columns: float64 [K, features] with NaN where unmeasured, rounded as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from esper.kasmina.blending import alpha_at
from esper.kasmina.gating import gate_params
from esper.kasmina.lifecycle import SlotState
from esper.leyline.actions import MAX_SLOTS
from esper.leyline.masks import LeverRules
from esper.leyline.observations import CONTRIBUTION_PERCENTS, FEATURE_BY_NAME, FEATURE_COLUMNS, NUM_LAGS, slot_column
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import BLENDED_STAGES, LIVE_STAGES, Stage
from esper.tolaria.cost import HostCosts, blueprint_costs
from esper.tolaria.episode import Rider
from esper.tolaria.lineage import NAN, EpochMetrics, Lineage

Matrix = NDArray[np.float64]

_INDEX = {name: position for position, name in enumerate(FEATURE_COLUMNS)}
_SLOT_BASE = [
    {name: _INDEX[slot_column(slot, name)] for name, feature in FEATURE_BY_NAME.items() if feature.scope == "slot"}
    for slot in range(MAX_SLOTS)
]
_IS_FLOAT = np.array(
    [feature.kind == "float" for feature in FEATURE_BY_NAME.values() for _ in feature.columns], dtype=bool
)
_OPTIMISER_CODES = {"sgd": 0, "adam": 1}


@lru_cache(maxsize=64)
def lever_rules(spec: EnvironmentSpec, costs: HostCosts) -> LeverRules:
    """Return what GERMINATE offers in an environment, with the parameters of every blueprint in every slot."""
    table = np.zeros((MAX_SLOTS, 8), dtype=np.int64)
    gates = np.zeros(MAX_SLOTS, dtype=np.int64)
    topology = spec.host.topology
    for slot, place in enumerate(costs.places):
        table[slot] = [blueprint_costs(topology, b, place.channels, place.resolution).num_params for b in range(8)]
        gates[slot] = gate_params(place.channels)
    return LeverRules.of(spec, table, gates)


def as_columns(matrix: Matrix) -> dict[str, NDArray[np.float64]]:
    """Return the columns of a feature matrix by name."""
    return dict(zip(FEATURE_COLUMNS, matrix.T))


def observe(riders: Sequence[Rider], step: int, base_params: int, costs: dict[str, HostCosts]) -> Matrix:
    """Return the feature matrix of all riders after `step` epochs.

    Args:
        riders: The cohort's episodes.
        step: Decisions taken so far.
        base_params: Parameters of the environment's own host, whatever the root.
        costs: Costs of each root's host.
    """
    matrix = np.full((len(riders), len(FEATURE_COLUMNS)), NAN)
    shared: dict[str, dict[str, float]] = {}
    for row, rider in zip(matrix, riders):
        lineage = rider.lineage
        if lineage.host_key not in shared:
            shared[lineage.host_key] = _lineage_features(lineage, step, base_params)
        for name, value in shared[lineage.host_key].items():
            row[_INDEX[name]] = value
        row[_INDEX["seed_params"]] = rider.seed_params() + costs[rider.root].num_params - base_params
        row[_INDEX["last_op"]] = rider.last_op
        row[_INDEX["last_executed"]] = float(rider.last_executed)
        for slot in range(MAX_SLOTS):
            base = _SLOT_BASE[slot]
            if slot >= len(rider.slots):
                row[base["present"]] = 0
                row[base["stage"]] = Stage.DORMANT
                continue
            for name, value in _slot_features(rider, slot, step, costs[rider.root]).items():
                row[base[name]] = value
    matrix[:, _IS_FLOAT] = matrix[:, _IS_FLOAT].astype(np.float32)
    return matrix


def _lineage_features(lineage: Lineage, step: int, base_params: int) -> dict[str, float]:
    spec = lineage.spec
    now = lineage.history[-1]
    finite_losses = [m.val_loss for m in lineage.history if m.val_loss == m.val_loss]
    features = {
        "horizon": spec.horizon,
        "train_loss": now.train_loss,
        "train_accuracy": now.train_accuracy,
        "val_loss": now.val_loss,
        "val_accuracy": now.val_accuracy,
        "best_val_loss": min(finite_losses, default=NAN),
        "best_val_accuracy": max(m.val_accuracy for m in lineage.history),
        "plateau_epochs": lineage.plateau_epochs,
        "learning_rate": spec.learning_rate_at(min(step, spec.horizon - 1)) * lineage.lr_scale,
        "base_learning_rate": spec.learning_rate,
        "optimiser": _OPTIMISER_CODES[spec.optimiser],
        "batch_size": spec.batch_size,
        "batches_per_epoch": spec.batches_per_epoch,
        "host_params": base_params,
        "host_depth": lineage.network.host.depth,
        "num_slots": spec.host.num_slots,
        "max_seeds": spec.seeds_cap,
        "max_fossils": spec.fossils_cap,
        "param_budget": spec.param_budget if spec.param_budget is not None else NAN,
        "host_weight_change": lineage.host_weight_change,
        "removal_cost_all": lineage.removal_cost_all,
        "num_rollbacks": lineage.num_rollbacks,
    }
    for lag in range(1, NUM_LAGS + 1):
        past = lineage.history[-1 - lag] if len(lineage.history) > lag else EpochMetrics()
        features[f"val_loss_lag{lag}"] = past.val_loss
        features[f"val_accuracy_lag{lag}"] = past.val_accuracy
    return features


def _slot_features(rider: Rider, index: int, step: int, costs: HostCosts) -> dict[str, float]:
    state = rider.slots[index]
    place = costs.places[index]
    features: dict[str, float] = {
        "present": 1,
        "stage": state.stage,
        "epochs_in_stage": state.epochs_in_stage,
        "blueprint": -1,
        "blend": state.blend,
        "tempo": state.tempo,
        "dwell": state.dwell,
        "isolation": state.isolation,
        "seed_lr": -1,
        "alpha": 0.0,
        "resolution": place.resolution,
        "channels": place.channels,
        "kernel": place.kernel,
        "pool": place.pool,
        "narrowed": place.narrowed,
        "frozen": float(place.frozen),
    }
    if state.seed is not None:
        features |= _seed_features(rider, index, state, step)
    return features


def _seed_features(rider: Rider, index: int, state: SlotState, step: int) -> dict[str, float]:
    lineage = rider.lineage
    if state.seed is None:
        return {}
    blended = state.stage in BLENDED_STAGES
    holder = lineage.seeds[index] if blended else lineage.incubations[state.seed]
    measures = holder.measures
    features: dict[str, float] = {
        "age": step - state.seed.birth_epoch,
        "blueprint": state.seed.blueprint,
        "seed_lr": state.seed.seed_lr,
        "params": rider.slot_params(index),
        "gradient_norm": measures.gradient_norm,
        "gradient_health": measures.gradient_health,
        "gradient_health_previous": measures.gradient_health_previous,
        "gradient_vanishing": measures.gradient_vanishing,
        "gradient_exploding": measures.gradient_exploding,
        "gradient_ratio": measures.gradient_ratio,
        "gradient_variation": measures.gradient_variation,
        "stable_share": measures.stable_share,
        "weight_norm": measures.weight_norm,
    }
    accuracy = lineage.history[-1].val_accuracy
    if state.stage in LIVE_STAGES:
        features["improvement_since_stage"] = 100 * (accuracy - state.stage_start_accuracy)
    if blended:
        features["alpha"] = lineage.network.grafts[index].alpha
        features["blending_velocity"] = _alpha_rise(state)
        features["gradient_through_seed"] = measures.gradient_through_seed
        for percent, points in zip(CONTRIBUTION_PERCENTS, measures.contributions):
            features[f"contribution_{percent}"] = points
        if state.stage is not Stage.FOSSILIZED:
            features["removal_cost"] = measures.removal_cost
            features["removal_cost_velocity"] = measures.removal_cost_velocity
            features["removal_age"] = 0 if measures.removal_cost == measures.removal_cost else NAN
            features["interaction_sum"] = measures.interaction_sum
    else:
        features["train_loss_drop"] = measures.train_loss_drop
        features["val_loss_drop"] = measures.val_loss_drop
        features["seed_improvement"] = measures.seed_improvement
        trained = state.epochs_in_stage if state.stage is Stage.TRAINING else 0
        features["g2_headroom"] = trained - state.dwell_epochs
    return features


def _alpha_rise(state: SlotState) -> float:
    """What the last epoch added to alpha; 0 once it is full."""
    epochs, total = state.epochs_in_stage, state.tempo_epochs
    if state.stage is not Stage.BLENDING or epochs >= total:
        return 0.0
    return alpha_at(state.blend_kind, epochs, total) - alpha_at(state.blend_kind, epochs - 1, total)
