"""Environments by name, made smaller: fewer rows, epochs or batches, a lower resolution, and a rate that suits it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from esper.leyline.errors import SpecError
from esper.leyline.library import load_environment
from esper.leyline.spec_base import Spec
from esper.leyline.specs import EnvironmentSpec

Positive = Annotated[int, Field(gt=0)]


class Sizes(Spec):
    """What of an environment is replaced; left out, it stays.

    Attributes:
        train_rows: Training rows, one pass over them an epoch, and validation on a fifth as many every epoch.
        resolution: Height and width of the images, pixels.
        max_epochs: Most epochs of an episode.
        max_batches: Most training batches of an epoch.
        learning_rate: The optimiser's, before its schedule.
    """

    train_rows: Positive | None = None
    resolution: Positive | None = None
    max_epochs: Positive | None = None
    max_batches: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None


def sized_environment(name: str, sizes: Sizes, **changes: object) -> EnvironmentSpec:
    """Return a named environment with its sizes and further fields replaced.

    Raises:
        UnknownNameError: No environment has that name.
        SpecError: The task has no such size, or a changed field does not fit.
    """
    environment = load_environment(name)
    fields: dict[str, Any] = environment.model_dump()
    task = fields["task"]
    if sizes.train_rows is not None:
        if "rows" not in task:
            raise SpecError(
                f"--train-rows {sizes.train_rows}: task {environment.task.kind!r} of {name!r} has a fixed size\n"
                "  expected: an environment whose task has `rows`, for example cifar10; or leave it out"
            )
        task["rows"] = (sizes.train_rows, *task["rows"][1:])
        task["val_rows_per_epoch"] = min(task["rows"][1], max(1, sizes.train_rows // 5))
        fields["batches_per_epoch"] = max(1, sizes.train_rows // environment.batch_size)
    if sizes.resolution is not None:
        if "resolution" not in task:
            raise SpecError(
                f"--resolution {sizes.resolution}: task {environment.task.kind!r} of {name!r} has a fixed size\n"
                "  expected: an environment whose task has a `resolution`, for example cifar10; or leave it out"
            )
        task["resolution"] = sizes.resolution
    if sizes.max_epochs is not None:
        fields["horizon"] = min(fields["horizon"], sizes.max_epochs)
    if sizes.max_batches is not None:
        fields["batches_per_epoch"] = min(fields["batches_per_epoch"], sizes.max_batches)
    if sizes.learning_rate is not None:
        fields["learning_rate"] = sizes.learning_rate
    return EnvironmentSpec.parse({**fields, **changes}, f"environment {name!r}")
