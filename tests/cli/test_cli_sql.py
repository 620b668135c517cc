from __future__ import annotations

import csv
import io
import json

import pyarrow.parquet as pq
import pytest
from factories import synthetic_tables

from esper.cli.main import main
from esper.cli.output import write_table
from esper.karn.sql_session import SqlSession
from esper.karn.store import open_store


@pytest.fixture(scope="module")
def session(demo_store):
    with SqlSession(open_store(demo_store).resolve("demo")) as opened:
        yield opened


COUNT = "SELECT controller, count(*) AS n FROM episodes GROUP BY ALL ORDER BY ALL"


@pytest.fixture
def run(demo_store, capfdbinary):
    def call(*arguments, store=demo_store):
        code = main(["sql", *arguments, "--store", str(store)])
        printed = capfdbinary.readouterr()
        return code, printed.out, printed.err.decode()

    return call


def test_a_table_goes_to_stdout_and_the_rest_to_stderr(run):
    code, out, err = run(COUNT)
    assert code == 0
    lines = [line.split() for line in out.decode().splitlines() if line.strip()]
    assert lines[0] == ["controller", "n"]
    assert lines[2:] == [["baseline", "4"], ["random", "2"]]
    assert err.splitlines() == ["2 rows from demo@1", "health of demo@1: never checked; run `esper health demo@1`"]


def test_csv_json_and_parquet_hold_the_same_rows(run, tmp_path):
    _, text, _ = run(COUNT, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    _, text, _ = run(COUNT, "--format", "json")
    assert json.loads(text) == [{"controller": row["controller"], "n": int(row["n"])} for row in rows]
    _, data, _ = run(COUNT, "--format", "parquet")
    assert pq.read_table(io.BytesIO(data)).to_pylist() == json.loads(text)


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_every_column_of_every_view_can_be_written(session, capfdbinary, form):
    views = session.columns()
    assert len(views) > 10
    for view in views:
        write_table(session.run(f"SELECT * FROM {view} LIMIT 20"), form, None)
        assert capfdbinary.readouterr().out, view


def test_json_has_null_for_what_is_not_finite_and_hex_for_bytes(run):
    _, out, _ = run("SELECT 'nan'::DOUBLE a, 'inf'::FLOAT b, 'x'::BLOB c, [1, NULL] d", "--format", "json")
    assert json.loads(out) == [{"a": None, "b": None, "c": "78", "d": [1, None]}]


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_the_output_file_decides_the_format(run, tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    code, out, err = run(COUNT, "--output", str(path))
    assert (code, out) == (0, b"")
    assert f"2 rows written to {path}" in err
    if suffix == "parquet":
        assert pq.read_table(path).num_rows == 2


def test_an_output_that_cannot_be_written_is_one_message(run, tmp_path):
    code, _, err = run(COUNT, "--output", str(tmp_path / "missing" / "a.csv"))
    assert code == 1
    assert "cannot write" in err


def test_a_long_table_is_cut_and_says_so(run):
    code, out, err = run("SELECT * FROM range(1000)")
    assert code == 0
    assert len(out.decode().splitlines()) < 250
    assert "800 more rows" in err


def test_saved_queries_are_listed_and_run(run):
    code, out, _ = run("--list", "--format", "json")
    names = [row["query"] for row in json.loads(out)]
    assert code == 0
    assert "return-by-behaviour" in names
    code, out, _ = run("--query", "return-by-behaviour", "--format", "json")
    assert code == 0
    assert {row["controller"] for row in json.loads(out)} == {"baseline", "random"}


def test_an_unknown_saved_query_names_the_nearest(run):
    code, _, err = run("--query", "return-by-behavior")
    assert code == 2
    assert "did you mean 'return-by-behaviour'" in err


def test_a_statement_and_a_saved_query_together_are_refused(run):
    assert run(COUNT, "--query", "refusals")[0] == 2


def test_anything_but_reading_exits_with_2(run):
    code, out, err = run("DROP VIEW steps")
    assert (code, out) == (2, b"")
    assert "DROP" in err


def test_the_dataset_can_be_left_out_only_where_there_is_one(run, tmp_path):
    code, _, err = run(COUNT, store=tmp_path)
    assert code == 2
    assert "holds no dataset" in err
    for name in ("one", "two"):
        dataset = open_store(tmp_path).dataset(name)
        dataset.commit(synthetic_tables(num_env_seeds=1, behaviours=("never-act",), horizon=2))
        dataset.seal(matrix_id="m", provenance={})
    code, _, err = run(COUNT, store=tmp_path)
    assert code == 2
    assert "one, two" in err
    assert run(COUNT, "--dataset", "two@1", store=tmp_path)[0] == 0


def test_a_timeout_must_be_positive_and_is_kept(run):
    assert run("SELECT 1", "--timeout", "0")[0] == 2
    code, _, err = run("SELECT count(*) FROM range(10000000) a, range(10000000) b", "--timeout", "0.2")
    assert code == 2
    assert "longer than 0.2 s" in err


def test_statements_on_stdin_run_one_after_the_other(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 1 AS a;\n-- two\nSELECT 'b;' AS b;"))
    code, out, err = run("-", "--format", "csv")
    assert (code, out.decode().split()) == (0, ['"a"', "1", '"b"', '"b;"'])
    assert err.count("1 rows from demo@1") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 1; DROP VIEW steps; SELECT 2"))
    code, out, err = run("--format", "json")
    assert (code, json.loads(out)) == (2, [{"1": 1}])
    assert "DROP" in err


def test_a_mistyped_option_is_no_statement(run):
    code, _, err = run("--querry")
    assert code == 2
    assert "unknown option --querry" in err


def test_an_empty_stdin_is_a_question_of_usage(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, _, err = run()
    assert code == 2
    assert "no statement" in err


def test_a_sql_file_holds_one_statement(run, tmp_path):
    path = tmp_path / "mine.sql"
    path.write_text("SELECT 1; SELECT 2")
    code, out, err = run("--query", str(path))
    assert (code, out) == (2, b"")
    assert "2 statements" in err


def test_nothing_of_the_store_is_written_over(run, demo_store, tmp_path):
    sealed = sorted(path for path in demo_store.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in sealed}
    part = next(path for path in sealed if path.suffix == ".parquet")
    for name in ("soft", "hard"):
        path = tmp_path / f"{name}.parquet"
        path.symlink_to(part) if name == "soft" else path.hardlink_to(part)
    for output in (part, demo_store / "new.csv", tmp_path / "soft.parquet", tmp_path / "hard.parquet"):
        code, _, err = run("SELECT 1", "--output", str(output))
        assert code == 2
        assert "the store" in err
    assert {path: path.read_bytes() for path in demo_store.rglob("*") if path.is_file()} == before


def test_an_unknown_dataset_names_the_nearest(run):
    code, _, err = run(COUNT, "--dataset", "dem")
    assert code == 2
    assert "did you mean 'demo'" in err
