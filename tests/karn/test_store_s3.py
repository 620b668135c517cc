"""The store on an object store: a real S3 protocol server in a process of its own, real Delta Lake tables on it."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from factories import synthetic_tables
from s3_server import BUCKET, CREDENTIALS, FLAKY, environment_of, s3_server

from esper.karn.catalogue import query
from esper.karn.overrides import overrides_of, record_override
from esper.karn.places import MissingFileError, place
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.errors import EsperError, IntegrityError, SpecError, StoreError
from esper.leyline.schema import SCHEMAS
from esper.leyline.verdict import CheckResult, Level, Use, Verdict

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def reachable(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in environment_of(endpoint, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def url(reachable: pytest.MonkeyPatch) -> str:
    """A prefix of its own for each test."""
    return f"s3://{BUCKET}/stores/{next(NUMBERS)}"


@pytest.fixture
def sealed(url: str) -> Version:
    dataset = open_store(url).dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=2, horizon=3))
    return dataset.seal(matrix_id="m", provenance={})


def from_another_machine(version: Version, folder: Path, patch: pytest.MonkeyPatch) -> Version:
    """The version as a machine sees it that never read it: with an empty cache."""
    patch.setenv("ESPER_CACHE", str(folder))
    return open_store(version.place.url.removesuffix("/demo")).resolve(version.ref)


def flip_a_byte(path: Path) -> Path:
    """A copy of a file, of its size, that differs in one byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    copy = path.with_name("flipped")
    copy.write_bytes(data)
    return copy


def test_a_version_on_s3_is_the_version_on_disk(url: str, tmp_path: Path, reachable: pytest.MonkeyPatch) -> None:
    tables = synthetic_tables(num_env_seeds=2, horizon=3)
    versions = []
    for where in (url, str(tmp_path / "store")):
        reachable.setenv("ESPER_STORE", where)
        store = open_store()
        assert store.names() == []
        assert store.dataset("demo").commit(tables) is not None
        assert store.dataset("demo").commit(tables) is None
        versions.append(store.dataset("demo").seal(matrix_id="m", provenance={}))
        assert store.names() == ["demo"]
        assert store.dataset("demo").orphan_names() == []
        assert store.url == where
    remote, local = (open_store(where).resolve("demo@1") for where in (url, tmp_path / "store"))
    assert remote.manifest.digest == local.manifest.digest == versions[0].manifest.digest
    for name in SCHEMAS:
        columns = [column for column in SCHEMAS[name].names if column != "attempt"]
        assert remote.table(name, columns=columns).equals(local.table(name, columns=columns))
    assert remote.verify() == local.verify() == []
    sql = "SELECT count(*) AS n, count(DISTINCT episode_id) AS episodes FROM steps"
    assert query(remote, sql).to_pylist() == query(local, sql).to_pylist()
    assert pickle.loads(pickle.dumps(remote)).table("episodes").equals(remote.table("episodes"))
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(remote)


def _writer(url: str, replicates: list[int], barrier) -> None:
    dataset = open_store(url).dataset("demo")
    parts = [synthetic_tables(num_env_seeds=1, first_replicate=replicate, horizon=3) for replicate in replicates]
    barrier.wait()
    for part in parts:
        dataset.commit(part)


def test_two_writer_processes_at_once_lose_nothing_and_double_nothing(
    url: str, tmp_path: Path, reachable: pytest.MonkeyPatch
) -> None:
    """This one and another create the tables at the same time, and the last cohort is in both plans."""
    reachable.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    other = context.Process(target=_writer, args=(url, [2, 3, 4], barrier))
    other.start()
    _writer(url, [0, 1, 4], barrier)
    other.join(120)
    assert other.exitcode == 0
    version = open_store(url).dataset("demo").seal(matrix_id="m", provenance={})
    local = open_store(tmp_path / "store").dataset("demo")
    local.commit(synthetic_tables(num_env_seeds=5, horizon=3))
    expected = local.seal(matrix_id="m", provenance={})
    assert version.manifest.digest == expected.manifest.digest
    assert version.manifest.counts == expected.manifest.counts
    assert version.table("steps").num_rows == expected.table("steps").num_rows
    assert version.verify() == []


def test_answers_that_get_lost_cost_nothing_and_double_nothing(
    reachable: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third write is done, answered with an error, and tried again by the client, which then finds it done."""
    monkeypatch.setattr("esper.karn.store.RACE_PATIENCE_S", 0.0)
    parts = [synthetic_tables(num_env_seeds=1, first_replicate=replicate, horizon=3) for replicate in range(2)]
    versions = []
    for where in (f"s3://{BUCKET}/{FLAKY}/store", tmp_path / "store"):
        dataset = open_store(where).dataset("demo")
        for part in parts:
            dataset.commit(part)
        versions.append(dataset.seal(matrix_id="m", provenance={}))
        assert dataset.version_numbers() == [1]
    remote, local = versions
    assert remote.manifest.digest == local.manifest.digest
    assert remote.table("steps").num_rows == local.table("steps").num_rows
    assert remote.verify() == []


def test_of_many_writers_of_a_new_object_one_wins(url: str) -> None:
    where = place(url)
    with ThreadPoolExecutor(8) as pool:
        for name in (f"race/{number}.json" for number in range(5)):
            won = list(pool.map(lambda text, name=name: where.write_new(name, text * 50_000), "abcdefgh"))
            assert won.count(True) == 1
            assert where.read_text(name) == "abcdefgh"[won.index(True)] * 50_000
    where.write_over("race/0.json", "later")
    assert where.read_text("race/0.json") == "later"
    assert where.names("race") == [f"race/{number}.json" for number in range(5)]
    assert where.names("rac") == where.child("race").names("none") == []


def test_lines_appended_at_once_are_all_there(url: str) -> None:
    where = place(url)
    lines = [f"line {number}" for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda line: where.append("lines.jsonl", line), lines))
    assert sorted(where.read_text("lines.jsonl").splitlines()) == sorted(lines)


def test_verdict_and_overrides_lie_on_the_object_store(
    sealed: Version, tmp_path: Path, reachable: pytest.MonkeyPatch
) -> None:
    assert sealed.verdict() is None
    assert overrides_of(sealed) == []
    check = CheckResult(name="coverage", environment="digits-gap", level=Level.WARN, value=0.1, message="poor")
    verdict = Verdict(
        dataset="demo", version=1, digest=sealed.manifest.digest, checked_at="2026-01-01", checks=(check,)
    )
    sealed.write_verdict(verdict)
    overrides = [record_override(sealed, Use.OFFLINE_RL, Level.WARN, f"good enough {n}", "me") for n in range(2)]
    elsewhere = from_another_machine(sealed, tmp_path / "other", reachable)
    assert elsewhere.verdict() == verdict
    assert overrides_of(elsewhere) == overrides


def test_a_byte_flipped_on_the_object_store_is_found_although_the_copy_here_is_good(
    sealed: Version, tmp_path: Path, reachable: pytest.MonkeyPatch
) -> None:
    victim = next(entry for entry in sealed.manifest.files if entry.table == "steps")
    good = sealed.place.fetch(victim.path)
    sealed.place.restore(victim.path, flip_a_byte(good))
    (problem,) = sealed.verify()
    assert (problem.kind, problem.path) == ("hash", victim.path)
    elsewhere = from_another_machine(sealed, tmp_path / "other", reachable)
    with pytest.raises(IntegrityError, match="SHA-256"):
        elsewhere.table("steps")
    assert not (elsewhere.root / victim.path).exists()

    sealed.place.restore(victim.path, good)
    assert elsewhere.verify() == []
    assert elsewhere.table("steps").equals(sealed.table("steps"))


def test_a_damaged_copy_in_the_mirror_is_replaced_by_verify(sealed: Version) -> None:
    entry = next(entry for entry in sealed.manifest.files if entry.table == "steps")
    copy = sealed.place.fetch(entry.path)
    expected = copy.read_bytes()
    flip_a_byte(copy).replace(copy)
    assert sealed.verify() == []
    assert sealed.place.fetch(entry.path).read_bytes() == expected


def test_an_object_that_is_gone_is_named(sealed: Version, tmp_path: Path, reachable: pytest.MonkeyPatch) -> None:
    victim = next(entry for entry in sealed.manifest.files if entry.table == "costs")
    sealed.place.remove(victim.path)
    sealed.place.remove(victim.path)
    (problem,) = sealed.verify()
    assert (problem.kind, problem.path) == ("missing", victim.path)
    elsewhere = from_another_machine(sealed, tmp_path / "other", reachable)
    with pytest.raises(IntegrityError, match="no such object"):
        elsewhere.table("costs")
    with pytest.raises(MissingFileError):
        sealed.place.read_text("versions/9.json")


UNREACHABLE = {
    "does not answer": {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
    "AWS_SECRET_ACCESS_KEY not set": {"AWS_SECRET_ACCESS_KEY": ""},
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY not set": {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
    "is not encrypted": {"AWS_ALLOW_HTTP": ""},
    "bucket does not exist": {},
}


@pytest.mark.parametrize("expected", UNREACHABLE)
def test_what_cannot_be_reached_is_one_message_without_secrets(expected: str, reachable: pytest.MonkeyPatch) -> None:
    for name, value in UNREACHABLE[expected].items():
        reachable.setenv(name, value)
    tables = synthetic_tables(num_env_seeds=1, horizon=3)
    for use in (lambda s: s.dataset("demo").commit(tables), lambda s: s.resolve("demo")):
        with pytest.raises(StoreError, match=expected) as caught:
            use(open_store("s3://no-such-bucket/prefix"))
        assert not any(value in str(caught.value) for value in CREDENTIALS.values() if len(value) > 10)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("s3://me:hunter22@bucket/x", "carries a user or a password"),
        ("s3://hunter22@bucket/x", "carries a user or a password"),
        ("s3://bucket/../x", "is no address of a store"),
        ("s3://bucket/a b", "is no address of a store"),
        ("s3://bucket/x?versionId=1", "is no address of a store"),
        ("s3://", "is no address of a store"),
        ("gs://bucket/x", "gs:// is not known"),
        ("https://host/x", "https:// is not known"),
    ],
)
def test_an_address_that_is_none_is_refused_and_no_password_repeated(
    address: str, expected: str, reachable: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match=expected) as caught:
        open_store(address)
    assert "hunter22" not in str(caught.value)


def test_a_path_object_made_of_an_address_is_still_the_address(url: str) -> None:
    assert open_store(Path(url)).url == url


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", ""])
def test_names_that_lead_out_of_a_place_are_refused(name: str, url: str, tmp_path: Path) -> None:
    for where in (place(url), place(tmp_path)):
        with pytest.raises(EsperError, match="leads out"):
            where.fetch(name)
