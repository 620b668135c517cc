"""A version leaves one store as a file and enters another one whole, or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile

import pytest
from factories import concat_tables, synthetic_tables

from esper.karn.exchange_archive import INDEX, export_archive, import_archive
from esper.karn.splits_stored import read_split, stored_split
from esper.karn.store import open_store
from esper.leyline.errors import EsperError, IntegrityError, SpecError
from esper.leyline.verdict import Verdict


def rows(seed=0, **options):
    return synthetic_tables(num_env_seeds=2, behaviours=("baseline",), horizon=3, seed=seed, **options)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    dataset = open_store(tmp_path_factory.mktemp("from")).dataset("demo")
    dataset.commit(concat_tables(rows(), rows(environment="digits-baseline")))
    version = dataset.seal(matrix_id="m", provenance={"machine": "here"})
    version.write_verdict(
        Verdict(dataset="demo", version=1, digest=version.manifest.digest, checked_at="now", checks=())
    )
    stored_split(version)
    return version


@pytest.fixture(scope="module")
def archive(sealed, tmp_path_factory):
    return export_archive(sealed, tmp_path_factory.mktemp("archive"))


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "to")


def test_a_version_arrives_with_digest_files_verdict_splits_and_number(sealed, archive, store):
    version = import_archive(store, archive)
    assert (version.ref, version.manifest.digest) == ("demo@1", sealed.manifest.digest)
    assert version.verify() == []
    assert version.manifest.files == sealed.manifest.files
    assert version.manifest.provenance == {"machine": "here"}
    assert version.verdict() == sealed.verdict()
    assert read_split(version) == read_split(sealed)
    for table in ("steps", "costs", "episodes"):
        assert version.table(table).equals(sealed.table(table)), table


def test_the_dataset_that_came_goes_on_as_any_other(sealed, archive, store):
    import_archive(store, archive)
    dataset = store.dataset("demo")
    assert dataset.commit(rows()) is None
    assert dataset.orphan_names() == []
    again = dataset.seal(matrix_id="m", provenance={})
    assert again.ref == "demo@1"
    assert dataset.commit(rows(first_replicate=9)) is not None
    assert dataset.seal(matrix_id="m2", provenance={}).ref == "demo@2"


def test_importing_it_again_changes_nothing(archive, store):
    import_archive(store, archive)
    before = {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    assert import_archive(store, archive).ref == "demo@1"
    assert {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()} == before


def test_another_name_is_its_name_everywhere(sealed, archive, store):
    version = import_archive(store, archive, name="mine")
    assert version.ref == "mine@1"
    assert version.manifest.digest == sealed.manifest.digest
    assert version.verdict().dataset == "mine"
    assert read_split(version).dataset == "mine"


def test_a_later_version_gets_the_next_number_and_adds_only_what_is_new(tmp_path):
    source = open_store(tmp_path / "from").dataset("demo")
    target = open_store(tmp_path / "to")
    for replicate in (0, 5):
        source.commit(rows(first_replicate=replicate))
        version = source.seal(matrix_id="m", provenance={})
        found = import_archive(target, export_archive(version, tmp_path / f"{replicate}.tar"))
        assert found.manifest.digest == version.manifest.digest
        assert found.number == version.number
        assert found.verify() == []
    assert target.dataset("demo").episode_ids() == source.episode_ids()


def test_a_name_that_holds_other_rows_is_refused(archive, store):
    store.dataset("demo").commit(rows(seed=3, first_replicate=7))
    before = sorted(path for path in store.root.rglob("*") if path.is_file())
    with pytest.raises(SpecError, match="--name"):
        import_archive(store, archive)
    assert sorted(path for path in store.root.rglob("*") if path.is_file()) == before


def test_a_killed_import_is_taken_up_by_the_next(archive, store, monkeypatch):
    from esper.karn import exchange_adopt

    with monkeypatch.context() as patched:
        patched.setattr(exchange_adopt, "_write_beside", lambda *_: os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            import_archive(store, archive)
    assert store.dataset("demo").version_numbers() == []
    version = import_archive(store, archive)
    assert version.verify() == []
    assert store.dataset("demo").orphan_names() == []


def test_zstd_holds_the_same(sealed, store, tmp_path):
    path = export_archive(sealed, tmp_path / "small.tar.zst")
    assert path.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
    assert import_archive(store, path).manifest.digest == sealed.manifest.digest


def test_the_same_version_is_the_same_bytes_and_no_file_is_written_over(sealed, archive, tmp_path):
    assert export_archive(sealed, tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    with pytest.raises(SpecError, match="there already"):
        export_archive(sealed, tmp_path / "again.tar")


def test_a_damaged_file_is_not_exported_and_leaves_nothing(tmp_path):
    dataset = open_store(tmp_path / "store").dataset("demo")
    dataset.commit(rows())
    version = dataset.seal(matrix_id="m", provenance={})
    path = version.files("steps")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="another hash"):
        export_archive(version, tmp_path / "out.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def members(archive):
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def written(path, parts):
    with tarfile.open(path, "w") as tar:
        for member, data in parts:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def indexed(parts, change):
    """The archive with its index changed."""
    member, data = parts[0]
    index = json.loads(data)
    change(index)
    return [(member, json.dumps(index).encode()), *parts[1:]]


def rename(parts, old, new):
    """One file under another name, in the index too."""
    parts = [(tarfile.TarInfo(new) if member.name == old else member, data) for member, data in parts]
    return indexed(parts, lambda index: [f.update(path=new) for f in index["files"] if f["path"] == old])


def flip(parts, place):
    member, data = parts[place]
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return [*parts[:place], (member, bytes(changed)), *parts[place + 1 :]]


def rehash(parts):
    """What someone writes who changes a file and knows of the hashes in the index."""
    found = {m.name: (len(d), hashlib.sha256(d).hexdigest()) for m, d in parts}

    def change(index):
        for file in index["files"]:
            file["size"], file["sha256"] = found[file["path"]]

    return indexed(parts, change)


def link(parts, kind):
    member = tarfile.TarInfo(parts[-1][0].name)
    member.type, member.linkname = kind, "/etc/passwd"
    return [*parts[:-1], (member, b"")]


def other_rows(parts):
    """A manifest, consistent with the index, whose digest is of other rows."""
    manifest = json.loads(parts[1][1])
    manifest["digest"] = "0" * 64
    changed = [
        parts[0],
        (parts[1][0], json.dumps(manifest).encode()),
        *(p for p in parts[2:] if ".verdict" not in p[0].name and ".splits" not in p[0].name),
    ]
    names = {member.name for member, _ in changed}

    def change(index):
        index["digest"] = manifest["digest"]
        index["files"] = [file for file in index["files"] if file["path"] in names]

    return rehash(indexed(changed, change))


FORGERIES = {
    "traversal": lambda parts: rename(parts, parts[-1][0].name, "../../evil.parquet"),
    "absolute": lambda parts: rename(parts, parts[-1][0].name, "/tmp/evil.parquet"),
    "unnamed": lambda parts: [*parts, (tarfile.TarInfo("versions/9.json"), b"{}")],
    "twice": lambda parts: [*parts, parts[-1]],
    "stranger": lambda parts: rename(parts, "versions/1.verdict.json", "runs/x.json"),
    "symlink": lambda parts: link(parts, tarfile.SYMTYPE),
    "hardlink": lambda parts: link(parts, tarfile.LNKTYPE),
    "device": lambda parts: link(parts, tarfile.CHRTYPE),
    "flipped": lambda parts: flip(parts, len(parts) - 1),
    "flipped and rehashed": lambda parts: rehash(flip(parts, len(parts) - 1)),
    "missing": lambda parts: parts[:-1],
    "no index": lambda parts: parts[1:],
    "wrong digest": other_rows,
    "other manifest": lambda parts: indexed(parts, lambda index: index.update(number=2)),
    "index twice": lambda parts: indexed(parts, lambda index: index["files"].append(index["files"][-1])),
    "no name": lambda parts: indexed(parts, lambda index: index.update(dataset="../x")),
    "negative": lambda parts: indexed(parts, lambda index: index["files"][-1].update(size=-1)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_archive_writes_nothing(archive, store, tmp_path, forgery):
    path = written(tmp_path / "forged.tar", FORGERIES[forgery](members(archive)))
    with pytest.raises((IntegrityError, SpecError)) as caught:
        import_archive(store, path)
    assert "forged.tar" in str(caught.value) or "leads out" in str(caught.value) or "damaged" in str(caught.value)
    assert not store.root.exists()


@pytest.mark.parametrize("share", [0.001, 0.3, 0.8])
def test_an_archive_that_ends_early_writes_nothing(archive, store, tmp_path, share):
    data = archive.read_bytes()
    path = tmp_path / "cut.tar"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(EsperError):
        import_archive(store, path)
    assert not store.root.exists()


def test_what_is_no_archive_is_said_to_be_none(store, tmp_path):
    path = tmp_path / "x.tar"
    for data in (b"", b"PK\3\4 no tar", b"\x28\xb5\x2f\xfd broken", os.urandom(4096)):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"x\.tar is not imported"):
            import_archive(store, path)
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(INDEX), io.BytesIO(b""))
    with pytest.raises(IntegrityError, match=INDEX):
        import_archive(store, path)


@pytest.mark.slow
def test_an_archive_goes_into_an_object_store_and_comes_out_of_it(sealed, archive, tmp_path, monkeypatch):
    from s3_server import BUCKET, CREDENTIALS, s3_server

    with s3_server() as address:
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("ESPER_CACHE", str(tmp_path / "cache"))
        remote = open_store(f"s3://{BUCKET}/imported")
        version = import_archive(remote, archive)
        assert version.verify() == []
        assert version.table("steps").equals(sealed.table("steps"))
        assert remote.dataset("demo").commit(rows()) is None
        back = export_archive(version, tmp_path / "back.tar")
        assert import_archive(open_store(tmp_path / "local"), back).manifest.digest == sealed.manifest.digest
