"""Logged episodes as off-policy evaluation reads them: transitions, and who acted in which episode.

State m of the transitions is row m of the sorted table, so anything known per row (a controller's action, a value) is
known per state. Shape suffixes as in `batches`, E episodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.leyline.actions import Actions, Bools
from esper.leyline.errors import SpecError
from esper.leyline.identity import SELECTION_START, Role
from esper.leyline.keys import canonical_json
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.protocols import BLOCK_ROWS, ActInputs, Carry, Controller, EpisodeStart
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.tree import NUM_UNIFORMS
from esper.simic.batches import STEP_COLUMNS, Floats, Ints, Transitions, from_steps

if TYPE_CHECKING:
    from esper.karn.versions import Version

_EPISODE_COLUMNS = [
    "episode_id",
    "environment",
    "environment_spec",
    "env_seed",
    "replicate",
    "role",
    "root",
    "controller",
    "controller_id",
    "controller_spec",
    "epsilon",
    "temperature",
    "repetition",
    "branch_parent",
    "branch_step",
    "outcome",
    "control_valid",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """Episodes of a sealed version.

    Attributes:
        transitions: Their one-step transitions; every row of the table is a state.
        features_MF: Feature columns of every row, float32, in the order of FEATURE_COLUMNS.
        first_E: Row of each episode's first observation.
        length_E: Rows of each episode, its final observation included.
        episodes: What the table `episodes` says of each.
    """

    transitions: Transitions
    features_MF: NDArray[np.float32]
    first_E: Ints
    length_E: Ints
    episodes: tuple[Mapping[str, Any], ...]

    @property
    def returns(self) -> Floats:
        """The return of each episode; one that is all replayed has none (NaN)."""
        out = np.full(len(self.episodes), np.nan)
        out[self.transitions.episode_N] = self.transitions.return_N
        return out

    @property
    def branched(self) -> Bools:
        """Whether an episode left another one by forced actions."""
        return np.array([episode["branch_parent"] is not None for episode in self.episodes])

    @property
    def with_propensity(self) -> Bools:
        """Whether every decision since the first observation has a propensity: what importance weights need."""
        transitions = self.transitions
        unknown = np.zeros(len(self.episodes), dtype=bool)
        np.logical_or.at(unknown, transitions.episode_N, ~np.isfinite(transitions.logp_N))
        decisions = np.bincount(transitions.episode_N, minlength=len(self.episodes))
        whole: Bools = decisions == self.length_E - 1
        return ~unknown & whole

    def environment(self, episode: int) -> EnvironmentSpec:
        """Return the environment of an episode."""
        return EnvironmentSpec.model_validate_json(self.episodes[episode]["environment_spec"])


def load_logged(version: Version, view: str, rewards: Mapping[str, RewardSpec]) -> Logged:
    """Return the episodes of role data of a sealed version, failed ones and those without a valid control left out.

    Raises:
        SpecError: No episode is left, or one is for selection or evaluation.
    """
    episodes = version.table("episodes", columns=_EPISODE_COLUMNS)
    usable = pc.and_(episodes["control_valid"], pc.not_equal(episodes["outcome"], "failed"))
    episodes = episodes.filter(pc.and_(usable, pc.equal(episodes["role"], Role.DATA.value)))
    if pc.any(pc.greater_equal(episodes["replicate"], SELECTION_START)).as_py():
        raise SpecError(f"{version.ref} holds data episodes for selection or evaluation\n  run `esper health` on it")
    steps = version.table("steps", columns=list(STEP_COLUMNS))
    steps = steps.filter(pc.is_in(steps["episode_id"], episodes["episode_id"].combine_chunks()))
    if not len(steps):
        raise SpecError(f"{version.ref} has no usable episode of role data\n  run `esper health {version.ref}`")
    return logged_from(steps, episodes, view, rewards)


def logged_from(steps: pa.Table, episodes: pa.Table, view: str, rewards: Mapping[str, RewardSpec]) -> Logged:
    """Return whole episodes in the order of (env_seed, episode_id, step); errors as `batches.from_steps`."""
    order = [("env_seed", "ascending"), ("episode_id", "ascending"), ("step", "ascending")]
    steps = steps.select(STEP_COLUMNS).sort_by(order)
    transitions = from_steps(steps, view, rewards)
    ids = np.asarray(steps["episode_id"].to_numpy(zero_copy_only=False))
    first = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    by_id = {row["episode_id"]: row for row in episodes.select(_EPISODE_COLUMNS).to_pylist()}
    features = np.empty((len(steps), len(FEATURE_COLUMNS)), dtype=np.float32)
    for place, name in enumerate(FEATURE_COLUMNS):
        features[:, place] = pc.cast(steps[name], pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return Logged(
        transitions=transitions,
        features_MF=features,
        first_E=first,
        length_E=np.diff(first, append=len(ids)),
        episodes=tuple(by_id[name] for name in ids[first]),
    )


def replay_actions(controller: Controller, logged: Logged) -> Actions:
    """Return what a controller would do in every row, int8 [M, A], its memory having watched the episode so far.

    It acts without exploration, on blocks of BLOCK_ROWS rows as the engine has it, so the result is what it would do
    live. The action of a row is not carried out: the next row is what the data have.
    """
    actions = np.zeros((len(logged.features_MF), 8), dtype=np.int8)
    starts = _starts(logged)
    order = np.argsort(-logged.length_E, kind="stable")
    for begin in range(0, len(order), BLOCK_ROWS):
        _replay_block(controller, logged, starts, order[begin : begin + BLOCK_ROWS], actions)
    return actions


def _replay_block(
    controller: Controller, logged: Logged, starts: list[EpisodeStart], block: Ints, actions: Actions
) -> None:
    padded = np.concatenate([block, np.full(BLOCK_ROWS - len(block), block[0])])
    carry: Carry = controller.start([starts[episode] for episode in padded])
    mask = logged.transitions.mask_MT
    for step in range(int(logged.length_E[block].max())):
        rows = logged.first_E[padded] + np.minimum(step, logged.length_E[padded] - 1)
        inputs = ActInputs(
            columns=dict(zip(FEATURE_COLUMNS, logged.features_MF[rows].T)),
            step_N=np.full(BLOCK_ROWS, step),
            mask_NT=mask[rows],
            uniforms=np.full((BLOCK_ROWS, NUM_UNIFORMS), 0.5),
        )
        decision = controller.act(inputs, carry)
        carry = decision.carry
        live = np.flatnonzero(step < logged.length_E[block])
        actions[rows[live]] = decision.actions_NA[live]


def _starts(logged: Logged) -> list[EpisodeStart]:
    environments: dict[str, EnvironmentSpec] = {}
    starts = []
    for episode in logged.episodes:
        text = episode["environment_spec"]
        if text not in environments:
            environments[text] = EnvironmentSpec.model_validate_json(text)
        starts.append(
            EpisodeStart(
                environment=environments[text],
                replicate=episode["replicate"],
                repetition=0,
                epsilon=0.0,
                temperature=None,
            )
        )
    return starts


def behaviour_key(episode: Mapping[str, Any]) -> str:
    """Return what tells behaviours apart: the controller's id, its epsilon and its temperature."""
    return canonical_json([episode["controller_id"], episode["epsilon"], episode["temperature"]])
