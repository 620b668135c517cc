"""Credentials in texts are masked; ordinary words are not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.cli.main import main
from esper.leyline.errors import StoreError
from esper.leyline.events import EventKind
from esper.leyline.secrets import is_secret_variable, mask, mask_error, mask_json
from esper.nissa.writer import EventWriter

AWS_KEY = "AKIA" + "IOSFODNN7EXAMPLE"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open s3://me:hunter2@host:9000/b", "cannot open s3://***@host:9000/b"),
        ("postgresql+asyncpg://u:p%40w@db/prefect", "postgresql+asyncpg://***@db/prefect"),
        ("GET https://h/x?a=1&X-Amz-Signature=abcdef&b=2", "GET https://h/x?a=1&X-Amz-Signature=***&b=2"),
        (f"key {AWS_KEY}.", "key ***."),
        ("aws_secret_access_key = 'abcd/efgh+1'", "aws_secret_access_key = '***'"),
        ('{"password": "hunter2", "user": "me"}', '{"password": "***", "user": "me"}'),
        ("Authorization: Bearer abc.def-ghi_123", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrstuvwx", "***"),
    ],
)
def test_what_looks_like_a_credential_is_masked(text, shown):
    assert mask(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix@1 has no version",
        "unknown key 'max_linages'; did you mean 'max_lineages'?\n  known keys: matrix, store",
        "host_key 1f2e3d4c, state_id 9",
        "demo@1: digest 685a28a4993e0961",
        "see https://docs.prefect.io/v3/concepts?tab=python",
        "key 'dataset' is missing",
        "environment tiny under numerics 'cpu-fp32' cannot run on cuda:0",
    ],
)
def test_ordinary_messages_stay_as_they_are(text):
    assert mask(text) == text


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "PREFECT_API_KEY", "api_key"])
def test_names_that_say_secret(name):
    assert is_secret_variable(name)


@pytest.mark.parametrize("name", ["PWD", "TOKENIZERS_PARALLELISM", "KEYBOARD", "HOME", "MONKEY"])
def test_names_that_do_not(name):
    assert not is_secret_variable(name)


@given(secret=st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=6, max_size=40))
def test_the_value_of_a_secret_variable_is_in_no_masked_text(secret):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROBE_TOKEN", secret)
        assert secret.strip("*") == "" or secret not in mask(f"a {secret} b={secret}&c/{secret}/d")
        assert mask_json({"a": [secret, 1]}) == {"a": [mask(secret), 1]}


def test_events_and_errors_of_commands_carry_no_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROBE_TOKEN", "tip-top-secret")
    with EventWriter(tmp_path, "r") as events:
        events.emit(EventKind.COHORT_FAILED, {"error": "at tip-top-secret", "notes": [{"x": "tip-top-secret"}]})
    (path,) = tmp_path.glob("*.jsonl")
    assert json.loads(path.read_text())["data"] == {"error": "at ***", "notes": [{"x": "***"}]}
    assert main(["sql", "select 1", "--dataset", "tip-top-secret", "--store", str(tmp_path)]) == 2
    assert "tip-top-secret" not in "".join(capsys.readouterr())
    error = StoreError("cannot reach tip-top-secret")
    error.add_note("tip-top-secret again")
    mask_error(error)
    assert (str(error), error.__notes__) == ("cannot reach ***", ["*** again"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--expose"),
        (["--role", "worker"], "--role worker without --api"),
        (["--role", "worker", "--api", "http://h/api", "--store", "s"], "--store with --role worker"),
        (["--pool", "cpu"], "--pool with a server"),
        (["--config", "defalt"], "did you mean 'default'"),
        (["--devices", "cpu"], "pool gpu counts GPUs"),
        (["--role", "worker", "--api", "http://h/api", "--limit", "0"], "--limit 0"),
        (["--role", "worker", "--api", "http://h/api", "--limit", "2", "--devices", "cpu"], "--limit beside --devices"),
        (["--role", "worker", "--api", "http://h/api", "--pool", "gpu"], "--pool gpu without a GPU"),
    ],
)
def test_serve_refuses_what_it_cannot_mean(arguments, says, capsys):
    assert main(["serve", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_serve_shows_deployments_and_their_next_times_without_starting_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "datagen/nightly" in said
    assert "0 2 * * *" in said
    assert "02:00:00 UTC" in said
    assert "on version.sealed" in said
    assert not list(tmp_path.iterdir())
