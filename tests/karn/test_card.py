"""The card: what it says is what the manifest and the rows say, its commands run, and nothing breaks out of it."""

from __future__ import annotations

import contextlib
import io
import re
from html.parser import HTMLParser

import pytest
from factories import synthetic_tables
from ruamel.yaml import YAML

from esper.karn.card import SKELETON, card_html, card_markdown
from esper.karn.splits_stored import stored_split
from esper.karn.store import open_store
from esper.leyline.schema import SCHEMAS
from esper.leyline.verdict import CheckResult, Level, Use, Verdict

HOSTILE = "<script>alert(1)</script> | ](javascript:x) `code` **bold**"
REWARD = {"name": "digits-gap", "rent_points": 3.0, "scale_points": 9.0}
PROVENANCE = {
    "matrix": {"name": "small", "cells": []},
    "environments": {"digits-gap": {"name": "digits-gap", "task": {"kind": "digits"}, "horizon": 3}},
    "rewards": {"digits-gap": REWARD},
    "packages": {"numpy": "2.4"},
    "machine": {"cpu": HOSTILE, "cores": 2},
    "host_data": [{"name": "Digits", "source": "UCI", "licence": "CC BY 4.0", "changes": "split"}],
}


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=4, horizon=3))
    sealed = dataset.seal(matrix_id="m1", provenance=PROVENANCE)
    check = CheckResult(
        name="coverage",
        environment="digits-gap",
        level=Level.BLOCK,
        value=0.0,
        message=f"PRUNE was never taken {HOSTILE}",
        remedy="add random episodes",
        uses=(Use.OFFLINE_RL,),
    )
    digest = sealed.manifest.digest
    sealed.write_verdict(Verdict(dataset="demo", version=1, digest=digest, checked_at="now", checks=(check,)))
    return sealed


@pytest.fixture(scope="module")
def markdown(version):
    return card_markdown(version)


@pytest.fixture(scope="module")
def exported(version):
    files = {"steps": "data/steps/*.parquet", "episodes": "data/episodes/*.parquet"}
    return card_markdown(version, files=files)


@pytest.fixture(scope="module")
def page(version):
    return card_html(version)


def section(markdown, title):
    return markdown.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_card_has_provenance_coverage_verdict_splits_schema_and_limits(version, markdown):
    assert version.manifest.digest in section(markdown, "Provenance")
    assert "CC BY 4.0" in section(markdown, "Host data")
    assert "| digits-gap | data | host | baseline | 0 | 4 | 4 |" in section(markdown, "Coverage")
    verdict = section(markdown, "Verdict")
    assert "| offline RL | **block** |" in verdict
    assert "| imitation | **pass** |" in verdict
    assert "add random episodes" in verdict
    held = len(stored_split(version).validation)
    assert re.search(
        rf"\| validation \| digits-gap \| {3 * held} \| {9 * held} \| {held} \|", section(markdown, "Splits")
    )
    assert "not independent" in section(markdown, "Known limits")
    schema = section(markdown, "Schema")
    for table in SCHEMAS:
        assert f"### `{table}`" in schema
    assert "| `train_loss` | float | nats; 0 to ∞ |" in schema
    assert "| `behaviour_logp` | double | nats |" in schema
    assert "`s0_alpha` … `s5_alpha`" in schema


def test_every_column_is_in_the_card(markdown):
    schema = section(markdown, "Schema")
    for table in SCHEMAS.values():
        for name in table.names:
            slotted = re.sub(r"^s[1-5]_", "s0_", name)
            assert f"`{slotted}`" in schema


def test_the_front_matter_is_what_the_hub_reads(exported):
    _, matter, _ = exported.split("---\n", 2)
    facts = YAML(typ="safe").load(matter)
    assert facts["pretty_name"] == "Esper demo@1"
    assert facts["license"] == "other"
    assert facts["size_categories"] == ["n<1K"]
    assert facts["configs"] == [
        {"config_name": "steps", "data_files": "data/steps/*.parquet", "default": True},
        {"config_name": "episodes", "data_files": "data/episodes/*.parquet"},
    ]


def run_blocks(markdown):
    """Run the Python of a card, as one program; return what it printed."""
    blocks = re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)
    assert len(blocks) >= 4
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("\n".join(blocks), {})
    return printed.getvalue()


def test_the_ways_to_load_it_run_as_they_stand(version, markdown, monkeypatch):
    monkeypatch.setenv("ESPER_STORE", str(version.root.parent))
    printed = run_blocks(markdown)
    waits = version.table("steps")["op"].to_pylist().count("WAIT")
    assert re.search(rf"WAIT\s*│\s*{waits} │", printed)
    assert re.search(rf"WAIT\s*┆ {waits}\s", printed)
    assert "baseline" in printed


def test_the_ways_to_load_an_export_run_as_they_stand(version, exported, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    for table in ("steps", "episodes"):
        (tmp_path / "data" / table).mkdir(parents=True)
        pq.write_table(version.table(table), tmp_path / "data" / table / "part-0.parquet")
    monkeypatch.chdir(tmp_path)
    assert "baseline" in run_blocks(exported)


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_is_escaped_and_loads_nothing(page):
    found = Elements(page)
    assert found.addresses == []
    assert not found.tags & {"script", "img", "link", "iframe", "a"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | ](javascript:x)" in page
    assert "url(" not in page
    assert found.tags >= {"table", "h1", "h2", "pre"}


def test_values_are_text_in_markdown_too(markdown):
    line = next(line for line in markdown.splitlines() if "PRUNE was never taken" in line)
    assert "\\<script\\>alert(1)\\</script\\> \\| \\](javascript:x) \\`code\\` \\*\\*bold\\*\\*" in line


def test_no_credential_is_in_a_card_and_nothing_else_of_it_changes(version, markdown, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "add random episodes")
    assert card_markdown(version) == markdown.replace("add random episodes", "***")
    assert "add random episodes" not in card_html(version)


def test_skeleton_data_are_marked_loudly(tmp_path):
    dataset = open_store(tmp_path).dataset("skeleton")
    dataset.commit(synthetic_tables(num_env_seeds=1, horizon=2))
    version = dataset.seal(matrix_id="m", provenance={"skeleton": True})
    text = card_markdown(version)
    assert text.index(SKELETON) < text.index("## Provenance")
    assert '"synthetic"' in text.split("---\n", 2)[1]
    assert "made up (skeleton)" in section(text, "Known limits")
    assert "Never checked" in section(text, "Verdict")
