from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from esper.cli import main as cli
from esper.leyline.errors import HealthError, IntegrityError, SpecError

SLOW_MODULES = ("torch", "pyarrow", "prefect", "great_expectations", "duckdb", "deltalake", "pandas", "numpy")


def esper(*arguments, **options):
    command = [sys.executable, "-m", "esper.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def loaded_by(*arguments):
    """The top-level modules that a command has imported by its end."""
    code = (
        "import sys; from esper.cli.main import main; code = main(sys.argv[1:]);"
        "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    code, *modules = done.stderr.splitlines()[-1].split()
    return int(code), set(modules), done.stdout


def test_help_lists_every_command_and_imports_nothing_slow():
    code, modules, text = loaded_by("--help")
    assert code == 0
    assert modules.isdisjoint(SLOW_MODULES)
    for name, _ in cli.COMMANDS:
        assert re.search(rf"\b{name}\b", text), name


def test_help_takes_less_than_half_a_second_of_cpu_more_than_python():
    def cpu_seconds(*arguments):
        before = os.times()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    extra = min(cpu_seconds("-m", "esper.cli.main", "--help") - cpu_seconds("-c", "pass") for _ in range(3))
    assert extra < 0.5


@pytest.mark.parametrize("arguments", [("sql", "--list"), ("dataset", "ls"), ("sql", "--help"), ("dataset", "--help")])
def test_sql_and_dataset_never_import_torch(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_STORE", str(tmp_path))
    code, modules, _ = loaded_by(*arguments)
    assert code == 0
    assert modules.isdisjoint({"torch", "prefect", "great_expectations"})


def test_an_unknown_command_names_the_nearest():
    done = esper("datagn")
    assert done.returncode == 2
    assert "did you mean 'datagen'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_wrong_flag_names_the_nearest():
    done = esper("sql", "--formt", "csv")
    assert done.returncode == 2
    assert "--format" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [("dataset", "shw"), ("sql", "--format", "xml", "SELECT 1"), ("dataset", "show"), ("sql",), ("sql", "a", "b")],
)
def test_wrong_usage_exits_with_2(arguments, tmp_path):
    done = esper(*arguments, env=os.environ | {"ESPER_STORE": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(SpecError("a"), 2), (HealthError("b"), 3), (IntegrityError("c"), 4), (KeyboardInterrupt(), 130)],
)
def test_errors_become_exit_codes_and_one_message(error, code, monkeypatch, capsys):
    class Failing:
        def __call__(self, *arguments, **options):
            raise error

    monkeypatch.setattr(cli, "build_app", Failing)
    assert cli.main(["sql"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(error) in printed.err
    assert printed.err


def test_an_unexpected_error_is_not_hidden(monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "build_app", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["sql"])


def test_ctrl_c_ends_a_running_query_with_130(demo_store):
    """The signal comes a second after everything is imported, so DuckDB is at work."""
    endless = "SELECT count(*) FROM range(10000000) a, range(10000000) b, range(1000) c"
    script = (
        "import os, signal, sys, threading; import esper.karn.catalogue; from esper.cli.main import main;"
        "threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start(); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "sql", endless, "--store", str(demo_store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_a_reader_that_goes_away_is_not_a_traceback(demo_store):
    query = f"sql 'SELECT * FROM range(300000)' --format csv --store {demo_store}"
    command = f"{sys.executable} -m esper.cli.main {query} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == '"range"'
    assert "Traceback" not in done.stderr
