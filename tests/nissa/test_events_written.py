from __future__ import annotations

import io
import os

import pytest

from esper.leyline.errors import StoreError
from esper.leyline.events import Event, EventKind
from esper.nissa.console import ConsoleSink
from esper.nissa.writer import EventWriter


def test_an_event_is_one_line_on_disk_when_emit_returns(tmp_path):
    with EventWriter(tmp_path / "run", "r1") as writer:
        writer.emit(EventKind.RUN_STARTED, {"command": "datagen"})
        assert writer.path.name == f"events-{os.getpid()}.jsonl"
        assert writer.path.read_text().count("\n") == 1


def test_a_second_writer_of_the_process_appends(tmp_path):
    for _ in range(2):
        with EventWriter(tmp_path, "r1") as writer:
            writer.emit(EventKind.TRAIN_STEP, {"loss": 0.5})
    assert len(writer.path.read_text().splitlines()) == 2


def test_an_event_reads_back_as_it_was_emitted(tmp_path):
    with EventWriter(tmp_path, "r1") as writer:
        event = writer.emit(EventKind.TRAIN_STEP, {"policy": "bc", "loss": 0.1 + 0.2})
    assert Event.model_validate_json(writer.path.read_text()) == event


def test_the_console_shows_time_kind_and_data(tmp_path):
    stream = io.StringIO()
    with EventWriter(tmp_path, "r1", sinks=[ConsoleSink(stream)]) as writer:
        event = writer.emit(EventKind.TRAIN_STEP, {"loss": 0.123456, "step": 7})
    assert stream.getvalue() == f"{event.time[11:19]} train.step loss=0.1235 step=7\n"


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write events"):
        EventWriter(tmp_path / "file" / "run", "r1")
