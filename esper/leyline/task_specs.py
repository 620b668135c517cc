"""Specifications of tasks: which data a host learns from, and how it is split.

Where the data lie on a machine is no part of a task: the same spec gives the same environment seeds everywhere.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.leyline.spec_base import Spec

Positive = Annotated[int, Field(gt=0)]
SplitSizes = tuple[Positive, Positive, Positive]
"""Rows of train, validation and test."""


def _check_epoch_rows(per_epoch: int | None, validation_rows: int) -> None:
    if per_epoch is not None and per_epoch > validation_rows:
        raise ValueError(f"val_rows_per_epoch {per_epoch} is more than the {validation_rows} validation rows")


class DigitsTask(Spec):
    """scikit-learn's 8x8 digits, plain (canvas 8) or placed at random on a larger noisy canvas.

    The source images are split into train, validation and test before any copy is made.
    """

    kind: Literal["digits"] = "digits"
    canvas: Annotated[int, Field(ge=8, le=32)] = 8
    noise_sd: Annotated[float, Field(ge=0)] = 0.0
    sources: SplitSizes = (1000, 297, 500)
    copies: SplitSizes = (1, 1, 1)

    @model_validator(mode="after")
    def _enough_images(self) -> Self:
        if sum(self.sources) > 1797:
            raise ValueError(f"sources add up to {sum(self.sources)}; the data set has 1797 images")
        if self.canvas == 8 and self.noise_sd == 0 and self.copies != (1, 1, 1):
            raise ValueError("copies of plain digits are identical; use a larger canvas or noise")
        return self

    @property
    def task_id(self) -> str:
        """The id from which environment seeds derive."""
        return f"digits-{self.spec_id}"

    @property
    def val_rows_per_epoch(self) -> None:
        """All validation rows are read every epoch."""


class Cifar10Task(Spec):
    """CIFAR-10, at 32x32 or mean-pooled to a lower resolution.

    Training and validation rows are drawn from the 50,000 training images, test rows from the 10,000 test images.
    `val_rows_per_epoch` are read every epoch, all of them at the end of an episode (left out: all, always).
    """

    kind: Literal["cifar10"] = "cifar10"
    resolution: Literal[32, 16, 8] = 32
    rows: SplitSizes = (45_000, 5_000, 10_000)
    val_rows_per_epoch: Positive | None = None

    @model_validator(mode="after")
    def _enough_images(self) -> Self:
        train, val, test = self.rows
        if train + val > 50_000 or test > 10_000:
            raise ValueError(f"rows {self.rows}: CIFAR-10 has 50,000 images to train and validate on, 10,000 to test")
        _check_epoch_rows(self.val_rows_per_epoch, val)
        return self

    @property
    def task_id(self) -> str:
        """The id from which environment seeds derive; how often validation is read has no part in it."""
        return f"cifar10-{self.id_without('val_rows_per_epoch')}"


class ImagesTask(Spec):
    """Images of the user's own: a Parquet file of the Hugging Face layout, or a folder with one folder per class.

    Attributes:
        name: What the data are called.
        path: The Parquet file or the folder, absolute or below the data folder.
        resolution: Height and width after resizing, pixels.
        rows: Rows of train, validation and test, disjoint.
        val_rows_per_epoch: Validation rows read every epoch; left out, all.
    """

    kind: Literal["images"] = "images"
    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    path: str
    resolution: Annotated[int, Field(ge=4, le=512)] = 32
    rows: SplitSizes
    val_rows_per_epoch: Positive | None = None

    @model_validator(mode="after")
    def _epoch_rows(self) -> Self:
        _check_epoch_rows(self.val_rows_per_epoch, self.rows[1])
        return self

    @property
    def task_id(self) -> str:
        """The id from which environment seeds derive; the path has no part in it."""
        return f"images-{self.id_without('path', 'val_rows_per_epoch')}"


class TinyStoriesTask(Spec):
    """Next-token prediction on short stories, one token per word or mark.

    Attributes:
        source: `file` (plain text or Parquet with a `text` column, below the data folder), `download`, or `embedded`:
            small grammatical stories that a generator makes, for a machine without the real ones.
        path: The file, for `file` alone.
        context: Tokens of one row.
        vocabulary: Most tokens kept; rarer words are one unknown token.
        rows: Rows (windows of `context` + 1 tokens) of train, validation and test, from disjoint stories.
        val_rows_per_epoch: Validation rows read every epoch; left out, all.
    """

    kind: Literal["tinystories"] = "tinystories"
    source: Literal["file", "download", "embedded"] = "embedded"
    path: str | None = None
    context: Annotated[int, Field(ge=2, le=4096)] = 256
    vocabulary: Annotated[int, Field(ge=16, le=200_000)] = 50_257
    rows: SplitSizes = (2_000, 200, 400)
    val_rows_per_epoch: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.path is None) == (self.source == "file"):
            raise ValueError(
                f"source {self.source!r} and path {self.path!r}: source 'file' needs a path, no other has one"
            )
        _check_epoch_rows(self.val_rows_per_epoch, self.rows[1])
        return self

    @property
    def task_id(self) -> str:
        """The id from which environment seeds derive; the path has no part in it."""
        return f"tinystories-{self.id_without('path', 'val_rows_per_epoch')}"


TaskSpec = Annotated[DigitsTask | Cifar10Task | ImagesTask | TinyStoriesTask, Field(discriminator="kind")]
"""The union of task kinds."""

IMAGE_KINDS = ("digits", "cifar10", "images")
"""Tasks whose rows are images; the others are text."""
