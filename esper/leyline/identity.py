"""Who is who: environment seeds, episode ids, and the two keys of a state.

`host_key` names a host trajectory: equal keys are one lineage, computed once. `state_id` names what a controller can
observe: rows with equal `state_id` have equal observations.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.errors import SpecError
from esper.leyline.keys import derive_seed, hex_digest

ENGINE_VERSION = "3"
"""Raised when a golden digest changes: it is part of every episode's identity."""

SELECTION_START = 100_000
EVALUATION_START = 200_000


class Role(StrEnum):
    """What an episode was made for."""

    DATA = "data"
    ONLINE = "online"
    SELECTION = "selection"
    EVALUATION = "evaluation"


class Root(StrEnum):
    """Which network an episode starts from."""

    HOST = "host"
    BIGGER = "bigger"
    GROWN = "grown"
    ORDINARY = "ordinary"
    WIDER = "wider"


def check_replicate(replicate: int, role: Role) -> None:
    """Raise SpecError unless the replicate lies in the range that its role owns."""
    low, high = {
        Role.DATA: (0, SELECTION_START),
        Role.ONLINE: (0, SELECTION_START),
        Role.SELECTION: (SELECTION_START, EVALUATION_START),
        Role.EVALUATION: (EVALUATION_START, 10 * EVALUATION_START),
    }[role]
    if not low <= replicate < high:
        raise SpecError(
            f"replicate {replicate} cannot be used for role {role.value!r}\n"
            f"  expected: {low} <= replicate < {high} (training, selection and evaluation seeds never mix)"
        )


def env_seed(task_id: str, replicate: int) -> int:
    """Return the environment seed of a replicate of a task, in [0, 2**63).

    It depends on the task alone, so hosts of other widths and other numerics stay paired.
    """
    return derive_seed("env", task_id, replicate)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeIdentity:
    """Everything that determines an episode's rows."""

    environment_id: str
    env_seed: int
    root: str
    controller_id: str
    epsilon: float
    temperature: float | None
    repetition: int
    branch: tuple[str, int, tuple[tuple[int, ...], ...]] | None = None

    @property
    def episode_id(self) -> str:
        """The first 24 hex digits of the SHA-256 of the identity and the engine version."""
        parts = [
            self.environment_id,
            self.env_seed,
            self.root,
            self.controller_id,
            self.epsilon,
            self.temperature,
            self.repetition,
            self.branch,
            ENGINE_VERSION,
        ]
        return hex_digest(parts, 24)


def root_host_key(environment_id: str, seed: int, root: str) -> str:
    """Return the host_key of a trajectory on which nothing has happened yet."""
    return hex_digest(["root", environment_id, seed, root], 24)


def extend_host_key(host_key: str, event: tuple[str | int | float, ...]) -> str:
    """Return the host_key after one more host-changing event (its epoch is part of the event)."""
    return hex_digest([host_key, list(event)], 24)


def state_id(
    host_key: str, step: int, slots: tuple[tuple[str | int | float, ...], ...], last_op: int, last_executed: bool
) -> str:
    """Return the id of what a controller observes.

    Args:
        host_key: The trajectory that the episode rides.
        step: Decisions taken so far.
        slots: Per slot its (stage, epochs in stage, seed key and chosen levers).
        last_op: The last submitted operation, -1 before the first.
        last_executed: Whether it was carried out.
    """
    return hex_digest([host_key, step, [list(slot) for slot in slots], last_op, last_executed], 24)
