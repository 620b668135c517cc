"""Transitions from `steps` rows: the one way in which stored and live episodes reach a learner.

States are held once, transitions point at them. Replayed rows (the prefix of a branched episode) count for the returns
of their episode and are no transitions. Rows are read a block of whole episodes at a time, so that what is in memory
beside the result does not grow with the version. Shape suffixes: M states, N transitions, V view columns, A, T as in
leyline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.leyline.actions import Actions, Bools, Op, check_mask, is_forced, is_valid, unpack_mask
from esper.leyline.errors import IntegrityError, MaskError, SpecError, unknown_name
from esper.leyline.identity import SELECTION_START, Role
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.rewards import RewardSpec, combine
from esper.leyline.schema import ACTION_FIELDS
from esper.leyline.views import get_view

if TYPE_CHECKING:
    from esper.karn.versions import Version

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_OTHER_COLUMNS = (
    "episode_id",
    "environment",
    "env_seed",
    "step",
    "role",
    "is_last",
    "replayed",
    "tree_mask",
    "op",
    *ACTION_FIELDS,
    "behaviour_logp",
    "reward_accuracy_points",
    "reward_growth_log2",
    "terminated",
    "truncated",
)
STEP_COLUMNS: tuple[str, ...] = (*_OTHER_COLUMNS, *FEATURE_COLUMNS)
"""The columns of `steps` that learning reads."""

BLOCK_ROWS = 8_192
"""Rows of `steps` that are made into transitions at once, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """Decisions and what followed, as arrays.

    Attributes:
        view: Name of the observation view.
        environments: Names to which `environment_N` points.
        obs_MV: States, float32; in memory, or on disk and read by `obs_MV[index]` (see `row_files`).
        mask_MT: Their action masks; where the states are on disk, packed in memory.
        state_N: Index of the state of each decision.
        next_N: Index of the state from which its value is bootstrapped.
        action_NA: Canonical actions, int8.
        reward_N: (n-step) reward between the two states.
        discount_N: gamma ** n, 0 where the episode terminated in between.
        forced_N: WAIT was the only valid action: counts for values, not for policies.
        env_seed_N: What splits and bootstraps go by.
        environment_N: Index into `environments`.
        episode_N: Episode index, increasing; the rows of one episode are consecutive.
        return_N: Undiscounted return of the whole episode.
        logp_N: Joint log-probability that the behaviour gave the action; NaN where undefined.
        episode_M: Episode of each state, numbered as in `episode_N`; an episode's states are consecutive and in order,
            from its first one on, replayed ones and the last included. What recurrent networks read; None: not known.
        num_left_out: Episodes of the roles asked for that failed or have no valid control.
    """

    view: str
    environments: tuple[str, ...]
    obs_MV: NDArray[np.float32]
    mask_MT: Bools
    state_N: Ints
    next_N: Ints
    action_NA: Actions
    reward_N: Floats
    discount_N: Floats
    forced_N: Bools
    env_seed_N: Ints
    environment_N: Ints
    episode_N: Ints
    return_N: Floats
    logp_N: Floats
    episode_M: Ints | None = None
    num_left_out: int = 0

    def __len__(self) -> int:
        return len(self.state_N)

    def select(self, rows_N: Bools) -> Transitions:
        """Return some of the transitions, over the same states."""
        names = [name for name in self.__slots__ if name.endswith(("_N", "_NA"))]
        return replace(self, **{name: getattr(self, name)[rows_N] for name in names})


def load_transitions(
    version: Version,
    view: str,
    rewards: Mapping[str, RewardSpec],
    roles: Sequence[str] = (Role.DATA.value,),
    keep: pc.Expression | None = None,
) -> Transitions:
    """Return the one-step transitions of a sealed version.

    Failed episodes and those whose control is not valid (their reward compares with nothing) are left out,
    and counted.

    Args:
        version: The version.
        view: Observation view.
        rewards: The reward of each environment by its name.
        roles: Which episodes; selection and evaluation are refused.
        keep: Which of them, as a condition on the columns of `episodes`; all where None.

    Raises:
        SpecError: A role that learners must not see, or no episode left.
        UnknownNameError: An environment without a reward.
        IntegrityError: Rows that contradict each other.
    """
    return joined(list(transition_blocks(version, view, rewards, roles, keep)))


def transition_blocks(
    version: Version,
    view: str,
    rewards: Mapping[str, RewardSpec],
    roles: Sequence[str] = (Role.DATA.value,),
    keep: pc.Expression | None = None,
) -> Iterator[Transitions]:
    """Yield what `load_transitions` returns in parts that follow each other: `joined`, they are the whole.

    Each part's `environments` begin with those of the part before; what each raises is as for `load_transitions`.
    """
    episodes, num_left_out = _usable_episodes(version, roles, keep)
    environments: tuple[str, ...] = ()
    num_states = num_episodes = 0
    for steps in _whole_episodes(version.batches("steps", columns=list(STEP_COLUMNS), batch_rows=BLOCK_ROWS), episodes):
        part = from_steps(steps, view, rewards)
        environments = tuple(dict.fromkeys([*environments, *part.environments]))
        place = np.array([environments.index(name) for name in part.environments])
        states_of, num = part.episode_M, len(part.obs_MV)
        if states_of is None:
            raise IntegrityError("transitions without the episodes of their states\n  expected: those of `from_steps`")
        yield replace(
            part,
            environments=environments,
            state_N=part.state_N + num_states,
            next_N=part.next_N + num_states,
            environment_N=place[part.environment_N],
            episode_N=part.episode_N + num_episodes,
            episode_M=states_of + num_episodes,
            num_left_out=num_left_out,
        )
        num_states += num
        num_episodes += int(states_of[-1]) + 1
    if not num_states:
        raise SpecError(
            f"{version.ref} has no usable episode of role {', '.join(roles)}\n"
            f"  {num_left_out} failed or have no valid control (their host broke without any seed)"
        )


def joined(parts: Sequence[Transitions]) -> Transitions:
    """Return parts of `transition_blocks` as one; the environments are those of the last part."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name in Transitions.__slots__ if name.endswith(("_N", "_NA", "_M", "_MV", "_MT"))]
    whole: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[-1], **whole)


def _usable_episodes(version: Version, roles: Sequence[str], keep: pc.Expression | None) -> tuple[pa.Array, int]:
    """Return the ids of the episodes to learn from, and how many of those asked for are left out."""
    wanted = {Role.DATA.value, Role.ONLINE.value}
    for role in roles:
        if role not in wanted:
            raise SpecError(f"episodes of role {role!r} are not for learning\n  expected: one of {sorted(wanted)}")
    episodes = version.table(
        "episodes", columns=["episode_id", "role", "replicate", "outcome", "control_valid"], filter=keep
    )
    episodes = episodes.filter(pc.is_in(episodes["role"], pa.array(list(roles))))
    usable = pc.and_(episodes["control_valid"], pc.not_equal(episodes["outcome"], "failed"))
    num_left_out = len(episodes) - (pc.sum(usable).as_py() or 0)
    episodes = episodes.filter(usable)
    held_out = pc.greater_equal(episodes["replicate"], SELECTION_START)
    if pc.any(held_out).as_py():
        worst = episodes.filter(held_out)["replicate"][0].as_py()
        raise SpecError(f"replicate {worst} is for selection or evaluation\n  expected: below {SELECTION_START}")
    return episodes["episode_id"].combine_chunks(), num_left_out


def _whole_episodes(batches: Iterator[pa.RecordBatch], wanted: pa.Array) -> Iterator[pa.Table]:
    """Yield the rows of some episodes, never a part of one: the rows of an episode follow each other in `batches`."""
    kept: list[pa.Table] = []
    for batch in batches:
        rows = pa.Table.from_batches([batch])
        rows = pa.concat_tables([*kept, rows.filter(pc.is_in(rows["episode_id"], wanted))])
        if not len(rows):
            continue
        last = pc.index(rows["episode_id"], rows["episode_id"][-1]).as_py()
        kept = [rows.slice(last)]
        if last:
            yield rows.slice(0, last)
    yield from kept


def from_steps(steps: pa.Table, view: str, rewards: Mapping[str, RewardSpec]) -> Transitions:
    """Return the one-step transitions of whole episodes, in the order of (env_seed, episode_id, step).

    Raises:
        UnknownNameError: An environment without a reward.
        IntegrityError: An episode is not whole, a reward component is missing, or an action is not in its mask.
    """
    steps = steps.select(STEP_COLUMNS).sort_by(
        [("env_seed", "ascending"), ("episode_id", "ascending"), ("step", "ascending")]
    )
    names, environment = _codes(steps["environment"])
    for name in names:
        if name not in rewards:
            raise unknown_name("environment with a reward", name, rewards)
    _, episode = _codes(steps["episode_id"])
    first = np.flatnonzero(np.diff(episode, prepend=-1) != 0)
    is_last = _bools(steps["is_last"])
    _check_whole(steps, first, is_last, episode)
    reward, total = _rewards(steps, first, [rewards[names[environment[row]]] for row in first])
    mask = _masks(steps)
    actions = _actions(steps)
    decisions = np.flatnonzero(~is_last & ~_bools(steps["replayed"]))
    episode = np.cumsum(np.diff(episode, prepend=-1) != 0) - 1
    _check_valid(actions[decisions], mask[decisions], decisions)
    return Transitions(
        view=view,
        environments=tuple(names),
        obs_MV=_observations(steps, view),
        mask_MT=mask,
        state_N=decisions,
        next_N=decisions + 1,
        action_NA=actions[decisions],
        reward_N=reward[decisions],
        discount_N=1.0 - _bools(steps["terminated"])[decisions].astype(np.float64),
        forced_N=is_forced(mask[decisions]),
        env_seed_N=_numbers(steps["env_seed"], pa.int64())[decisions],
        environment_N=environment[decisions],
        episode_N=episode[decisions],
        return_N=total[decisions],
        logp_N=_numbers(steps["behaviour_logp"], pa.float64())[decisions],
        episode_M=episode,
    )


def _codes(column: pa.ChunkedArray) -> tuple[list[str], Ints]:
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _bools(column: pa.ChunkedArray) -> Bools:
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=bool)


def _numbers(column: pa.ChunkedArray, kind: pa.DataType) -> NDArray[Any]:
    result: NDArray[Any] = pc.cast(column, kind, safe=False).to_numpy(zero_copy_only=False)
    return result


def _observations(steps: pa.Table, view: str) -> NDArray[np.float32]:
    columns = {name: _numbers(steps[name], pa.float32()) for name in FEATURE_COLUMNS}
    return get_view(view).encode(columns, _numbers(steps["step"], pa.int64()))


def _masks(steps: pa.Table) -> Bools:
    packed = pc.cast(steps["tree_mask"], pa.binary()).combine_chunks()
    joined = np.frombuffer(b"".join(packed.to_pylist()), dtype=np.uint8)
    if joined.size % max(len(steps), 1):
        raise IntegrityError("masks of different lengths in `tree_mask`\n  regenerate the data set")
    try:
        mask = unpack_mask(joined.reshape(len(steps), -1))
        check_mask(mask)
    except (MaskError, ValueError) as error:
        raise IntegrityError(f"`tree_mask`: {error}") from None
    return mask


def _actions(steps: pa.Table) -> Actions:
    ops = pc.fill_null(pc.index_in(steps["op"], pa.array([op.name for op in Op])), 0)
    levers = [_numbers(pc.fill_null(steps[name], 0), pa.int8()) for name in ACTION_FIELDS]
    return np.stack([_numbers(ops, pa.int8()), *levers], axis=1).astype(np.int8)


def _check_valid(actions: Actions, mask: Bools, decisions: Ints) -> None:
    bad = np.flatnonzero(~is_valid(actions, mask))
    if bad.size:
        raise IntegrityError(
            f"{bad.size} actions are not in their mask, first {actions[bad[0]].tolist()} in row {decisions[bad[0]]}\n"
            "  run `esper health` on the data set"
        )


def _check_whole(steps: pa.Table, first: Ints, is_last: Bools, episode: Ints) -> None:
    """Every episode is step 0, 1, ..., T, and row T alone is its last."""
    lengths = np.diff(first, append=len(episode))
    expected = np.arange(len(episode)) - np.repeat(first, lengths)
    ends = np.zeros(len(episode), dtype=bool)
    ends[first + lengths - 1] = True
    wrong = np.flatnonzero((_numbers(steps["step"], pa.int64()) != expected) | (ends != is_last))
    if wrong.size:
        name = steps["episode_id"][int(wrong[0])].as_py()
        raise IntegrityError(f"episode {name} is not whole\n  expected: steps 0 to T, the last one marked is_last")


def _rewards(steps: pa.Table, first: Ints, specs: Sequence[RewardSpec]) -> tuple[Floats, Floats]:
    """Return each row's reward (0 on last rows) and its episode's return."""
    points = np.asarray(_numbers(steps["reward_accuracy_points"], pa.float64()), dtype=np.float64)
    growth = np.asarray(_numbers(steps["reward_growth_log2"], pa.float64()), dtype=np.float64)
    reward, total = np.zeros(len(points)), np.zeros(len(points))
    for start, stop, spec in zip(first, [*first[1:], len(points)], specs):
        if stop - start < 2:
            continue
        values = combine(spec, points[start : stop - 1], growth[start : stop - 1])
        if not np.isfinite(values).all():
            name = steps["episode_id"][int(start)].as_py()
            raise IntegrityError(f"episode {name} lacks a reward component\n  run `esper health` on the data set")
        reward[start : stop - 1] = values
        total[start:stop] = values.sum()
    return reward, total
