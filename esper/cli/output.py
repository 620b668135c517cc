"""What a command prints: data on stdout, everything for a human reader on stderr, exit codes from the error tree."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from esper.leyline.errors import SpecError, StoreError

if TYPE_CHECKING:
    import pyarrow as pa

    from esper.karn.versions import Version

Format = Literal["table", "csv", "json", "parquet"]

MAX_TABLE_ROWS = 200
SUFFIXES: dict[str, Format] = {".csv": "csv", ".json": "json", ".parquet": "parquet"}


def note(text: str) -> None:
    """Print a line for the reader, on stderr."""
    print(text, file=sys.stderr, flush=True)


def note_verdict(version: Version, *, only_bad: bool = False) -> None:
    """Print one line on stderr: what a version is fit for (`only_bad`: where it is blocked or was never checked)."""
    from esper.karn.verdict_text import verdict_line

    line = verdict_line(version, only_bad=only_bad)
    if line is not None:
        note(line)


def write_text(text: str, output: Path | None) -> None:
    """Write text to a file, or to stdout where `output` is None; StoreError where it cannot be written."""
    if output is None:
        print(text, end="" if text.endswith("\n") else "\n")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {output}: {error.strerror}") from None
    note(f"written to {output}")


def choose_format(given: Format | None, output: Path | None) -> Format:
    """Return the format asked for, else what the output's suffix says, else a table."""
    if given is not None:
        return given
    return SUFFIXES.get(output.suffix, "table") if output else "table"


def write_table(table: pa.Table, form: Format, output: Path | None) -> None:
    """Write rows to a file, or to stdout where `output` is None.

    Raises:
        SpecError: Parquet would go to a terminal.
        StoreError: The file cannot be written.
    """
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise SpecError("Parquet is binary and stdout is a terminal\n  add --output FILE, or pipe it into a file")
    data = _render(table, form)
    if output is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        try:
            output.write_bytes(data)
        except OSError as error:
            raise StoreError(f"cannot write {output}: {error.strerror}") from None
        note(f"{table.num_rows:,} rows written to {output}")
    if form == "table" and table.num_rows > MAX_TABLE_ROWS:
        note(f"… {table.num_rows - MAX_TABLE_ROWS:,} more rows; --format csv, json or parquet writes all of them")


def _render(table: pa.Table, form: Format) -> bytes:
    import io

    if form == "table":
        rows = table.slice(0, MAX_TABLE_ROWS).to_pylist()
        return rich_table(table.column_names, [list(row.values()) for row in rows]).encode()
    if form == "json":
        rows = [{name: _plain(value) for name, value in row.items()} for row in table.to_pylist()]
        return (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode()
    buffer = io.BytesIO()
    if form == "csv":
        import pyarrow.csv

        pyarrow.csv.write_csv(_flat(table), buffer)
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """A value as JSON knows it: bytes in hex, times in ISO 8601, what is not finite as null."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, (str, int)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _flat(table: pa.Table) -> pa.Table:
    """Columns that CSV cannot hold as text: lists as JSON, bytes in hex."""
    import pyarrow as pa

    for index, field in enumerate(table.schema):
        if pa.types.is_nested(field.type) or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            plain = [_plain(value) for value in table.column(index).to_pylist()]
            texts = [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in plain]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    return table


def rich_table(names: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> str:
    """Return an aligned table; numbers to the right, floats with four significant digits.

    It is as wide as the terminal, and as wide as it needs to be where there is none.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(names):
        number = bool(rows) and all(row[index] is None or _is_number(row[index]) for row in rows)
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console(file=None, width=None if sys.stdout.isatty() else 100_000, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "·"
    if isinstance(value, float):
        return f"{value:.4g}"
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain)
