"""Fifty kills at random moments, and the data are what an undisturbed run makes: nothing lost, double or damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny

from esper.karn.store import open_store
from esper.leyline.keys import numpy_generator
from flows.server import API_URL, loopback_server

NUM_KILLS, MOST_KILLS = 50, 80
MID_COMMIT, NUM_MID_COMMIT = "between steps and episodes", 5
NUM_COHORTS = 14
EPISODES_PER_COHORT = 4
PATIENCE_S = 900  # for a busy machine; on a quiet one a life takes seconds
PREFECT_ROUNDS = frozenset({1})
TARGETS = ("group", "parent", "worker")
COMMAND = [sys.executable, "-m", "esper.cli.main", "datagen", "--matrix", "tiny", "--workers", "2", "--no-health"]


@dataclass
class Life:
    """One process of `esper datagen` from its start to its end, by itself or not."""

    folder: Path
    store: str
    prefect_url: str | None = None
    worker_killed: bool = False
    process: subprocess.Popen[bytes] = field(init=False)
    before: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        environment = os.environ | ({} if self.prefect_url is None else {API_URL: self.prefect_url})
        how = ["--no-prefect"] if self.prefect_url is None else []
        self.before = self.commits()
        self.began = time.monotonic()
        with (self.folder / f"{self.store}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *how, "--store", self.store],
                cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def commits(self) -> dict[str, int]:
        """Entries of each table's log; the first one creates the table."""
        dataset = self.folder / self.store / "tiny"
        return {name: len(list(dataset.glob(f"{name}/_delta_log/*.json"))) for name in ("steps", "costs", "episodes")}

    def since(self, before: Mapping[str, int], table: str) -> int:
        """Commits in a table since then, not counting the one that creates it."""
        return self.commits()[table] - max(1, before[table])

    @property
    def num_stored(self) -> int:
        return max(0, self.commits()["episodes"] - 1)

    @property
    def sealed(self) -> bool:
        return (self.folder / self.store / "tiny" / "versions" / "1.json").exists()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def session(self) -> dict[int, str]:
        """The command lines of the living processes of its session."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def kill(self, target: str, draw: float) -> tuple[str, str] | None:
        """Kill the group, the parent or a worker; return in which phase of its life and what, None where it was over.

        A cohort is tried twice: of one life only one worker is killed, then the group.
        """
        workers: list[int] = []
        if target == "worker":  # looked up for no other: it takes longer than a commit
            workers = sorted(pid for pid, line in self.session().items() if "spawn_main" in line)
        if self.ended:
            return None
        if workers and not self.worker_killed:
            os.kill(workers[int(draw * len(workers))], signal.SIGKILL)
            self.worker_killed = True
            return self.phase(), target
        if target == "parent":
            os.kill(self.process.pid, signal.SIGKILL)
        else:
            target = "group"
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        assert wait_for(lambda: not self.session(), 30), f"processes outlived their parent: {self.session()}"
        return (self.phase(), target) if code == -signal.SIGKILL else None

    def phase(self) -> str:
        grown = {name: self.since(self.before, name) for name in ("steps", "costs", "episodes")}
        if grown["steps"] > grown["episodes"]:
            return MID_COMMIT
        if self.num_stored >= NUM_COHORTS:
            return "sealing" if not self.sealed else "after the seal"
        return "between cohorts" if grown["episodes"] > 0 else "before the first commit"


def enough(kills: Mapping[tuple[str, str], int]) -> bool:
    """Whether there were fifty kills, enough of them within a commit: a moment that a busy machine often misses."""
    total, mid_commit = sum(kills.values()), sum(n for (phase, _), n in kills.items() if phase == MID_COMMIT)
    return total >= MOST_KILLS or (total >= NUM_KILLS and mid_commit >= NUM_MID_COMMIT)


def wait_for(condition: Callable[[], bool], seconds: float, every: float = 0.02) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(every)
    return False


def await_moment(life: Life, generator: np.random.Generator) -> None:
    """Wait for the moment of the next kill, or for the end of the process."""
    draw, delay, count = generator.random(), generator.random(), int(generator.integers(1, 4))
    now = life.commits()
    if draw < 0.15 or life.num_stored >= NUM_COHORTS:
        moment = life.began + 8 * delay
        reached, delay_s = (lambda: time.monotonic() >= moment), 0.0
    elif life.num_stored >= NUM_COHORTS - 3 and draw < 0.6:  # at the end of a round: while it is sealed
        reached, delay_s = (lambda: life.num_stored >= NUM_COHORTS), 0.3 * delay
    elif draw < 0.65:  # a commit is three appends: steps first, episodes last
        reached, delay_s = (lambda: life.since(now, "steps") >= count), 0.05 * delay
    else:
        reached, delay_s = (lambda: life.since(now, "episodes") >= count), 0.5 * delay
    assert wait_for(lambda: reached() or life.ended, PATIENCE_S, every=0.002), "neither a commit nor an end"
    time.sleep(delay_s)


def check(folder: Path, store: str, digest: str) -> int:
    """Nothing is missing, double or damaged; return how many files no version lists."""
    dataset = open_store(folder / store).dataset("tiny")
    (version,) = dataset.versions()
    ids = version.table("episodes", columns=["episode_id"])["episode_id"].to_pylist()
    assert len(ids) == len(set(ids)) == NUM_COHORTS * EPISODES_PER_COHORT
    steps = version.table("steps", columns=["episode_id", "step"]).to_pylist()
    assert len({(row["episode_id"], row["step"]) for row in steps}) == len(steps)
    assert version.verify() == []
    assert version.manifest.digest == digest
    assert version.manifest.counts["failed"] == 0
    orphans = {path.resolve() for path in dataset.orphan_files()}
    assert not orphans & {path.resolve() for table in ("steps", "costs", "episodes") for path in version.files(table)}
    return len(orphans)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_cost_nothing(tmp_path):
    tiny.write_library(tmp_path, replicates=NUM_COHORTS, horizon=12)
    clean = Life(tmp_path, "undisturbed")
    assert clean.process.wait(timeout=PATIENCE_S) == 0
    digest = open_store(tmp_path / "undisturbed").resolve("tiny@1").manifest.digest
    kills: Counter[tuple[str, str]] = Counter()
    generator = numpy_generator("fifty kills")
    orphans: list[int] = []
    began = time.monotonic()
    with loopback_server(tmp_path / "prefect") as url:
        while not enough(kills):
            store = f"round-{len(orphans)}"
            _round(tmp_path, store, url if len(orphans) in PREFECT_ROUNDS else None, generator, kills)
            orphans.append(check(tmp_path, store, digest))
    by_phase, by_target = Counter(), Counter()
    for (phase, target), count in kills.items():
        by_phase[phase] += count
        by_target[target] += count
    print(f"\n{kills.total()} kills in {len(orphans)} rounds, {time.monotonic() - began:.0f} s: {dict(by_phase)}")
    print(f"  killed: {dict(by_target)}; files that no version lists, by round: {orphans}")
    print(f"  0 bad files, 0 missing or double episodes; every digest {digest[:16]}")
    assert by_phase[MID_COMMIT] >= NUM_MID_COMMIT
    assert by_phase["before the first commit"] >= 1
    assert set(by_target) == set(TARGETS)


def _round(
    folder: Path, store: str, url: str | None, generator: np.random.Generator, kills: Counter[tuple[str, str]]
) -> None:
    """Kill and restart until the dataset is complete, or all kills are done and it could complete."""
    life = Life(folder, store, url)
    while True:
        if not enough(kills):
            await_moment(life, generator)
        else:
            life.process.wait(timeout=PATIENCE_S)
        target, draw = TARGETS[int(generator.choice(len(TARGETS), p=[0.5, 0.3, 0.2]))], generator.random()
        killed = None if life.ended or enough(kills) else life.kill(target, draw)
        if killed is not None:
            kills[killed] += 1
        elif life.ended:
            code, said = life.process.returncode, (folder / f"{store}.log").read_text()
            assert code == 0, f"exit code {code}: {said[-2000:]}"
            return
        if life.ended:
            life = Life(folder, store, url)
