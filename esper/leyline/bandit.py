"""What a schedule bandit may choose among, and how long it may look."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.leyline.blueprint_names import check_blueprint
from esper.leyline.errors import UnknownNameError
from esper.leyline.spec_base import Spec

Spread = Annotated[float, Field(gt=0)]


class BanditSpec(Spec):
    """Thompson sampling over schedules of one lever setting: blueprint x place x birth epoch x tempo.

    A place is a slot, or all slots where the environment lets all of them be committed.

    Attributes:
        pulls: Live episodes.
        pulls_per_round: Pulls that are chosen together, before the outcomes of any of them, so that workers stay busy.
        blueprints: In the names of one topology; on a host of the other each stands for its counterpart.
        births: Birth epochs.
        tempos: Epochs of blending.
        prior_sd: How far returns of schedules are expected to lie apart, in units of the reward's scale (by which a
            good seed earns 1 to 3).
        noise_sd: First guess of the spread of one episode's return; it weighs as much as three episodes.
    """

    pulls: Annotated[int, Field(ge=2, le=10_000)] = 85
    pulls_per_round: Annotated[int, Field(ge=1)] = 1
    blueprints: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "conv_heavy",
        "conv_light",
        "depthwise",
        "bottleneck",
    )
    births: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 2)
    tempos: Annotated[tuple[Literal[3, 5, 8, 12], ...], Field(min_length=1)] = (3, 5)
    prior_sd: Spread = 1.0
    noise_sd: Spread = 0.5

    @model_validator(mode="after")
    def _distinct_and_known(self) -> Self:
        for name in ("blueprints", "births", "tempos"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names something twice: {list(values)}")
        for blueprint in self.blueprints:
            try:
                check_blueprint(blueprint)
            except UnknownNameError as error:
                raise ValueError(str(error)) from None
        return self
