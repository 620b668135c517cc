"""What the strict gates measure against: one place for the gates themselves and for the health checks."""

from __future__ import annotations

G2_MIN_IMPROVEMENT_POINTS = 0.5
"""Least shadow improvement of a seed that blends in, points of accuracy. The published strict G2 asks as much of the
host's own improvement, which says nothing about a seed that the host does not know."""

G2_MIN_GRADIENT_RATIO = 0.1
"""Least |g_seed| / |g_host| * sqrt(P_host / P_seed): the published strict G2's."""

G2_VANISHED_SHARE = 1.0
"""Share of a seed's tensors whose gradient vanishes, at which it is dead: all of them."""

G3_MIN_ALPHA = 1 - 1e-6
"""The alpha that counts as full: the published G3's."""

G5_MIN_REMOVAL_COST_POINTS = 1.0
"""Least removal cost of a seed that is committed, points of accuracy: the published strict G5's."""
