"""The life of the seed in one slot, without any tensor: what each operation and each epoch does to its stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

from esper.leyline.actions import BLENDS, DWELL_EPOCHS, ISOLATIONS, SEED_LR_FACTORS, TEMPO_EPOCHS, Blend, Isolation
from esper.leyline.stages import COOLDOWN_EPOCHS, Stage, check_transition

NOT_STARTED = -1
"""The start epoch of a seed that does not train yet."""


@dataclass(frozen=True, slots=True)
class SeedKey:
    """What determines a seed's weights on a given lineage.

    Attributes:
        slot: Index of its slot.
        blueprint: Index of its blueprint.
        seed_lr: Index of its multiple of the host's learning rate.
        birth_epoch: When it was germinated; its first weights follow from that.
        incubation: How it learns before the host knows it.
        start_epoch: When its training began: at birth, unless every gate is asked; NOT_STARTED before that.
    """

    slot: int
    blueprint: int
    seed_lr: int
    birth_epoch: int
    incubation: str
    start_epoch: int

    @property
    def has_started(self) -> bool:
        """Whether the seed trains."""
        return self.start_epoch != NOT_STARTED

    def parts(self) -> tuple[int | str, ...]:
        """The key as plain values."""
        return (self.slot, self.blueprint, self.seed_lr, self.birth_epoch, self.incubation, self.start_epoch)


@dataclass(frozen=True, slots=True)
class SlotState:
    """A slot of one episode. Levers are indices into the action tree's choices, -1 where there is no seed."""

    stage: Stage = Stage.DORMANT
    epochs_in_stage: int = 0
    seed: SeedKey | None = None
    blend: int = -1
    tempo: int = -1
    dwell: int = -1
    isolation: int = -1
    stage_start_accuracy: float = float("nan")

    @property
    def tempo_epochs(self) -> int:
        """Blending epochs chosen at birth."""
        return TEMPO_EPOCHS[self.tempo]

    @property
    def dwell_epochs(self) -> int:
        """Least epochs of training chosen at birth."""
        return DWELL_EPOCHS[self.dwell]

    @property
    def seed_lr_factor(self) -> float:
        """Multiple of the host's learning rate chosen at birth."""
        return SEED_LR_FACTORS[self.seed.seed_lr] if self.seed is not None else 1.0

    @property
    def blend_kind(self) -> Blend:
        """Blend chosen at birth."""
        return BLENDS[self.blend]

    @property
    def isolated(self) -> bool:
        """Whether the blended seed's input is detached."""
        return ISOLATIONS[self.isolation] is Isolation.ISOLATED

    def identity(self) -> tuple[str | int | float, ...]:
        """What of this slot a controller can observe, for `state_id`."""
        seed = self.seed.parts() if self.seed is not None else ()
        return (int(self.stage), self.epochs_in_stage, *seed, self.blend, self.tempo, self.dwell, self.isolation)

    def _enter(self, stage: Stage, accuracy: float) -> SlotState:
        check_transition(self.stage, stage)
        return replace(self, stage=stage, epochs_in_stage=0, stage_start_accuracy=accuracy)


def germinate(slot: SlotState, seed: SeedKey, levers: tuple[int, int, int, int], accuracy: float) -> SlotState:
    """Return the slot with a new seed: TRAINING at once, or GERMINATED where its key says that it has not started.

    Args:
        slot: A DORMANT slot.
        seed: The new seed's key.
        levers: Indices of blend, tempo, dwell and isolation.
        accuracy: The host's validation accuracy now, a fraction.
    """
    born = slot._enter(Stage.GERMINATED, accuracy)
    blend, tempo, dwell, isolation = levers
    born = replace(born, seed=seed, blend=blend, tempo=tempo, dwell=dwell, isolation=isolation)
    return born._enter(Stage.TRAINING, accuracy) if seed.has_started else born


def start(slot: SlotState, epoch: int, accuracy: float) -> SlotState:
    """Return a GERMINATED slot as TRAINING, its seed's key with the epoch in which training begins."""
    started = slot._enter(Stage.TRAINING, accuracy)
    seed = started.seed
    return replace(started, seed=replace(seed, start_epoch=epoch) if seed is not None else None)


def advance(slot: SlotState, accuracy: float) -> SlotState:
    """Return a TRAINING slot as BLENDING."""
    return slot._enter(Stage.BLENDING, accuracy)


def hold(slot: SlotState, accuracy: float) -> SlotState:
    """Return a BLENDING slot as HOLDING."""
    return slot._enter(Stage.HOLDING, accuracy)


def fossilize(slot: SlotState, accuracy: float) -> SlotState:
    """Return a HOLDING slot as FOSSILIZED."""
    return slot._enter(Stage.FOSSILIZED, accuracy)


def prune(slot: SlotState) -> SlotState:
    """Return a live slot as PRUNED, without its seed."""
    check_transition(slot.stage, Stage.PRUNED)
    return SlotState(stage=Stage.PRUNED)


def tick(slot: SlotState, accuracy: float, *, ask_at_every_gate: bool = False) -> SlotState:
    """Return the slot after one epoch: cool-downs move on, and so does blending that is full, unless G3 is asked.

    Args:
        slot: The slot before the epoch.
        accuracy: The host's validation accuracy after it, a fraction.
        ask_at_every_gate: A full blend waits for an ADVANCE.
    """
    slot = replace(slot, epochs_in_stage=slot.epochs_in_stage + 1)
    if slot.stage is Stage.BLENDING and not ask_at_every_gate and slot.epochs_in_stage >= slot.tempo_epochs:
        return hold(slot, accuracy)
    if slot.stage in COOLDOWN_EPOCHS and slot.epochs_in_stage >= COOLDOWN_EPOCHS[slot.stage]:
        order = (Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT)
        return SlotState(stage=check_transition(slot.stage, order[order.index(slot.stage) + 1]))
    return slot
