"""Rewards: pure functions of a whole episode's stored columns, so any reward is relabelled without new data.

`gain` is the change of the potential

    Phi_t = 100 * (a_t - a_t^control) - lambda * log2(1 + P_t / P_host)

divided by a scale: a_t the validation accuracy at observation t, a^control the trunk's at the same epoch, P_t the
parameters of all seeds present. The last step switches to the committed network on the full validation set, so the
return telescopes to the final paired gain minus rent. `sparse` pays the same total at the last step alone.
Source: potential-based shaping, Ng, Harada & Russell 1999, with gamma = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from esper.leyline.spec_base import Spec

Floats = NDArray[np.float64]


class RewardSpec(Spec):
    """A reward: its mode, the rent per doubling (points) and the scale (points per unit of return)."""

    name: str
    mode: Literal["gain", "sparse"] = "gain"
    rent_points: float
    scale_points: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeColumns:
    """What a reward reads of one episode with T decisions.

    Attributes:
        val_accuracy: Per observation, fraction, [T + 1].
        control_val_accuracy: The trunk's at the same epochs, fraction, [T + 1].
        seed_params: Parameters of all seeds present, [T + 1].
        host_params: Parameters of the bare host.
        final_val_accuracy: The committed network's, full validation set, fraction.
        control_final_val_accuracy: The trunk's.
        final_seed_params: Parameters that the committed network has beyond the host.
    """

    val_accuracy: Floats
    control_val_accuracy: Floats
    seed_params: Floats
    host_params: float
    final_val_accuracy: float
    control_final_val_accuracy: float
    final_seed_params: float


def reward_components(episode: EpisodeColumns) -> tuple[Floats, Floats]:
    """Return the changes of (paired accuracy in points, log2 of growth) that follow each decision, [T] each."""
    accuracy = 100.0 * (episode.val_accuracy - episode.control_val_accuracy)
    growth = np.log2(1.0 + episode.seed_params / episode.host_params)
    accuracy[-1] = 100.0 * (episode.final_val_accuracy - episode.control_final_val_accuracy)
    growth[-1] = np.log2(1.0 + episode.final_seed_params / episode.host_params)
    return np.diff(accuracy), np.diff(growth)


def combine(spec: RewardSpec, accuracy_points: Floats, growth_log2: Floats) -> Floats:
    """Return the reward of each decision of one episode from its stored components, [T]."""
    gain: Floats = (accuracy_points - spec.rent_points * growth_log2) / spec.scale_points
    if spec.mode == "gain":
        return gain
    sparse = np.zeros_like(gain)
    sparse[-1] = gain.sum()
    return sparse
