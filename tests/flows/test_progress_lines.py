from __future__ import annotations

import io
import json
import time

from rich.console import Console

from flows import progress as lines
from flows.following import EventTail, following, losses
from flows.progress import BarReporter, PlainReporter


def test_plain_progress_is_one_line_per_finished_unit():
    stream = io.StringIO()
    with PlainReporter(stream) as progress:
        progress.begin("cohorts", 2)
        progress.advance("cohorts", "tiny/0")
        progress.advance("cohorts")
    texts = [line.split("] ", 1)[1] for line in stream.getvalue().splitlines()]
    assert texts == ["cohorts: 2 to do", "cohorts: 1/2 tiny/0", "cohorts: 2/2"]


def test_plain_notes_are_held_back_within_half_a_minute():
    stream = io.StringIO()
    with PlainReporter(stream) as progress:
        progress.note("ppo", "tiny/0")
    assert stream.getvalue() == ""


def test_bars_show_the_task_and_how_far_it_is():
    stream = io.StringIO()
    with BarReporter(Console(file=stream, force_terminal=True, width=120)) as progress:
        progress.begin("cohorts", 2)
        progress.advance("cohorts", "tiny/0")
    assert "cohorts" in stream.getvalue()
    assert "1/2" in stream.getvalue()


def test_plain_losses_are_told_every_half_minute_for_each_policy(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    with PlainReporter(stream) as progress:
        for second in range(0, 70, 5):
            now[0] = float(second)
            progress.reach("iql", second, 100, "policy 0.5")
            progress.reach("bc", second, 50, "policy 0.7")
        progress.end("iql")
    assert stream.getvalue().splitlines() == [
        f"[00:{s}] {told}" if s < 60 else f"[01:00] {told}"
        for s in (30, 60)
        for told in (f"iql: {s}/100 policy 0.5", f"bc: {s}/50 policy 0.7")
    ]


def test_a_bar_for_a_training_run_shows_its_losses_and_goes_when_it_ends():
    stream = io.StringIO()
    with BarReporter(Console(file=stream, force_terminal=True, width=160)) as progress:
        progress.begin("training", 2)
        progress.reach("iql", 150, 2500, "policy 0.1234")
        progress.reach("iql", 300, 2500, "policy 0.0987")
        assert [task.completed for task in progress._progress.tasks] == [0, 300]
        progress._progress.refresh()
        progress.end("iql")
        assert [task.description for task in progress._progress.tasks] == ["training"]
    assert "300/2500" in stream.getvalue()
    assert "policy 0.0987" in stream.getvalue()


def event(policy, step, **values):
    data = {"policy": policy, "step": step, **values}
    return json.dumps({"kind": "train.step", "time": "t", "run": "r", "data": data}) + "\n"


def test_training_in_other_processes_is_followed_through_the_events_that_they_append(tmp_path):
    (tmp_path / "events-1.jsonl").write_text(event("iql", 99.0, policy_loss=9.0))  # an earlier run's
    reached = []

    class Seen(PlainReporter):
        def reach(self, task, done, total, text):
            reached.append((task, done, total, text))

        def end(self, task):
            reached.append((task, "ended"))

    with following(tmp_path, Seen(io.StringIO()), {"iql": (100, 50), "bc": (0, 20)}):
        for text in (event("iql (values)", 10.0, value_loss=0.25), event("other", 1.0), "half a li"):
            with (tmp_path / "events-1.jsonl").open("a") as file:
                file.write(text)
        (tmp_path / "events-2.jsonl").write_text(event("bc", 5.0, policy_loss=2.0, held_out_policy_loss=2.5))
        deadline = time.monotonic() + 60
        while len(reached) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        with (tmp_path / "events-1.jsonl").open("a") as file:
            file.write("ne\n" + event("iql", 7.0, policy_loss=1.5))
            file.write(event("iql", 7.0).replace("step", "ended", 1) + event("iql", 8.0, policy_loss=1.4))
    assert sorted(reached[:2]) == [("bc", 5, 20, "policy 2, held-out policy 2.5"), ("iql", 10, 150, "value 0.25")]
    assert reached[2:] == [("iql", 107, 150, "policy 1.5"), ("iql", "ended"), ("bc", "ended")]


def test_a_tail_gives_each_event_once_and_words_name_the_losses_alone(tmp_path):
    tail = EventTail(tmp_path)
    path = tmp_path / "events-7.jsonl"
    path.write_text(event("p", 1.0) + event("p", 2.0)[:20])
    assert [found.data["step"] for found in tail.read()] == [1.0]
    assert tail.read() == []
    with path.open("a") as file:
        file.write(event("p", 2.0)[20:])
    assert [found.data["step"] for found in tail.read()] == [2.0]
    told = {"step": 3.0, "td_loss": 0.123456, "penalty": 4.0, "held_out_td_loss": 1e-5, "policy": "p"}
    assert losses(told) == "td 0.1235, held-out td 1e-05"
