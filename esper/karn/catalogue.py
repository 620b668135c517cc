"""SQL over one sealed version: which views there are, and what they are made of."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import duckdb
import pyarrow as pa

from esper.karn.sql_connection import (
    MEMORY_LIMIT_BYTES,
    SqlSources,
    function_names,
    open_connection,
    view_columns,
)
from esper.karn.sql_guard import check_statement, failure, is_damage, too_large, too_slow
from esper.karn.versions import Version
from esper.leyline.errors import IntegrityError, QueryError
from esper.leyline.library import find, load, names
from esper.leyline.rewards import RewardSpec
from esper.leyline.schema import SCHEMAS

__all__ = ["connect", "query", "sources_of", "view_columns"]

TIMEOUT_S = 60.0

REWARDS = pa.schema(
    [
        pa.field("reward", pa.string()),
        pa.field("rent_points", pa.float64()),
        pa.field("scale_points", pa.float64()),
        pa.field("stated_mode", pa.string()),
        pa.field("environments", pa.list_(pa.string())),
    ]
)
"""The table `rewards`: `environments` are those of the version that were made under this reward."""

PLANNED = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("environment", "role", "root", "controller")),
        pa.field("epsilon", pa.float64()),
        pa.field("planned", pa.int64()),
    ]
)


def connect(version: Version) -> duckdb.DuckDBPyConnection:
    """Return a connection with the views `steps`, `costs`, `episodes`, `rewards` and those under datasets/views.

    It reads the version's files and nothing else: no other file, no network, no extension, no setting can be changed.
    Rows have no order of their own. Close it after use. It is for statements of this program: what a statement of
    somebody else's allocates, only `sql_session` can limit.

    Raises:
        IntegrityError: A file of the version is missing or damaged.
        QueryError: A view is wrong.
        SpecError: A file under datasets/rewards is wrong.
    """
    try:
        return open_connection(sources_of(version))
    except duckdb.Error as error:
        kind: type[IntegrityError | QueryError] = IntegrityError if is_damage(error) else QueryError
        raise kind(f"{version.ref} cannot be opened: {str(error).splitlines()[0]}") from None


def sources_of(version: Version) -> SqlSources:
    """Return what a connection to a version is made of.

    Raises:
        IntegrityError: A file is missing, or the manifest's plan is damaged.
        SpecError: A file under datasets/rewards is wrong.
    """
    provenance: Mapping[str, Any] = version.manifest.provenance
    views = {name: find("views", name, ".sql").read_text(encoding="utf-8") for name in names("views", ".sql")}
    return SqlSources(
        ref=version.ref,
        files={table: tuple(str(path) for path in version.files(table)) for table in SCHEMAS},
        tables={"rewards": _rewards(provenance.get("rewards")), "_planned": _planned(version)},
        views=views,
    )


def _rewards(own: object) -> pa.Table:
    """Every reward of the version and of datasets/rewards, one row for each that differs in more than its name.

    Where a name stands for two rewards, the version's own has it, and the other one's says where it comes from.
    """
    found: dict[str, tuple[RewardSpec, list[str]]] = {}

    def add(spec: RewardSpec, origin: str, environments: list[str]) -> None:
        known = found.get(spec.name)
        if known is None or known[0] == spec:
            found.setdefault(spec.name, (spec, []))[1].extend(environments)
        else:
            found[f"{spec.name}@{origin}"] = (spec, environments)

    for environment, data in own.items() if isinstance(own, dict) else ():
        add(RewardSpec.parse(data, f"the manifest's reward of {environment}"), environment, [environment])
    for name in names("rewards"):
        add(load("rewards", name, RewardSpec), "library", [])
    rows = [
        {
            "reward": name,
            "rent_points": spec.rent_points,
            "scale_points": spec.scale_points,
            "stated_mode": spec.mode,
            "environments": environments,
        }
        for name, (spec, environments) in found.items()
    ]
    return pa.Table.from_pylist(rows, schema=REWARDS)


def _planned(version: Version) -> pa.Table:
    """The cells of the plan that the version was sealed with; none where its manifest holds no plan."""
    try:
        return pa.Table.from_pylist(version.manifest.provenance.get("planned") or [], schema=PLANNED)
    except (pa.ArrowInvalid, pa.ArrowTypeError, AttributeError, TypeError):
        raise IntegrityError(f"{version.path} is damaged: `planned` holds no cells of a plan") from None


def query(version: Version, sql: str, *, timeout_s: float = TIMEOUT_S) -> pa.Table:
    """Return the result of one statement of this program's that only reads.

    Raises:
        QueryError: Anything but one SELECT, WITH, DESCRIBE or EXPLAIN; an unknown name; a failure; the time or memory
            limit.
        IntegrityError: A file of the version is missing or damaged.
    """
    connection = connect(version)
    timer = threading.Timer(timeout_s, connection.interrupt)
    timer.daemon = True
    try:
        check_statement(connection, sql)
        timer.start()
        try:
            return connection.sql(sql).to_arrow_table()
        except duckdb.InterruptException:
            raise QueryError(too_slow(timeout_s)) from None
        except duckdb.OutOfMemoryException:
            raise QueryError(too_large(MEMORY_LIMIT_BYTES)) from None
        except duckdb.Error as error:
            names_of = connection.cursor()
            raise failure(error, version.ref, view_columns(names_of), function_names(names_of)) from None
        except RuntimeError as error:
            if str(error) == "Query interrupted":  # how DuckDB reports Ctrl-C
                raise KeyboardInterrupt from None
            raise
    finally:
        timer.cancel()
        connection.close()
