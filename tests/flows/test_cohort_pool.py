from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in

from esper.leyline.errors import SpecError
from esper.tolaria.workers import CohortPool, WorkerError, decode_tables, encode_tables


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(condition, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_tables_survive_the_trip_as_arrow_streams():
    tables = stand_in.synthetic(stand_in.plans(1)[0])
    back = decode_tables(encode_tables(tables))
    assert {name: table.equals(tables[name]) for name, table in back.items()} == dict.fromkeys(tables, True)


def test_results_come_in_plan_order_and_are_the_same_in_process_and_on_two_workers():
    planned = stand_in.plans(3)
    with CohortPool(0, engine=stand_in.synthetic) as here, CohortPool(2, engine=stand_in.synthetic) as there:
        expected, found = here.run_all(planned), there.run_all(planned)
    assert [tables["episodes"]["replicate"][0].as_py() for tables in found] == [0, 1, 2]
    for one, other in zip(expected, found, strict=True):
        assert one["steps"].equals(other["steps"])


def test_a_worker_has_one_thread_in_torch_and_in_its_environment():
    before = os.environ.get("OMP_NUM_THREADS")
    with CohortPool(1) as pool:
        assert pool.call(stand_in.torch_threads).result() == 1
        assert pool.call(stand_in.omp_threads).result() == "1"
    assert os.environ.get("OMP_NUM_THREADS") == before


@pytest.mark.parametrize(
    ("engine", "message"),
    [(stand_in.dies_on_replicate_1, "exit code -9"), (stand_in.raises_on_replicate_1, "ZeroDivisionError: made up")],
)
def test_a_death_or_an_error_costs_the_cohort_it_befell_and_no_other(engine, message):
    with CohortPool(2, engine=engine) as pool:
        outcomes = dict(pool.run(stand_in.plans(4)))
    assert isinstance(outcomes[1], WorkerError)
    assert message in str(outcomes[1])
    assert [index for index, outcome in sorted(outcomes.items()) if isinstance(outcome, dict)] == [0, 2, 3]


def test_an_error_from_a_worker_carries_its_trace():
    with CohortPool(1, engine=stand_in.raises_on_replicate_1) as pool:
        error = pool.submit(stand_in.plans(2)[1]).exception()
    assert "stand_in.py" in "".join(error.__notes__)


def test_leaving_the_pool_ends_busy_workers_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CohortPool(1, engine=stand_in.sleeps) as pool:
        future = pool.submit(stand_in.plans(1)[0])
        assert _wait_for(lambda: list(tmp_path.glob("worker-*")))
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 10
    assert isinstance(future.exception(), WorkerError)
    (pid,) = (int(path.name.split("-")[1]) for path in tmp_path.glob("worker-*"))
    assert not _alive(pid)


def test_negative_workers_are_a_usage_error():
    with pytest.raises(SpecError, match="-1 workers"):
        CohortPool(-1)


PARENT = """
import sys
sys.path[:0] = {paths!r}
import stand_in
from esper.tolaria.workers import CohortPool
if __name__ == "__main__":
    with CohortPool(1, engine=stand_in.sleeps) as pool:
        list(pool.run(stand_in.plans(2)))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, how):
    here = Path(__file__).parent
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(paths=[str(here), str(here.parent)]))
    with subprocess.Popen(
        [sys.executable, str(script)], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True
    ) as parent:
        assert _wait_for(lambda: list(tmp_path.glob("worker-*")))
        parent.send_signal(how)
        parent.wait(timeout=20)
    (pid,) = (int(path.name.split("-")[1]) for path in tmp_path.glob("worker-*"))
    assert _wait_for(lambda: not _alive(pid), 10)
