"""`docs/blueprints.md` says what is true, and its code does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esper.kasmina.blueprints import build_blueprint
from esper.kasmina.hosts import count_parameters
from esper.leyline.host_specs import BLUEPRINTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "blueprints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
OUTPUT = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
TABLE = re.findall(r"^\| (cnn|transformer) \| `(\w+)` \|.*\| ([\d,]+) \|$", PAGE, flags=re.MULTILINE)

BIRTH = """
import sys
sys.path.insert(0, "tests/kasmina")
from blueprint_cases import check_birth
from esper.kasmina.blueprints import build_blueprint
assert isinstance(build_blueprint("cnn", "dilated", 8)[0], nn.Conv2d)
assert build_blueprint("cnn", "dilated", 8)[0].kernel_size == (5, 1)
for channels, size in ((4, 6), (8, 3), (64, 8)):
    check_birth("cnn", "dilated", channels, size)
"""


def run(code: str) -> str:
    """What a process of its own prints: the substitution must not reach other tests."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_of_the_page_adds_a_blueprint_that_passes_the_birth_test_and_lives_a_whole_life_as_printed():
    new, life = BLOCKS
    assert run("\n".join((new, BIRTH, life))) == OUTPUT[0]


def test_adding_one_takes_ten_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 10


def test_the_table_has_all_sixteen_with_their_parameters_at_64_channels():
    assert [(topology, name) for topology, name, _ in TABLE] == [
        (t, n) for t, names in BLUEPRINTS.items() for n in names
    ]
    for topology, name, number in TABLE:
        assert count_parameters(build_blueprint(topology, name, 64)) == int(number.replace(",", ""))


@pytest.mark.parametrize("topology", list(BLUEPRINTS))
def test_the_view_of_decisions_names_the_blueprints_in_the_order_of_the_tree(topology):
    sql = (ROOT / "datasets" / "views" / "decisions.sql").read_text(encoding="utf-8")
    assert "[" + ", ".join(f"'{name}'" for name in BLUEPRINTS[topology]) + "]" in sql
