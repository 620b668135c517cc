"""The process in which statements of people run: what it may cost, and what becomes of it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from factories import synthetic_tables

from esper.karn.sql_session import SqlSession
from esper.karn.store import open_store
from esper.leyline.errors import IntegrityError, QueryError

MEMORY = 2_200_000_000


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=1))
    return dataset.seal(matrix_id="m", provenance={})


@pytest.fixture(scope="module")
def session(version):
    with SqlSession(version, memory_bytes=MEMORY, max_result_bytes=20_000_000) as opened:
        opened.run("SELECT 1")
        yield opened


def works(session):
    return session.run("SELECT count(*) AS n FROM episodes")["n"][0].as_py() == 3


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT range(1000000000)",  # beside DuckDB's own limit
        "SELECT list_sort(range(400000000))",
        "SELECT repeat('x', 1000000000) || n::VARCHAR FROM range(100) AS t (n)",
        "SELECT a.range, b.range FROM range(10000000) a, range(10000000) b",
        "SELECT list(a.range) FROM range(1000000) a, range(100000) b",
    ],
)
def test_what_needs_too_much_memory_is_refused_and_the_next_statement_works(session, sql):
    with pytest.raises(QueryError, match=r"needs more than 2\.2 GB|larger than"):
        session.run(sql)
    assert works(session)


def test_a_process_that_ran_out_of_memory_is_not_used_again(session):
    session.run("SELECT 1")
    before = session._process
    with pytest.raises(QueryError, match="memory"):
        session.run("SELECT list(a.range) FROM range(1000000) a, range(100000) b")
    assert works(session)
    assert session._process is not before


def test_a_result_that_is_too_large_is_refused(session):
    with pytest.raises(QueryError, match=r"result is larger than 0\.02 GB"):
        session.run("SELECT * FROM range(10000000000)")
    assert works(session)


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE t AS (SELECT 1 a UNION ALL SELECT a + 1 FROM t) SELECT count(*) FROM t",
        "SELECT count(*) FROM range(10000000) a, range(10000000) b",
        "SELECT pg_sleep(100)",
    ],
)
def test_what_never_ends_is_ended(session, monkeypatch, sql):
    session.run("SELECT 1")
    start = time.monotonic()
    monkeypatch.setattr(session, "timeout_s", 0.3)
    with pytest.raises(QueryError, match=r"longer than 0.3 s"):
        session.run(sql)
    assert time.monotonic() - start < 5
    monkeypatch.undo()
    assert works(session)


def test_ctrl_c_ends_the_statement_and_the_next_one_works(session):
    session.run("SELECT 1")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.run("SELECT count(*) FROM range(10000000) a, range(10000000) b")
    assert time.monotonic() - start < 10
    assert works(session)


def test_nothing_is_spilled_to_disk(version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with SqlSession(version, memory_bytes=1_600_000_000) as session, pytest.raises(QueryError, match="memory"):
        session.run("SELECT count(*) FROM (SELECT DISTINCT hash(range), repeat('x', 200) FROM range(50000000))")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_is_replaced(session):
    session.run("SELECT 1")
    os.kill(session._process.pid, signal.SIGKILL)
    with pytest.raises(QueryError):
        session.run("SELECT 1")
    assert works(session)


def test_every_kind_of_value_comes_through(session):
    row = session.run(
        "SELECT 'b'::ENUM('a', 'b') AS e, {'x': [1, NULL]} AS s, MAP {'k': 1.5} AS m, 1::HUGEINT AS h, "
        "TIMESTAMPTZ '2026-01-01' AS t, 'x'::BLOB AS b, NULL AS n, '101'::BIT::VARCHAR AS bits"
    ).to_pylist()[0]
    assert (row["e"], row["s"], row["b"], row["n"], row["bits"]) == ("b", {"x": [1, None]}, b"x", None, "101")
    assert session.run("SELECT * FROM steps WHERE false").num_rows == 0


def test_a_failed_statement_leaves_no_aborted_transaction(session):
    for sql in ("SELECT nope FROM steps", "SELECT 'x'::INT", "SELECT error('stop')"):
        with pytest.raises(QueryError):
            session.run(sql)
        assert works(session)


def test_statements_are_told_apart_by_the_parser(session):
    found = session.statements("SELECT ';'; -- ;\nSELECT $$;$$;")
    assert [text.replace("-- ;", "").strip() for text in found] == ["SELECT ';';", "SELECT $$;$$;"]
    with pytest.raises(QueryError, match="not valid SQL"):
        session.statements("SELECT (")


def test_a_damaged_file_is_an_integrity_error(tmp_path):
    dataset = open_store(tmp_path).dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=1))
    version = dataset.seal(matrix_id="m", provenance={})
    path = version.files("steps")[0]
    path.write_bytes(b"\0" * path.stat().st_size)
    with SqlSession(version) as session, pytest.raises(IntegrityError, match="demo@1"):
        session.run("SELECT * FROM steps")
