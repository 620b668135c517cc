"""Data sets for d3rlpy (Seno and Imai, JMLR 2022): whole episodes with flat canonical actions.

What d3rlpy cannot hold is lost: the masks, the behaviours' probabilities, and which decisions were forced.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from esper.karn.card import is_skeleton
from esper.karn.exchange import whole_or_nothing
from esper.leyline.actions import ACTION_COLUMNS
from esper.leyline.errors import SpecError
from esper.leyline.rewards import RewardSpec
from esper.simic.batches import Transitions
from esper.simic.flat_actions import FlatActions
from esper.simic.load_tensors import load_tensors
from esper.tamiyo.networks import seeded

if TYPE_CHECKING:
    from esper.karn.versions import Version


def import_d3rlpy() -> Any:
    """Return the module d3rlpy, its progress messages off; the import takes seconds and prints an appeal of gym's."""
    import tqdm  # type: ignore[import-untyped]

    tqdm.tqdm.set_lock(threading.RLock())  # its own lock is a named semaphore, which a killed worker leaves behind
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    return d3rlpy


@contextlib.contextmanager
def library_randomness(seed: int) -> Iterator[None]:
    """Draws of torch, NumPy's global generator and `random` inside come from `seed`; all are as before afterwards.

    d3rlpy knows no other randomness: even its replay buffer draws rows from NumPy's global generator.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with seeded(seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def mdp_dataset(
    transitions: Transitions,
    actions: FlatActions,
    *,
    obs_MV: NDArray[np.float32] | None = None,
    n_step: int = 1,
    gamma: float = 1.0,
    chained: bool = True,
) -> Any:
    """Return one-step transitions as a `d3rlpy.dataset.MDPDataset` of discrete actions.

    d3rlpy drops the last decision of an episode that was cut off, for lack of a next observation: such an episode gets
    its last observation as one more row, which no transition starts from.

    Args:
        transitions: One-step transitions of whole episodes.
        actions: The list that action ids point into.
        obs_MV: What to store for each state instead of the view's rows.
        n_step: Rewards before the bootstrap, picked by d3rlpy.
        gamma: Discount between them.
        chained: The next observation of a decision must be the observation of the row after it. Without, rows may be
            missing: right for cloning alone, which reads no next observation.

    Raises:
        SpecError: No transition, an action that is not listed, or rows missing in the middle of an episode.
    """
    if not len(transitions):
        raise SpecError("no transition to export\n  expected: at least one decision")
    d3rlpy = import_d3rlpy()
    states = transitions.obs_MV if obs_MV is None else obs_MV
    ends = np.append(np.diff(transitions.episode_N) != 0, True)
    if chained:
        _check_chained(transitions, ends)
    cut = ends & (transitions.discount_N > 0) & chained
    row = np.repeat(np.arange(len(transitions)), 1 + cut)
    extra = np.append(row[1:] == row[:-1], False)
    extra = np.roll(extra, 1)  # the second copy of a row that was cut off stands for its last observation
    last = np.append(np.diff(transitions.episode_N[row]) != 0, True)
    terminated = last & ~extra
    with library_randomness(0):  # building one draws numbers of which nothing depends
        return d3rlpy.dataset.MDPDataset(
            observations=states[np.where(extra, transitions.next_N[row], transitions.state_N[row])],
            actions=np.where(extra, 0, actions.require(transitions.action_NA)[row])[:, None],
            rewards=np.where(extra, 0.0, transitions.reward_N[row])[:, None].astype(np.float32),
            terminals=terminated.astype(np.float32),
            timeouts=(last & extra).astype(np.float32),
            transition_picker=d3rlpy.dataset.MultiStepTransitionPicker(n_steps=n_step, gamma=gamma),
            action_space=d3rlpy.constants.ActionSpace.DISCRETE,
            action_size=len(actions),
        )


def _check_chained(transitions: Transitions, ends: NDArray[np.bool_]) -> None:
    broken = np.flatnonzero(~ends[:-1] & (transitions.next_N[:-1] != transitions.state_N[1:]))
    if broken.size:
        episode = int(transitions.episode_N[broken[0]])
        raise SpecError(f"episode {episode} has rows missing after row {broken[0]}\n  expected: one-step transitions")


def export_d3rlpy(version: Version, path: Path, *, view: str, rewards: Mapping[str, RewardSpec]) -> FlatActions:
    """Write the training episodes of a sealed version as a file that `d3rlpy.dataset.ReplayBuffer.load` reads.

    The list of actions goes beside it, as `PATH.actions.json`: one row of named columns per action id.

    Args:
        version: The data.
        path: The HDF5 file to write.
        view: Observation view.
        rewards: The reward of each environment by its name.

    Returns:
        The list of actions.

    Raises:
        SpecError: Nothing to learn from, or the file is there already.
        StoreError: The files cannot be written.
    """
    listing_path = path.with_name(f"{path.name}.actions.json")
    with whole_or_nothing(path) as temporary, whole_or_nothing(listing_path) as temporary_listing:
        transitions = load_tensors(version, view, rewards)
        actions = FlatActions.of(transitions)
        dataset = mdp_dataset(transitions, actions)
        listing = {
            "columns": list(ACTION_COLUMNS),
            "actions": actions.actions_LA.tolist(),
            "dataset": version.ref,
            "digest": version.manifest.digest,
            "view": view,
            "skeleton": is_skeleton(version),
        }
        with temporary.open("w+b") as file:
            dataset.dump(file)
        temporary_listing.write_text(json.dumps(listing) + "\n", encoding="utf-8")
    return actions
