from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from health_scale import large_version

NUM_ROWS = 1_000_000
MAX_WALL_S = 60.0
MAX_PEAK_GB = 4.0

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
start = time.perf_counter()
from esper.karn.store import Version
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from quality.checking import check
version = Version.open(Path(sys.argv[1]), 1)
rewards = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}
verdict = check(version, docs_dir=Path(sys.argv[2]), rewards=rewards)
peak_kb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
blocked = sorted({check.name for check in verdict.checks if check.level.value == "block"})
print(json.dumps({"wall_s": time.perf_counter() - start, "peak_gb": peak_kb / 1e6, "blocked": blocked}))
"""


@pytest.mark.slow
def test_a_million_steps_are_checked_within_a_minute_and_four_gigabytes(tmp_path: Path) -> None:
    version = large_version(tmp_path / "store", NUM_ROWS)
    assert version.manifest.counts["decisions"] + version.manifest.counts["episodes"] >= NUM_ROWS
    command = [sys.executable, "-c", PROGRAM, str(version.root), str(tmp_path / "docs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    # the copies repeat one draw of the exploration, and the audit rightly takes them for independent ones
    assert set(found["blocked"]) <= {"propensity_audit"}
    assert found["wall_s"] < MAX_WALL_S
    assert found["peak_gb"] < MAX_PEAK_GB
