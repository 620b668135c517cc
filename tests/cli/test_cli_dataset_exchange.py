"""`esper dataset export|import` as a user meets them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from factories import synthetic_tables

from esper.cli.main import main
from esper.karn.store import open_store
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    opened = open_store(tmp_path_factory.mktemp("from"))
    dataset = opened.dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=4))
    reward = load("rewards", "digits-gap", RewardSpec).model_dump(mode="json")
    dataset.seal(matrix_id="m", provenance={"rewards": {"digits-gap": reward}})
    return opened


@pytest.fixture
def run(store, capfd):
    def call(*arguments, to=store):
        code = main(["dataset", *map(str, arguments), "--store", str(to.root)])
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return call


def test_a_version_goes_from_one_store_to_another(run, store, tmp_path):
    code, out, _ = run("export", "demo", "--as", "archive", "--to", tmp_path)
    archive = tmp_path / "demo-1.tar"
    assert (code, out.strip()) == (0, f"demo@1 written to {archive}")
    other = open_store(tmp_path / "other")
    code, out, _ = run("import", archive, to=other)
    assert code == 0
    assert out.startswith(f"demo@1 in {tmp_path / 'other'}, digest {store.resolve('demo').manifest.digest}")
    assert other.resolve("demo").verify() == []
    code, out, _ = run("import", archive, "--name", "again", to=other)
    assert (code, out.split()[0]) == (0, "again@1")


@pytest.mark.parametrize("kind", ["parquet", "minari", "archive", "d3rlpy"])
def test_the_other_formats_are_written_and_never_over_another(run, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    assert run("export", "demo@1", "--as", kind, "--to", "out")[0] == 0
    assert any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    code, _, err = run("export", "demo@1", "--as", kind, "--to", "out")
    assert code == 2
    assert "there already" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "dem", "--as", "parquet", "--to", "{tmp}/x"), 2, "did you mean 'demo'"),
        (("export", "demo", "--as", "csv", "--to", "{tmp}/x"), 2, "parquet"),
        (("export", "demo", "--as", "minari", "--view", "v5", "--to", "{tmp}/x"), 2, "did you mean"),
        (("export", "demo", "--as", "parquet", "--to", "{store}/demo/steps"), 2, "lies in the store"),
        (("export", "demo", "--as", "archive", "--to", "/proc/nowhere"), 1, "cannot write"),
        (("import", "{tmp}/nothing.tar"), 2, "cannot read"),
        (("import", "{tmp}/empty.tar"), 4, "not imported"),
        (("import", "{tmp}/empty.tar", "--name", "../x"), 2, "not allowed"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(run, store, tmp_path, arguments, code, message):
    (tmp_path / "empty.tar").touch()
    found, _, err = run(*(text.format(tmp=tmp_path, store=store.root) for text in arguments))
    assert found == code
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.tar"]
    assert store.resolve("demo").verify() == []


def test_help_and_import_need_neither_torch_nor_prefect():
    code = (
        "import sys; from esper.cli.main import main\n"
        "main(['dataset', 'export', '--help']); main(['sql', '--help'])\n"
        "heavy = {'torch', 'prefect', 'd3rlpy', 'minari', 'duckdb', 'prompt_toolkit'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_export(tmp_path):
    opened = open_store(tmp_path / "store")
    dataset = opened.dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=60, horizon=25))
    dataset.seal(matrix_id="m", provenance={})
    for delay_s in (0.2, 0.5, 1.0):
        command = [sys.executable, "-m", "esper.cli.main", "dataset", "export", "demo", "--as", "parquet"]
        command += ["--to", str(tmp_path / "out"), "--store", str(opened.root)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while process.poll() is None and not list(tmp_path.glob(".out.*.tmp")):
            time.sleep(0.01)
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGINT)
        code = process.wait(60)
        assert code in (0, 130)
        assert list(tmp_path.glob(".out.*")) == []
        assert (tmp_path / "out").exists() == (code == 0)
        if code == 0:
            break
