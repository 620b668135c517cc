"""A sealed version as a Minari data set (Minari 0.5, HDF5): observations under a view, flat canonical actions.

The list of actions is in the metadata (`actions`, one row of `action_columns` per action), the tree masks are infos.
Episodes that failed, have no valid control, or were made for selection or evaluation are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.karn.card import is_skeleton
from esper.karn.exchange import (
    Report,
    learnable_episodes,
    rewards_of_version,
    silent,
    whole_episodes,
    whole_or_nothing,
)
from esper.leyline.action_list import listed_actions, place_in_list
from esper.leyline.actions import ACTION_COLUMNS, TREE_WIDTH, Actions, Op, unpack_mask
from esper.leyline.errors import DataError, IntegrityError, unknown_name
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.rewards import RewardSpec, combine
from esper.leyline.schema import ACTION_FIELDS
from esper.leyline.views import View, get_view

if TYPE_CHECKING:
    from esper.karn.versions import Version

NAMESPACE = "esper"
FOLDER_VARIABLE = "MINARI_DATASETS_PATH"

_ACTION = ("op", *ACTION_FIELDS)
_KEY = ("episode_id", "environment", "env_seed", "step", "is_last", "replayed")
_OUTCOME = ("behaviour_logp", "reward_accuracy_points", "reward_growth_log2", "terminated", "truncated")
_ABOUT = ("episode_id", "environment", "controller", "epsilon", "replicate", "repetition", "outcome")


def dataset_id(version: Version) -> str:
    """Return the id under which Minari loads a version: esper/NAME-vN."""
    return f"{NAMESPACE}/{version.name}-v{version.number}"


def export_minari(version: Version, folder: Path, *, view: str = "v4", report: Report = silent) -> Path:
    """Write a version into a folder of Minari data sets (what $MINARI_DATASETS_PATH names) and return its own folder.

    Args:
        version: The version.
        folder: Of all data sets; that of this one, esper/NAME-vN below it, must be free.
        view: Observation view.
        report: Told the episodes that are written.

    Raises:
        SpecError: The data set is there already, or the version has no episode to learn from or names no rewards.
        UnknownNameError: An unknown view, or an environment without a reward.
        DataError: Minari is not installed.
        IntegrityError: A file of the version is missing or damaged.
        StoreError: The folder cannot be written.
    """
    encoder, rewards = get_view(view), rewards_of_version(version)
    episodes = learnable_episodes(version)
    for environment in pc.unique(episodes["environment"]).to_pylist():
        if environment not in rewards:
            raise unknown_name("environment with a reward", environment, rewards)
    actions = _listed(version, episodes)
    with whole_or_nothing(folder / dataset_id(version)) as temporary:
        storage = _new_storage(temporary / "data", encoder.width, len(actions))
        about = {row["episode_id"]: row for row in episodes.select(_ABOUT).to_pylist()}
        columns = [*_KEY, *FEATURE_COLUMNS, *_ACTION, "tree_mask", *_OUTCOME]
        for rows in whole_episodes(version, columns, episodes):
            buffers = list(_buffers(rows, encoder, actions, rewards, about))
            storage.update_episodes(buffers)
            report(len(buffers))
        storage.update_metadata(_metadata(version, view, encoder, actions))
    _mark_namespace(folder / NAMESPACE)
    return folder / dataset_id(version)


def _new_storage(folder: Path, width: int, num_actions: int) -> Any:
    try:
        from gymnasium import spaces
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise DataError(f"Minari cannot be imported: {error}\n  install it: pip install 'esper[export]'") from None
    folder.mkdir(parents=True)
    return MinariStorage.new(
        folder.absolute(),  # Minari joins a relative one to itself
        observation_space=spaces.Box(-np.inf, np.inf, (width,), np.float32),
        action_space=spaces.Discrete(num_actions),
        data_format="hdf5",
    )


def _mark_namespace(folder: Path) -> None:
    """Minari lists only what lies in a namespace that has this file."""
    path = folder / "namespace_metadata.json"
    if not path.exists():
        path.write_text('{"description": "Networks that grow while they train"}\n', encoding="utf-8")


def _listed(version: Version, episodes: pa.Table) -> Actions:
    """The list of actions: what is germinated anywhere in the data, and what every list has."""
    ids = episodes["episode_id"].combine_chunks()
    seen: list[Actions] = []
    wanted = pc.field("op") == Op.GERMINATE.name
    for batch in version.batches("steps", columns=["episode_id", *_ACTION], filter=wanted):
        rows = pa.Table.from_batches([batch])
        seen.append(np.unique(_actions(rows.filter(pc.is_in(rows["episode_id"], ids))), axis=0))
    return listed_actions(np.concatenate([*seen, np.zeros((0, len(_ACTION)), np.int8)]))


def _actions(rows: pa.Table) -> Actions:
    ops = pc.fill_null(pc.index_in(rows["op"], pa.array([op.name for op in Op])), 0)
    levers = [_numbers(pc.fill_null(rows[name], 0), np.int8) for name in ACTION_FIELDS]
    return np.stack([_numbers(ops, np.int8), *levers], axis=1).astype(np.int8)


def _numbers(column: pa.ChunkedArray, kind: type[np.generic]) -> NDArray[Any]:
    return np.asarray(column.to_numpy()).astype(kind)


def _buffers(
    rows: pa.Table,
    encoder: View,
    actions: Actions,
    rewards: Mapping[str, RewardSpec],
    about: Mapping[str, dict[str, Any]],
) -> Iterator[Any]:
    """One episode buffer per episode of a table of whole ones."""
    from minari.data_collector import EpisodeBuffer

    step = _numbers(rows["step"], np.int64)
    features = {name: _numbers(rows[name], np.float32) for name in FEATURE_COLUMNS}
    observations = encoder.encode(features, step)
    packed = np.frombuffer(b"".join(rows["tree_mask"].to_pylist()), np.uint8).reshape(rows.num_rows, -1)
    masks = unpack_mask(packed)
    flat = place_in_list(actions, _actions(rows))
    points, growth, logp = (_numbers(rows[name], np.float64) for name in (*_OUTCOME[1:3], _OUTCOME[0]))
    terminated, truncated, replayed = (_flags(rows[name]) for name in ("terminated", "truncated", "replayed"))
    ids = rows["episode_id"].to_pylist()
    starts: list[int] = np.flatnonzero(step == 0).tolist()
    for start, stop in zip(starts, [*starts[1:], rows.num_rows]):
        known = about[ids[start]]
        if not _is_whole(rows, ids, step, start, stop):
            raise IntegrityError(f"episode {ids[start]} is not whole\n  run `esper health` on the data set")
        decisions = slice(start, stop - 1)
        reward = combine(rewards[known["environment"]], points[decisions], growth[decisions])
        if not np.isfinite(reward).all():
            raise IntegrityError(f"episode {ids[start]} lacks a reward component\n  run `esper health` on the data set")
        yield EpisodeBuffer(
            seed=rows["env_seed"][start].as_py(),
            options=known,
            observations=observations[start:stop],
            actions=flat[decisions],
            rewards=reward,
            terminations=terminated[decisions],
            truncations=truncated[decisions],
            infos={
                "mask": masks[start:stop],
                "behaviour_logp": logp[start:stop],
                "replayed": replayed[start:stop],
            },
        )


def _is_whole(rows: pa.Table, ids: list[str], step: NDArray[np.int64], start: int, stop: int) -> bool:
    """Steps 0 to T of one episode, the last one marked."""
    in_order = bool((step[start:stop] == np.arange(stop - start)).all())
    return in_order and ids[start] == ids[stop - 1] and bool(rows["is_last"][stop - 1].as_py())


def _flags(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    return _numbers(pc.fill_null(column, False), np.bool_)


def _metadata(version: Version, view: str, encoder: View, actions: Actions) -> dict[str, Any]:
    import minari

    made_up = "SKELETON DATA, every number is made up. " if is_skeleton(version) else ""
    return {
        "dataset_id": dataset_id(version),
        "minari_version": minari.__version__,
        "algorithm_name": "several controllers; `controller` and `epsilon` are among an episode's options",
        "author": {"Esper"},
        "author_email": set(),
        "code_permalink": "; ".join(version.manifest.code_commits),
        "description": (
            f"{made_up}Networks that grow while they train: {version.ref}, digest {version.manifest.digest}. "
            f"Observations are those of view {view}, actions places in `actions`. info `mask` holds what is valid: "
            f"{TREE_WIDTH} entries of the action tree."
        ),
        "esper_version": version.ref,
        "esper_digest": version.manifest.digest,
        "esper_skeleton": is_skeleton(version),
        "view": view,
        "observation_names": list(encoder.names),
        "action_columns": list(ACTION_COLUMNS),
        "actions": actions.tolist(),
    }
