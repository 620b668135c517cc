"""Every benchmark runs at its smallest size and writes records that say what was measured, where and how often."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

NAMES = {
    "step": "step",
    "epoch": "epoch",
    "cohort": "cohort",
    "workers": "workers",
    "datagen": "datagen",
    "observe": "observe",
    "load": "load",
    "learners": "learners",
    "store": "store",
    "growth_of_cohorts": "growth",
    "larger_than_memory": "larger-than-memory",
}
SLOW = ("workers", "larger_than_memory", "store")

FIELDS = {"name": str, "case": str, "ratio": float, "n": int, "spread": float, "unit": str, "machine": dict}


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *([known] if known else [])]))


def check(records: list[dict], name: str) -> None:
    assert records
    assert len({record["case"] for record in records}) == len(records)
    for record in records:
        for field, kind in FIELDS.items():
            assert isinstance(record[field], kind), (field, record[field])
        assert record["name"] == name
        assert math.isfinite(record["ratio"])
        assert record["ratio"] > 0
        assert record["spread"] >= 0
        assert record["n"] >= 1
        assert record["machine"].keys() >= {"cpu", "cores", "torch", "torch_threads", "date"}
        assert record["machine"]["torch_threads"] == 1
        if record["n"] == 1 and "reference" in record:
            assert record["reference"] / record["esper"] == pytest.approx(record["ratio"])


@pytest.mark.parametrize("module", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in NAMES])
def test_a_benchmark_writes_valid_records_at_its_smallest_size(module, tmp_path):
    importlib.import_module(f"benchmarks.{module}").main(["--quick", "--output", str(tmp_path)])
    check(json.loads((tmp_path / f"{NAMES[module]}.json").read_text()), NAMES[module])
    if module == "growth_of_cohorts":
        assert (tmp_path / "growth-of-cohorts.png").stat().st_size > 1000


def test_the_stored_results_are_valid():
    stored = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    for path in stored:
        if path.stem in NAMES.values():
            check(json.loads(path.read_text()), path.stem)


def test_rounds_are_paired_and_their_ratios_summarised():
    from benchmarks.common import Comparison, Seconds

    compared = Comparison(
        tuple(Seconds(cpu, 2 * cpu) for cpu in (4.0, 8.0, 2.0, 6.0)),
        tuple(Seconds(cpu, cpu) for cpu in (2.0, 2.0, 2.0, 2.0)),
    )
    record = compared.record("x", "y", "ms", per=1e3)
    assert (record["ratio"], record["spread"], record["n"]) == (2.5, 1.5, 4)
    assert (record["reference"], record["esper"], record["ratio_wall"]) == (5000, 2000, 5)


def test_every_benchmark_is_run_by_make_bench():
    recipe = (ROOT / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]
    for module in NAMES:
        assert f" {module} " in f" {recipe} ".replace("\n", " ").replace(";", " ")


def test_the_command_line_helps_and_refuses_no_rounds(capsys, monkeypatch):
    module = importlib.import_module("benchmarks.step")
    for arguments, code in ((["--help"], 0), (["--rounds", "0"], 2)):
        with pytest.raises(SystemExit) as ended:
            module.main(arguments)
        assert ended.value.code == code
    assert "expected 1 or more" in capsys.readouterr().err
    assert "benchmarks.step" in sys.modules
