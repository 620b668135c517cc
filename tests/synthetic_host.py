"""A made-up host whose accuracy is a formula: what `factories` uses in place of training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np

from esper.leyline.actions import (
    DWELL_EPOCHS,
    MAX_SLOTS,
    SEED_LR_FACTORS,
    TEMPO_EPOCHS,
    Actions,
    Op,
)
from esper.leyline.identity import extend_host_key, root_host_key, state_id
from esper.leyline.keys import hex_digest, numpy_generator
from esper.leyline.observations import (
    CONTRIBUTION_PERCENTS,
    FEATURE_COLUMNS,
    NUM_LAGS,
    SLOT_FEATURES,
    slot_column,
)
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import (
    BLENDED_STAGES,
    COOLDOWN_EPOCHS,
    INCUBATING_STAGES,
    LEGAL_TRANSITIONS,
    OCCUPIED_STAGES,
    Stage,
    check_transition,
)

NAN = float("nan")
POINTS = (1.0, 2.0, 3.0, 6.0, 4.0, 8.0, 12.0, 20.0)
"""What a fully blended seed of each blueprint is worth in slot 0; a fifth less with every slot."""


def blueprint_params(spec: EnvironmentSpec) -> np.ndarray:
    """Made-up parameter counts, int64 [6, 8]; slots that the host lacks have the last slot's."""
    channels = [*spec.host.block_channels] + [spec.host.block_channels[-1]] * MAX_SLOTS
    per_square = np.array([0, 0.5, 1, 2, 1, 9, 9, 18])
    return np.array([2 * c + per_square * c * c for c in channels[:MAX_SLOTS]]).astype(np.int64)


def host_params(spec: EnvironmentSpec) -> int:
    """Weights of the convolutions, batch norms and the linear layer."""
    channels = spec.host.block_channels
    pairs = zip((1, *channels), channels, spec.host.kernels)
    return sum(i * o * k * k + 2 * o for i, o, k in pairs) + 10 * channels[-1] + 10


def alpha_of(blend: int, share: float) -> float:
    """The blending curve at a share of its length; 1 at the end."""
    steepness = (0.0, 6.0, 12.0, 24.0, 0.0)[blend]
    if not steepness:
        return share

    def logistic(x: float) -> float:
        return float(1 / (1 + np.exp(-steepness * (x - 0.5))))

    return (logistic(share) - logistic(0)) / (logistic(1) - logistic(0))


@dataclass(frozen=True)
class Slot:
    """One slot; levers are indices, -1 without a seed."""

    stage: Stage = Stage.DORMANT
    epochs: int = 0
    birth: int = -1
    levers: tuple[int, ...] = (-1,) * 6

    def to(self, stage: Stage) -> Slot:
        """The slot after a legal transition."""
        return replace(self, stage=check_transition(self.stage, stage), epochs=0)

    def seed_key(self, index: int) -> str:
        """The seed's identity, empty without one."""
        if self.levers[0] < 0:
            return ""
        return hex_digest([index, self.levers[0], self.levers[5], self.birth, "own_pass"], 24)

    @property
    def alpha(self) -> float:
        """How much of the seed the host hears."""
        if self.stage in (Stage.HOLDING, Stage.FOSSILIZED):
            return 1.0
        if self.stage is Stage.BLENDING:
            return alpha_of(self.levers[1], self.epochs / TEMPO_EPOCHS[self.levers[2]])
        return 0.0

    def after_epoch(self) -> Slot:
        """The slot one epoch later, with the transitions that happen by themselves."""
        grown = replace(self, epochs=self.epochs + 1)
        if self.stage is Stage.BLENDING and grown.epochs >= TEMPO_EPOCHS[self.levers[2]]:
            return grown.to(Stage.HOLDING)
        if self.stage in COOLDOWN_EPOCHS and grown.epochs >= COOLDOWN_EPOCHS[self.stage]:
            return grown.to(next(iter(LEGAL_TRANSITIONS[self.stage])))
        return grown


@dataclass
class Trajectory:
    """One episode's network: its slots, its key and the curve it has drawn so far."""

    spec: EnvironmentSpec
    env_seed: int
    noise_seed: int
    slots: list[Slot] = field(default_factory=list)
    host_key: str = ""
    step: int = 0
    accuracies: list[float] = field(default_factory=list)
    last_op: int = -1
    last_executed: bool = True

    def __post_init__(self) -> None:
        """Validate the untouched host: observation 0."""
        self.slots = [Slot() for _ in range(self.spec.host.num_slots)]
        self.host_key = root_host_key(self.spec.spec_id, self.env_seed, "host")
        self.accuracies = [self._validate()]

    def _draw(self, *parts: str | int) -> float:
        return float(numpy_generator(self.noise_seed, self.env_seed, *parts).standard_normal())

    def _worth(self, index: int) -> float:
        """Points that the seed in a slot brings at full alpha."""
        return POINTS[self.slots[index].levers[0]] * (1 - 0.2 * index)

    def trunk_accuracy(self, step: int) -> float:
        """The never-act curve of the environment seed, a fraction."""
        curve = 0.1 + 0.2 * (1 - 0.7**step) + 0.005 * self._draw("trunk", step)
        return float(np.float32(round(curve, 4)))

    def _validate(self) -> float:
        gain = sum(self._worth(i) * slot.alpha for i, slot in enumerate(self.slots) if slot.alpha)
        changed = self.host_key != root_host_key(self.spec.spec_id, self.env_seed, "host")
        noise = 0.3 * self._draw(self.host_key, self.step) if changed else 0.0
        value = self.trunk_accuracy(self.step) + (gain + noise) / 100
        return float(np.float32(round(min(max(value, 0.0), 1.0), 4)))

    def final_accuracy(self, split: str, *, committed: bool) -> float:
        """The accuracy at the end on a whole split, a fraction; committed: with fossils alone."""
        kept = [
            i for i, slot in enumerate(self.slots) if slot.stage is Stage.FOSSILIZED or (not committed and slot.alpha)
        ]
        gain = sum(self._worth(i) * self.slots[i].alpha for i in kept)
        noise = 0.2 * self._draw("final", split, *(f"{i}:{self.slots[i].levers[0]}" for i in kept)) if kept else 0.0
        return round(min(self.trunk_accuracy(self.step) + 0.004 * self._draw(split) + (gain + noise) / 100, 1.0), 6)

    def committed_params(self) -> int:
        """Parameters of the fossils."""
        return self._params(frozenset({Stage.FOSSILIZED}))

    def _params(self, stages: frozenset[Stage]) -> int:
        table = blueprint_params(self.spec)
        return int(sum(table[i, slot.levers[0]] for i, slot in enumerate(self.slots) if slot.stage in stages))

    def apply(self, action: Actions, refused: bool) -> None:
        """Carry out an action, train one epoch and validate."""
        op, index = Op(int(action[0])), int(action[1])
        if not refused and op is not Op.WAIT:
            self._act(op, index, action)
        self.last_op, self.last_executed = int(op), not refused
        self.step += 1
        for i, slot in enumerate(self.slots):
            if slot.stage is not Stage.DORMANT:
                self.slots[i] = slot.after_epoch()
        self.accuracies.append(self._validate())

    def _act(self, op: Op, index: int, action: Actions) -> None:
        slot = self.slots[index]
        before = slot.stage
        if op is Op.GERMINATE:
            born = replace(slot, birth=self.step, levers=tuple(int(v) for v in action[2:]))
            self.slots[index] = born.to(Stage.GERMINATED).to(Stage.TRAINING)
            return
        target = {Op.ADVANCE: Stage.BLENDING, Op.FOSSILIZE: Stage.FOSSILIZED, Op.PRUNE: Stage.PRUNED}[op]
        self.slots[index] = slot.to(target)
        if op is Op.PRUNE:
            self.slots[index] = replace(self.slots[index], birth=-1, levers=(-1,) * 6)
        if op is not Op.PRUNE or before in BLENDED_STAGES:
            event = (op.name, self.step, index, slot.seed_key(index), slot.levers[1], slot.levers[2], slot.levers[4])
            self.host_key = extend_host_key(self.host_key, event)

    def state_id(self) -> str:
        """The id of the current observation."""
        slots = tuple((int(s.stage), s.epochs, s.seed_key(i), *s.levers) for i, s in enumerate(self.slots))
        return state_id(self.host_key, self.step, slots, self.last_op, self.last_executed)

    def observe(self) -> dict[str, float]:
        """The feature columns of the current observation, NaN where unmeasured."""
        spec, history = self.spec, self.accuracies
        losses = [2.4 - 2 * accuracy for accuracy in history]
        plateau = 0
        for before, now in itertools.pairwise(history):
            plateau = 0 if now - before >= 0.005 else plateau + 1
        out = dict.fromkeys(FEATURE_COLUMNS, NAN)
        out |= {
            "horizon": spec.horizon,
            "train_loss": losses[-1] - 0.1 if self.step else NAN,
            "train_accuracy": min(history[-1] + 0.02, 1.0) if self.step else NAN,
            "val_loss": losses[-1],
            "val_accuracy": history[-1],
            "best_val_loss": min(losses),
            "best_val_accuracy": max(history),
            "plateau_epochs": plateau,
            "learning_rate": spec.learning_rate_at(min(self.step, spec.horizon - 1)),
            "base_learning_rate": spec.learning_rate,
            "optimiser": float(spec.optimiser == "adam"),
            "batch_size": spec.batch_size,
            "batches_per_epoch": spec.batches_per_epoch,
            "host_params": host_params(spec),
            "host_depth": len(spec.host.channels),
            "seed_params": self._params(OCCUPIED_STAGES),
            "num_slots": spec.host.num_slots,
            "max_seeds": spec.seeds_cap,
            "max_fossils": spec.fossils_cap,
            "param_budget": NAN if spec.param_budget is None else spec.param_budget,
            "last_op": self.last_op,
            "last_executed": float(self.last_executed),
            "host_weight_change": 0.3 / (1 + self.step) + 0.01 * losses[-1] if self.step else NAN,
            "num_rollbacks": 0,
        }
        for lag in range(1, min(NUM_LAGS, self.step) + 1):
            out[f"val_loss_lag{lag}"] = losses[-1 - lag]
            out[f"val_accuracy_lag{lag}"] = history[-1 - lag]
        for index in range(MAX_SLOTS):
            values = self._observe_slot(index)
            out |= {slot_column(index, name): value for name, value in values.items()}
        costs = [out[slot_column(index, "removal_cost")] for index in range(MAX_SLOTS)]
        measured = [cost for cost in costs if not np.isnan(cost)]
        if measured:
            out["removal_cost_all"] = sum(measured)
        return out

    def _observe_slot(self, index: int) -> dict[str, float]:
        out = {feature.name: NAN for feature in SLOT_FEATURES}
        slot = self.slots[index] if index < len(self.slots) else Slot()
        levers = ("blueprint", "blend", "tempo", "dwell", "isolation", "seed_lr")
        out |= {"stage": int(slot.stage), "epochs_in_stage": slot.epochs, "alpha": slot.alpha}
        out |= dict(zip(levers, slot.levers)) | {"present": float(index < len(self.slots))}
        if index >= len(self.slots):
            return out
        out |= {"resolution": 12 // 2**index, "channels": self.spec.host.block_channels[index], "narrowed": 0}
        out |= {"kernel": self.spec.host.kernels[index], "pool": self.spec.host.pools[index], "frozen": 0}
        if slot.levers[0] < 0:
            return out
        worth, noise = self._worth(index), 0.5 * self._draw(self.host_key, slot.seed_key(index), self.step)
        out |= {"age": self.step - slot.birth, "params": blueprint_params(self.spec)[index, slot.levers[0]]}
        out |= {
            "gradient_norm": 0.5 * SEED_LR_FACTORS[slot.levers[5]],
            "gradient_health": 0.9,
            "weight_norm": 1.0 + slot.epochs,
        }
        out |= {"gradient_vanishing": 0.0, "gradient_exploding": 0.0}
        live = 1 + self.step - slot.birth
        out |= {"gradient_ratio": min(10.0, 0.4 + worth / live), "stable_share": 1.0 if worth < 12 else 1 - 0.5 / live}
        out |= {"gradient_variation": 0.8 / live if live > 2 else NAN}
        if slot.stage in INCUBATING_STAGES:
            out |= {"seed_improvement": worth / 2 + noise, "val_loss_drop": worth / 200, "train_loss_drop": worth / 150}
            out |= {"g2_headroom": slot.epochs - DWELL_EPOCHS[slot.levers[3]]}
        else:
            out |= {"removal_cost": worth * slot.alpha + noise, "removal_age": 0, "improvement_since_stage": noise}
            out |= {"blending_velocity": 1 / TEMPO_EPOCHS[slot.levers[2]] if slot.stage is Stage.BLENDING else 0.0}
            out |= {"gradient_through_seed": 0.1 * worth * slot.alpha if slot.levers[4] else 0.0}
            out |= {
                f"contribution_{percent}": worth * percent / 100
                for percent in CONTRIBUTION_PERCENTS
                if 100 * slot.alpha >= percent
            }
        return out
