"""How alpha rises while a seed blends in: constant within an epoch, curve(k / T) in blending epoch k = 1 .. T."""

from __future__ import annotations

import math

from esper.leyline.actions import Blend

_SIGMOID_SPAN = 12.0
"""A sigmoid of steepness 1 covers +-6 of the logistic, rescaled to run from 0 to 1 exactly."""


def alpha_at(blend: Blend, epoch: int, total_epochs: int) -> float:
    """Return alpha in [0, 1] in blending epoch `epoch` (1 .. total_epochs; beyond it, 1)."""
    share = min(1.0, max(0.0, epoch / total_epochs))
    if blend in (Blend.LINEAR, Blend.GATED):
        return share
    steepness = {Blend.SIGMOID_HALF: 0.5, Blend.SIGMOID: 1.0, Blend.SIGMOID_DOUBLE: 2.0}[blend]
    low, value, high = (1 / (1 + math.exp(-_SIGMOID_SPAN * steepness * (s - 0.5))) for s in (0.0, share, 1.0))
    return (value - low) / (high - low)
