"""The prompt of `esper sql`, driven by keys and once through a pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from esper.cli.sql_prompt import SqlCompleter, SqlPrompt, history_file
from esper.karn.sql_session import SqlSession
from esper.karn.store import open_store

QUIT = "\x04"
READY = b"\x1b[?2004h"  # a prompt that reads


@pytest.fixture(scope="module")
def session(demo_store):
    with SqlSession(open_store(demo_store).resolve("demo")) as opened:
        yield opened


@pytest.fixture
def typed(session, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def call(keys, **options):
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            keyboard.send_text(keys + QUIT)
            SqlPrompt(session, **options).loop()
        return capfd.readouterr()

    return call


def test_statements_end_with_a_semicolon_and_may_have_several_lines(typed):
    printed = typed("SELECT 1 AS a,\rcount(*) AS n\rFROM episodes;\rSELECT 2 AS b; SELECT ';' AS c;\r", form="csv")
    assert printed.out.split() == ['"a","n"', "1,6", '"b"', "2", '"c"', '";"']
    assert printed.err.count("1 rows in") == 3


def test_errors_do_not_end_it(typed):
    printed = typed("SELECT nope FROM steps;\rDROP VIEW steps;\rSELECT (;\r.nope\rSELECT 7 AS a;\r", form="csv")
    assert printed.out.split() == ['"a"', "7"]
    assert printed.err.count("error: ") == 4


def test_ctrl_c_clears_what_was_typed(typed):
    printed = typed("SELECT broken\r\x03SELECT 8 AS a;\r", form="csv")
    assert printed.out.split() == ['"a"', "8"]
    assert "error" not in printed.err


def test_commands_list_choose_and_run(typed, tmp_path, demo_store):
    output = tmp_path / "out.json"
    keys = [
        ".help",
        ".queries",
        ".tables",
        ".tables lineages",
        ".format json",
        ".run refusals",
        f".output {demo_store / 'x.csv'}",
        f".output {output}",
        "SELECT 3 AS a;",
        "SELECT 4 AS b;",
        ".format xml",
        ".tables lineage",
        ".run refusal",
        ".quit",
        "SELECT 5 AS never;",
    ]
    printed = typed("\r".join(keys) + "\r")
    for text in (".output", "return-by-behaviour", "decision_rewards", "host_key", '"b": 4'):
        assert text in printed.out, text
    assert json.loads(output.read_text()) == [{"a": 3}]
    for text in ("lies in the store", "did you mean 'lineages'", "did you mean 'refusals'", "unknown format 'xml'"):
        assert text in printed.err, text
    assert "never" not in printed.out


def test_the_history_is_kept_where_state_belongs(typed, tmp_path):
    typed("SELECT 41 + 1;\r")
    assert history_file() == tmp_path / "state" / "esper" / "sql_history"
    assert "+SELECT 41 + 1;" in history_file().read_text()
    printed = typed("\x1b[A\r", form="csv")  # up, enter
    assert printed.out.split()[-1] == "42"


def test_views_columns_commands_and_queries_are_completed(session):
    completer = SqlCompleter(session.columns())

    def words(text):
        return [found.text for found in completer.get_completions(Document(text), CompleteEvent())]

    assert "decision_rewards" in words("SELECT * FROM dec")
    assert "val_accuracy" in words("SELECT s.val_acc")
    assert words(".qu") == [".queries", ".quit"]
    assert "refusals" in words(".run ref")
    assert words(".format p") == ["parquet"]


def test_in_a_terminal_ctrl_c_ends_the_query_and_ctrl_d_the_prompt(demo_store, tmp_path):
    command = [sys.executable, "-m", "esper.cli.main", "sql", "--store", str(demo_store)]
    mine, theirs = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = bytearray()

    def until(text):
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([mine], [], [], 1)[0]:
                seen.extend(os.read(mine, 4096))
        del seen[: seen.index(text) + len(text)]

    try:
        until(READY)
        os.write(mine, b"SELECT count(*) FROM range(10000000) a, range(10000000) b;\r")
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        until(b"interrupted")
        until(READY)
        os.write(mine, b"SELECT 40 + 2 AS answer;\r")
        until(b"1 rows in")
        until(READY)
        os.write(mine, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)
