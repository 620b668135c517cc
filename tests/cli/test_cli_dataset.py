from __future__ import annotations

import json
import shutil

import pytest
from factories import synthetic_tables

from esper.cli.main import main
from esper.karn.store import open_store
from esper.leyline.verdict import CheckResult, Level, Use, Verdict


@pytest.fixture
def store(demo_store, tmp_path):
    shutil.copytree(demo_store, tmp_path / "store")
    return open_store(tmp_path / "store")


@pytest.fixture
def run(store, capsys):
    def call(*arguments):
        code = main(["dataset", *arguments, "--store", str(store.root)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def block(version):
    check = CheckResult(
        name="coverage",
        environment="digits-gap",
        level=Level.BLOCK,
        value=0.0,
        message="PRUNE was never taken",
        uses=(Use.OFFLINE_RL,),
    )
    version.write_verdict(
        Verdict(dataset="demo", version=1, digest=version.manifest.digest, checked_at="now", checks=(check,))
    )


def test_ls_lists_every_version_and_what_is_not_sealed(run, store):
    store.dataset("fresh").commit(synthetic_tables(num_env_seeds=1, behaviours=("never-act",), horizon=2))
    code, out, _ = run("ls")
    assert code == 0
    assert "demo@1" in out
    assert "not checked" in out
    assert "not sealed" in out


def test_ls_of_an_empty_store_says_how_to_fill_it(tmp_path, capsys):
    assert main(["dataset", "ls", "--store", str(tmp_path)]) == 0
    assert "esper datagen" in capsys.readouterr().err


def test_show_has_manifest_cells_digest_and_verdict(run, store):
    version = store.resolve("demo")
    block(version)
    code, out, err = run("show", "demo")
    assert code == 0
    assert version.manifest.digest in out
    assert "matrix-1" in out
    assert "baseline" in out
    rows = {line.split("  ")[0].strip(): line.split()[-1] for line in out.splitlines() if "verdict for" in line}
    assert rows["verdict for offline-rl"] == "block"
    assert rows["verdict for imitation"] == "pass"
    assert "PRUNE was never taken" in err


def test_verify_of_a_sound_version_exits_with_0(run):
    code, out, _ = run("verify", "demo@1")
    assert code == 0
    assert "demo@1 is sound" in out


def test_verify_of_a_damaged_version_exits_with_4_and_names_the_file(run, store):
    version = store.resolve("demo")
    path = version.files("steps")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    code, out, err = run("verify", "demo")
    assert (code, out) == (4, "")
    assert path.name in err


def test_files_of_an_interrupted_writer_are_noted_and_harmless(run, store):
    path = store.resolve("demo").files("steps")[0]
    shutil.copy(path, path.with_name("part-stray.parquet"))
    code, _, err = run("verify", "demo")
    assert code == 0
    assert "part-stray.parquet" in err


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_newer_schema_exits_with_4(run, store, command):
    path = store.resolve("demo").path
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    code, _, err = run(command, "demo")
    assert code == 4
    assert "schema version 99" in err


def test_an_unknown_dataset_exits_with_2_and_names_the_nearest(run):
    code, _, err = run("show", "dmo")
    assert code == 2
    assert "did you mean 'demo'" in err
