"""A rider: one episode's own state. Everything else it shares with the riders of its lineage."""

from __future__ import annotations

from dataclasses import dataclass, field

from esper.kasmina.gating import gate_params
from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.leyline.actions import Blend
from esper.leyline.identity import state_id
from esper.leyline.stages import INCUBATING_STAGES, Stage
from esper.tolaria.lineage import Lineage, Outcome


@dataclass(slots=True)
class Rider:
    """One episode of a cohort."""

    index: int
    root: str
    lineage: Lineage
    slots: list[SlotState]
    last_op: int = -1
    last_executed: bool = False
    done: bool = False
    diverged: bool = False
    num_steps: int = 0
    outcome: Outcome | None = None
    submitted_rows: list[tuple[int, ...]] = field(default_factory=list)
    executed_rows: list[tuple[int, ...]] = field(default_factory=list)

    def incubating(self) -> list[SeedKey]:
        """Return the keys of its seeds that the host does not know."""
        return [slot.seed for slot in self.slots if slot.stage in INCUBATING_STAGES and slot.seed is not None]

    def seed_params(self) -> int:
        """Return the parameters of all its seeds: incubating, blended or fossil; the gates of gated blends included."""
        return sum(self.slot_params(index) for index in range(len(self.slots)))

    def slot_params(self, index: int) -> int:
        """Return the parameters of the seed in a slot, with its gate where its blend is gated; 0 without a seed."""
        slot = self.slots[index]
        if slot.seed is None:
            return 0
        if slot.stage not in INCUBATING_STAGES:
            return self.lineage.seeds[index].num_params
        place = self.lineage.network.host.places[index]
        gate = gate_params(place.channels) if slot.blend_kind is Blend.GATED else 0
        return self.lineage.incubations[slot.seed].num_params + gate

    def num_fossils(self) -> int:
        """Return how many seeds it has committed."""
        return sum(slot.stage is Stage.FOSSILIZED for slot in self.slots)

    def state_id(self, step: int) -> str:
        """Return the id of what a controller observes of it now."""
        slots = tuple(slot.identity() for slot in self.slots)
        return state_id(self.lineage.host_key, step, slots, self.last_op, self.last_executed)
