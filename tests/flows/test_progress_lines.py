from __future__ import annotations

import io

from rich.console import Console

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
