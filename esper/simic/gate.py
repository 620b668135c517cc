"""The regression gate of fine-tuning: is the policy worse than the one that it started from?

The start policy's returns are those of the warm-up updates; after every update the returns of the last
`gate_updates` are compared with them, each environment centred on the start's mean there. Where the difference is below
zero with 95 % confidence (Welch), the last policy that passed comes back, the learning rate halves, the leash doubles.
The episodes that decide differ in environment seeds; the reward is paired with the control of its own seed, so most
of what a seed brings cancels. The result is the policy after the last update, or the one that the gate put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

FLAT = 1e-6
"""Returns that differ by less than this are the same."""


@dataclass
class Gate:
    """Tells whether recent returns are below those of the start policy."""

    window: int
    start: dict[str, list[float]] = field(default_factory=dict)
    recent: list[dict[str, list[float]]] = field(default_factory=list)

    def note_start(self, returns: Mapping[str, Sequence[float]]) -> None:
        """Add returns of the start policy, by environment."""
        for environment, values in returns.items():
            self.start.setdefault(environment, []).extend(values)

    def passes(self, returns: Mapping[str, Sequence[float]]) -> bool:
        """Add an update's returns; false where the recent ones are worse than the start's with 95 % confidence."""
        self.recent = [*self.recent, {name: list(values) for name, values in returns.items()}][-self.window :]
        before: list[float] = []
        after: list[float] = []
        for environment, values in self.start.items():
            mean = float(np.mean(values))
            latest = [v - mean for part in self.recent for v in part.get(environment, [])]
            before += [value - mean for value in values] if latest else []
            after += latest
        if len(before) < 2 or len(after) < 2 or float(np.std(before + after)) < FLAT:
            return True
        test = stats.ttest_ind(after, before, equal_var=False, alternative="less")
        return not float(test.pvalue) < 0.025

    def restart(self) -> None:
        """Forget the recent returns: another policy acts from now on."""
        self.recent = []
