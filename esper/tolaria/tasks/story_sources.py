"""Where stories come from: a text file, a Parquet file, a download, or the embedded generator; one text at a time."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from esper.leyline.errors import DataError
from esper.leyline.task_specs import TinyStoriesTask
from esper.tolaria.tasks.location import CACHE_VARIABLE, cache_folder, locate
from esper.tolaria.tasks.stories import embedded_story

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-valid.txt"
END_MARK = "<|endoftext|>"
TEXT_COLUMN = "text"
TIMEOUT_S = 30
_PEEK_BYTES = 1 << 20


def open_stories(task: TinyStoriesTask) -> tuple[Iterator[str], str]:
    """Return the stories of a task, one by one, and where they come from in words.

    Raises:
        DataError: The file is missing or the download failed; while reading: a row or line is no text.
    """
    if task.source == "embedded":
        return (embedded_story(index) for index in itertools.count()), "generated stories (embedded, not TinyStories)"
    if task.source == "download":
        return _text_file(_downloaded()), "TinyStories (validation file, downloaded)"
    path = locate(task.path or "")
    if path.suffix == ".parquet":
        return _parquet_file(path), f"text {path.name} (Parquet)"
    return _text_file(path), f"text {path.name}"


def _text_file(path: Path) -> Iterator[str]:
    """Stories end at END_MARK where the file's first megabyte has one, else at blank lines."""
    try:
        with path.open("rb") as file:
            marked = END_MARK.encode() in file.read(_PEEK_BYTES)
            file.seek(0)
            story: list[str] = []
            for number, raw in enumerate(file, start=1):
                line = _decode(raw, number, path)
                pieces = line.split(END_MARK) if marked else [line] if line.strip() else ["", ""]
                for piece in pieces[:-1]:
                    yield "".join([*story, piece])
                    story = []
                story.append(pieces[-1])
            yield "".join(story)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _decode(raw: bytes, number: int, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"line {number} of {path}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8\n"
            "  expected: a text file in UTF-8; convert it"
        ) from None


def _parquet_file(path: Path) -> Iterator[str]:
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if TEXT_COLUMN not in names:
                raise DataError(f"{path} has no column {TEXT_COLUMN!r}\n  its columns: {', '.join(names) or 'none'}")
            for batch in file.iter_batches(batch_size=1024, columns=[TEXT_COLUMN]):
                for value in batch.column(0):
                    text = value.as_py()
                    if not isinstance(text, str):
                        raise DataError(f"row {row} of {path}: {text!r} is no text\n  expected: a story in every row")
                    yield text
                    row += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
    except UnicodeDecodeError:
        raise DataError(f"row {row} of {path}: the text is not UTF-8") from None


def _downloaded() -> Path:
    """The downloaded file; whole or absent."""
    path = cache_folder() / "tinystories" / "TinyStories-valid.txt"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent))
    except OSError as error:
        raise DataError(
            f"cannot write to the cache {path.parent}: {error}\n  name another in ${CACHE_VARIABLE}"
        ) from None
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as response, (folder / path.name).open("wb") as file:
            shutil.copyfileobj(response, file)
        (folder / path.name).replace(path)
    except OSError as error:
        raise DataError(
            f"TinyStories could not be downloaded: {error}\n  from: {URL}\n"
            f"  either save it as {path}, or set the task's source to 'embedded' (generated stories) or 'file'"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path
