"""The registry of observed features: the columns of a `steps` row that a controller may see.

A feature is global (one column) or per slot (`s0_alpha` ... `s5_alpha`; the schema always has six slots). Unmeasured is
NaN in memory and null in a table. Accuracies are fractions in [0, 1]; probes in accuracy are points (hundredths).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import MAX_SLOTS

Columns = Mapping[str, NDArray[np.floating]]
"""Feature columns by name, float32 [N] each."""

NUM_LAGS = 4

CONTRIBUTION_PERCENTS = (25, 50, 75, 100)
"""Alpha, in percent, at which a blended seed's removal cost is kept for the rest of its life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One observed quantity; `since` is the schema version that brought it (rows of an older one have null)."""

    name: str
    unit: str
    low: float
    high: float
    scope: Literal["global", "slot"]
    kind: Literal["float", "int"]
    since: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of its columns."""
        if self.scope == "global":
            return (self.name,)
        return tuple(slot_column(slot, self.name) for slot in range(MAX_SLOTS))


def slot_column(slot: int, feature: str) -> str:
    """Return the column of a slot's feature."""
    return f"s{slot}_{feature}"


def _glob(
    name: str, unit: str, low: float, high: float, kind: Literal["float", "int"] = "float", since: int = 1
) -> Feature:
    return Feature(name=name, unit=unit, low=low, high=high, scope="global", kind=kind, since=since)


def _slot(
    name: str, unit: str, low: float, high: float, kind: Literal["float", "int"] = "float", since: int = 1
) -> Feature:
    return Feature(name=name, unit=unit, low=low, high=high, scope="slot", kind=kind, since=since)


_INF = float("inf")

GLOBAL_FEATURES: tuple[Feature, ...] = (
    _glob("horizon", "epochs", 1, 1000, "int"),
    _glob("train_loss", "nats", 0, _INF),
    _glob("train_accuracy", "fraction", 0, 1),
    _glob("val_loss", "nats", 0, _INF),
    _glob("val_accuracy", "fraction", 0, 1),
    *(_glob(f"val_loss_lag{lag}", "nats", 0, _INF) for lag in range(1, NUM_LAGS + 1)),
    *(_glob(f"val_accuracy_lag{lag}", "fraction", 0, 1) for lag in range(1, NUM_LAGS + 1)),
    _glob("best_val_loss", "nats", 0, _INF),
    _glob("best_val_accuracy", "fraction", 0, 1),
    _glob("plateau_epochs", "epochs", 0, 1000, "int"),
    _glob("learning_rate", "1", 0, 100),
    _glob("base_learning_rate", "1", 0, 100),
    _glob("optimiser", "code: 0 sgd, 1 adam", 0, 1, "int"),
    _glob("batch_size", "samples", 1, 65536, "int"),
    _glob("batches_per_epoch", "batches", 1, 1_000_000, "int"),
    _glob("host_params", "parameters", 1, _INF, "int"),
    _glob("host_depth", "layers", 1, 1000, "int"),
    _glob("seed_params", "parameters", 0, _INF, "int"),
    _glob("num_slots", "slots", 1, MAX_SLOTS, "int"),
    _glob("max_seeds", "seeds", 0, MAX_SLOTS, "int"),
    _glob("max_fossils", "seeds", 0, MAX_SLOTS, "int"),
    _glob("param_budget", "parameters", 0, _INF, "int"),
    _glob("last_op", "code of Op, -1 before the first", -1, 4, "int"),
    _glob("last_executed", "flag", 0, 1, "int"),
    _glob("host_weight_change", "share of the norm of the host's weights per epoch", 0, _INF, since=2),
    _glob("removal_cost_all", "points, all live blended seeds off", -100, 100, since=2),
    _glob("num_rollbacks", "rollbacks of this host so far", 0, 1000, "int", since=2),
)

SLOT_FEATURES: tuple[Feature, ...] = (
    _slot("present", "flag: the host has this slot", 0, 1, "int"),
    _slot("stage", "code of Stage", 1, 10, "int"),
    _slot("epochs_in_stage", "epochs", 0, 1000, "int"),
    _slot("age", "epochs since birth", 0, 1000, "int"),
    _slot("blueprint", "index, -1 none", -1, 7, "int"),
    _slot("blend", "index, -1 none", -1, 4, "int"),
    _slot("tempo", "index, -1 none", -1, 3, "int"),
    _slot("dwell", "index, -1 none", -1, 3, "int"),
    _slot("isolation", "index, -1 none", -1, 1, "int"),
    _slot("seed_lr", "index, -1 none", -1, 2, "int"),
    _slot("alpha", "fraction", 0, 1),
    _slot("blending_velocity", "fraction per epoch", 0, 1),
    _slot("params", "parameters", 0, _INF, "int"),
    _slot("train_loss_drop", "nats", -_INF, _INF),
    _slot("val_loss_drop", "nats", -_INF, _INF),
    _slot("seed_improvement", "points", -100, 100),
    _slot("removal_cost", "points", -100, 100),
    _slot("removal_cost_velocity", "points per epoch", -100, 100),
    _slot("removal_age", "epochs since measured", 0, 1000, "int"),
    _slot("improvement_since_stage", "points", -100, 100),
    _slot("gradient_norm", "1", 0, _INF),
    _slot("gradient_health", "fraction", 0, 1),
    _slot("gradient_health_previous", "fraction", 0, 1),
    _slot("gradient_vanishing", "share of tensors", 0, 1),
    _slot("gradient_exploding", "share of tensors", 0, 1),
    _slot("weight_norm", "1", 0, _INF),
    _slot("g2_headroom", "epochs beyond the chosen dwell", -10, 1000, "int"),
    _slot("resolution", "pixels, or tokens of text", 1, 4096, "int"),
    _slot("channels", "channels", 1, 65536, "int"),
    _slot("kernel", "pixels, 0 where nothing is convolved", 0, 15, "int"),
    _slot("pool", "factor", 1, 8, "int"),
    _slot("narrowed", "channels kept, 0 all", 0, 65536, "int"),
    _slot("frozen", "flag", 0, 1, "int"),
    *(
        _slot(f"contribution_{percent}", f"points, removal cost when alpha reached {percent} %", -100, 100, since=2)
        for percent in CONTRIBUTION_PERCENTS
    ),
    _slot("interaction_sum", "points, over its pairs with other live blended seeds", -1000, 1000, since=2),
    _slot("gradient_ratio", "seed's norm over the host's, per root of parameters, at most 10", 0, 10, since=2),
    _slot("gradient_variation", "standard deviation over mean of its norm by epoch", 0, _INF, since=2),
    _slot("stable_share", "share of its epochs without an exploding tensor", 0, 1, since=2),
    _slot("gradient_through_seed", "norm that reaches the host through the seed", 0, _INF, since=2),
)

FEATURES = GLOBAL_FEATURES + SLOT_FEATURES
FEATURE_BY_NAME = {feature.name: feature for feature in FEATURES}
FEATURE_COLUMNS: tuple[str, ...] = tuple(column for feature in FEATURES for column in feature.columns)
"""Every feature column in schema order."""
