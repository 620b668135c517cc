"""What one pass over the decision rows collects: offences by environment, ratios, calibration and log ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.leyline.actions import Bools
from quality.measures import Measure
from quality.support import Calibration


@dataclass
class Tally:
    """Offences of one kind by environment, the first few of them kept row by row.

    Attributes:
        keep: How many rows to keep.
    """

    keep: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    kept: list[dict[str, object]] = field(default_factory=list)

    def add(self, batch: pa.Table, wrong: Bools, what: str) -> None:
        """Count the rows that are wrong; keep the first of each environment as an example."""
        if not wrong.any():
            return
        found = batch.select(["environment", "episode_id", "step"]).filter(pa.array(wrong))
        self.kept += [row | {"found": what} for row in found.slice(0, max(self.keep - len(self.kept), 0)).to_pylist()]
        for environment, number in zip(*np.unique(found["environment"].to_numpy(), return_counts=True)):
            self.counts[environment] = self.counts.get(environment, 0) + int(number)
            here = found.filter(pc.equal(found["environment"], environment))
            here = here.sort_by([("episode_id", "ascending"), ("step", "ascending")])
            row = here.slice(0, 1).to_pylist()[0]
            example = f"{what} (episode {row['episode_id']} step {row['step']})"
            self.examples[environment] = min(self.examples.get(environment, example), example)

    def measures(self, check: str, names: Sequence[str], sound: str) -> list[Measure]:
        """Return the count of every environment."""
        return [
            Measure(
                check=check,
                environment=name,
                value=float(self.counts.get(name, 0)),
                message=f"{self.counts[name]} rows; for example {self.examples[name]}"
                if name in self.counts
                else sound,
            )
            for name in names
        ]


@dataclass(frozen=True, slots=True)
class RatioSums:
    """Of the rows of one env_seed: the sum of u(a) / mu(a) - 1, of its square, and their number."""

    total: float = 0.0
    squares: float = 0.0
    rows: int = 0

    def __add__(self, other: RatioSums) -> RatioSums:
        """Return the sums over both sets of rows."""
        return RatioSums(self.total + other.total, self.squares + other.squares, self.rows + other.rows)


@dataclass
class TreeAudit:
    """What one pass over the decision rows found.

    Attributes:
        masks: Masks that do not follow from the row's own columns.
        actions: Actions that are not canonical or not in their mask.
        propensities: Propensities that no mixture of a policy with u can have.
        ratios: What the propensity audit needs, by (environment, env_seed).
        calibration: Predicted op probabilities against what was taken, by environment.
        log_ratios: Per batch the episode's number, the step and log u - log mu (NaN where unknown).
    """

    masks: Tally = field(default_factory=Tally)
    actions: Tally = field(default_factory=Tally)
    propensities: Tally = field(default_factory=Tally)
    ratios: dict[tuple[str, int], RatioSums] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    log_ratios: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)

    def all_log_ratios(self) -> dict[str, NDArray[np.generic]]:
        """Return `number`, `step` and `log_ratio` of every decision row."""
        kinds = (("number", np.int32), ("step", np.int32), ("log_ratio", np.float32))
        return {
            name: np.concatenate([np.zeros(0, dtype=kind), *(batch[i] for batch in self.log_ratios)])
            for i, (name, kind) in enumerate(kinds)
        }
