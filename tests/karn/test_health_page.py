"""The health page: what it draws is what the tables hold, and it is one file that loads nothing."""

import base64
import math
from collections import defaultdict
from html.parser import HTMLParser

import factories
import numpy as np
import pyarrow as pa
import pytest

from esper.karn.health_page import build_health_page, render
from esper.karn.health_page_data import read_page_data
from esper.karn.health_page_figures import median_line, wilson
from esper.karn.overrides import overrides_of, record_override
from esper.karn.report import build_report
from esper.karn.store import open_store
from esper.karn.verdict_text import check_row, override_lines, sorted_checks, verdict_line
from esper.leyline.actions import Op
from esper.leyline.errors import IntegrityError, SpecError, StoreError
from esper.leyline.library import find, load
from esper.leyline.rewards import RewardSpec, combine
from esper.leyline.verdict import CheckResult, Level, Use, Verdict

GAP = load("rewards", "digits-gap", RewardSpec)
BEHAVIOURS = ("baseline", "random", "anti-kasmina", "schedule-sampler")


def check(name, level, *, message="what was found", environment="all", value=0.031, uses=tuple(Use), remedy="do this"):
    limits = {} if level is Level.REPORT else {"warn_threshold": 0.05, "block_threshold": 0.02}
    return CheckResult(
        name=name,
        environment=environment,
        level=level,
        value=value,
        message=message,
        uses=uses,
        remedy=remedy,
        **limits,
    )


def verdict_of(version, *checks):
    return Verdict(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        checked_at="2026-01-01T00:00:00+00:00",
        checks=checks,
    )


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    for environment in ("digits-gap", "digits-baseline"):
        dataset.commit(factories.synthetic_tables(environment=environment, behaviours=BEHAVIOURS, horizon=12))
    dataset.commit(factories.synthetic_tables(behaviours=("heuristic",), horizon=12, role="evaluation"))
    return dataset.seal(matrix_id="m", provenance={})


@pytest.fixture(scope="module")
def data(version):
    return read_page_data(version, {"digits-gap": GAP})


@pytest.fixture(scope="module")
def steps(version):
    rows = version.table("steps").to_pylist()
    return [row for row in rows if row["role"] == "data" and not row["is_last"]]


@pytest.fixture(scope="module")
def decisions(steps):
    return [row for row in steps if not row["forced"] and not row["replayed"]]


@pytest.fixture(scope="module")
def verdict(version):
    return verdict_of(
        version,
        check("legal_transitions", Level.PASS, message="every transition is legal"),
        check("action_entropy", Level.WARN, message="0.4 nats <not 0.5>"),
        check("propensity_audit", Level.BLOCK, message="mean of u/mu is 2", uses=(Use.OFF_POLICY_EVALUATION,)),
        check("paired_gain", Level.REPORT, environment="digits-gap", value=None),
    )


@pytest.fixture(scope="module")
def page(version, verdict, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "health" / "demo@1.html"
    docs = out.parent / "demo@1" / "index.html"
    return build_health_page(
        version, verdict, rewards={"digits-gap": GAP}, docs=docs, out=out, row_checks={"propensity_audit"}
    ).read_text()


class Document(HTMLParser):
    """Images, links, text, and whether every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.images, self.targets, self.text, self.ids = [], [], [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values["id"]} if "id" in values else set()
        self.targets += [values[name] for name in ("src", "href") if name in values]
        self.images += [values] if tag == "img" else []
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_well_formed_file_that_loads_nothing(page):
    document = Document(page)
    assert document.open == []
    links = {target for target in document.targets if not target.startswith(("#", "data:image/svg+xml;base64,"))}
    assert links == {"demo%401/index.html"}
    assert document.ids == {"checks", "actions", "entropy", "coverage", "returns", "sample-size", "calibration"}
    for forbidden in ("<script", "@import", "url(", "<link"):
        assert forbidden not in page


def test_it_has_the_six_plots_for_every_environment_each_told_in_words(page):
    images = Document(page).images
    assert len(images) == 2 * 7  # the coverage map is two
    for image in images:
        assert len(image["alt"]) > 40
        assert b"<svg" in base64.b64decode(image["src"].partition(",")[2])


def test_checks_are_listed_worst_first_escaped_with_remedy_and_command_and_passes_are_folded(page):
    assert "&lt;not 0.5&gt;" in page
    order = [page.index(name) for name in ("propensity audit", "action entropy", "<details>", "legal transitions")]
    assert order == sorted(order)
    assert "esper health demo@1 --rows propensity_audit" in page
    assert "--rows action_entropy" not in page  # a property of the whole has no rows
    assert "1 checks pass" in page
    assert "for off-policy-evaluation" in page


def test_the_level_of_every_use_stands_at_the_top(page):
    text = " ".join(" ".join(Document(page).text[:200]).split())
    assert "warn imitation warn offline RL block off-policy evaluation" in text


def test_the_same_version_gives_the_same_bytes(version, verdict, data):
    assert render(version, verdict, data, docs_link=None) == render(version, verdict, data, docs_link=None)


def test_a_version_without_decisions_says_so_instead_of_drawing(tmp_path):
    dataset = open_store(tmp_path).dataset("empty")
    dataset.commit(factories.synthetic_tables(behaviours=("heuristic",), role="evaluation"))
    version = dataset.seal(matrix_id="m", provenance={})
    html = build_health_page(version, verdict_of(version), rewards={}, docs=None, out=tmp_path / "p.html").read_text()
    assert Document(html).open == []
    assert html.count('class="empty"') == 6
    assert "Nothing blocks and nothing warns" in html


def test_where_it_cannot_be_written_the_error_names_the_file(version, verdict, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write the health page"):
        build_health_page(version, verdict, rewards={}, docs=None, out=tmp_path / "file" / "p.html")


def test_coverage_counts_what_was_taken_and_what_was_valid(data, decisions):
    for environment, found in data.coverage.items():
        here = [row for row in decisions if row["environment"] == environment]
        for slot, op in np.ndindex(found.taken_SO.shape):
            taken = [row for row in here if row["op"] == Op(op + 1).name and row["action_slot"] == slot]
            valid = [row for row in here if row["valid_slots"][op + 1] >> slot & 1]
            assert (found.taken_SO[slot, op], found.valid_SO[slot, op]) == (len(taken), len(valid))
        germinated = [row for row in here if row["op"] == "GERMINATE"]
        assert (found.germinated_BL.sum(axis=1)[:] % 5 == 0).all()  # five levers beside the blueprint
        assert found.germinated_BL.sum() == 5 * len(germinated) > 0
        isolated = [row for row in germinated if row["action_blueprint"] == 2 and row["action_isolation"] == 0]
        assert found.germinated_BL[2, 13] == len(isolated)


def test_what_the_environment_does_not_offer_is_not_called_uncovered(tmp_path, monkeypatch):
    text = find("environments", "digits-gap").read_text(encoding="utf-8")
    without_the_steepest = tmp_path / "datasets" / "environments" / "digits-gap.toml"
    without_the_steepest.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # the datasets of the working folder come first
    without_the_steepest.write_text('blends = ["linear", "sigmoid-0.5", "sigmoid-1", "gated"]\n' + text)
    dataset = open_store(tmp_path / "store").dataset("plain")
    dataset.commit(factories.synthetic_tables())
    found = read_page_data(dataset.seal(matrix_id="m", provenance={}), {}).coverage["digits-gap"]
    assert not found.possible_BL[:, 3].any()  # the steepest sigmoid
    assert found.possible_BL[:, [0, 1, 2, 4]].all()
    assert not found.germinated_BL[~found.possible_BL].any()


def test_returns_are_those_of_the_reward_and_points_where_it_is_unknown(data, steps):
    by_episode = defaultdict(list)
    for row in steps:
        by_episode[row["environment"], row["actor"], row["episode_id"]].append(row)
    for (environment, actor, _), rows in by_episode.items():
        points, growth = (
            np.array([row[name] for row in rows]) for name in ("reward_accuracy_points", "reward_growth_log2")
        )
        value = combine(GAP, points, growth).sum() if environment == "digits-gap" else points.sum()
        assert np.isclose(data.returns[environment][actor], value).any()
    assert data.in_points == {"digits-baseline"}
    assert sum(len(values) for part in data.returns.values() for values in part.values()) == len(by_episode)


def test_the_effective_sample_size_is_that_of_prefix_weights_of_the_greedy_policy(data, decisions):
    rows = [row for row in decisions if row["environment"] == "digits-gap" and row["actor"] == "anti-kasmina"]
    rows = [row for row in rows if row["epsilon"] == 0.2]
    by_episode = defaultdict(dict)
    for row in rows:
        greedy = row["behaviour_logp"] >= math.log(0.8) - 1e-6
        by_episode[row["episode_id"]][row["step"]] = math.exp(-row["behaviour_logp"]) if greedy else 0.0
    line, episodes = data.sample_sizes["digits-gap"]["anti-kasmina"]
    assert episodes == len(by_episode) > 1
    assert [step for step, _ in line] == sorted({row["step"] for row in rows})
    for step, size in line:
        weights = [math.prod(ratio for at, ratio in own.items() if at <= step) for own in by_episode.values()]
        expected = sum(weights) ** 2 / sum(w * w for w in weights) if any(weights) else 0.0
        assert size == pytest.approx(expected)


def test_the_calibration_holds_every_stated_probability_between_0_and_1(data, decisions):
    for environment, found in data.calibration.items():
        stated = [
            (p, row["op"] == op.name)
            for row in decisions
            if row["environment"] == environment and row["op_probs"] is not None
            for op, p in zip(Op, row["op_probs"])
            if 0 < p < 1
        ]
        assert found.draws.sum() == len(stated)
        assert (found.stated * found.draws).sum() == pytest.approx(sum(p for p, _ in stated))
        assert (found.taken * found.draws).sum() == pytest.approx(sum(taken for _, taken in stated))


def test_wilsons_interval_holds_the_share_and_narrows_with_draws():
    low, high = wilson(np.array([0.0, 0.2, 0.2, 1.0]), np.array([10, 10, 1000, 10]))
    assert ((low >= -1e-12) & (high <= 1 + 1e-12)).all()
    assert low[1] < low[2] < 0.2 < high[2] < high[1]


def test_the_median_line_is_taken_over_the_lines_that_have_the_step():
    assert median_line({"a": [(0, 1.0), (1, 2.0)], "b": [(0, 3.0)]}) == [(0, 2.0), (1, 2.0)]


def test_the_entropy_of_a_step_is_that_of_its_ops_and_a_behaviours_is_taken_over_five(data, decisions):
    def nats(rows):
        shares = np.array([sum(row["op"] == op.name for row in rows) for op in Op]) / len(rows)
        return -sum(share * math.log(share) for share in shares if share)

    here = [row for row in decisions if row["environment"] == "digits-gap"]
    lines = data.entropies["digits-gap"]
    for step, value in lines[""]:
        assert value == pytest.approx(nats([row for row in here if row["step"] == step]))
    own = [row for row in here if row["actor"] == "random"]
    for step, value in lines["random"]:
        assert value == pytest.approx(nats([row for row in own if abs(row["step"] - step) <= 2]))


def spoil(table, **columns):
    """Put values into the first rows of some columns."""
    for name, values in columns.items():
        place, kind = table.schema.get_field_index(name), table.schema.field(name)
        found = table[name].to_pylist()
        found[: len(values)] = values
        table = table.set_column(place, kind, pa.array(found, kind.type))
    return table


def test_faulty_data_get_a_page_too(tmp_path):
    tables = factories.synthetic_tables(behaviours=("baseline", "random"), horizon=8)
    steps = spoil(
        tables["steps"].sort_by([("op", "ascending")]),
        op=["EXPLODE", None, "WAIT", "GERMINATE", "GERMINATE", "GERMINATE", "GERMINATE", "GERMINATE", "GERMINATE"],
        forced=[False] * 12,
        action_slot=[9, None, 0, 7],
        action_blueprint=[0, 0, 0, 99, -3, None],
        tree_mask=[b"", b"x", b"y" * 100],
        valid_slots=[[], [1, 2], [0] * 9],
        behaviour_logp=[None, 5.0, -1e300, 800.0, -800.0],
        op_probs=[[], [0.5] * 9, [2.0, -1.0], None],
        epsilon=[-1.0, 1.0, 0.2, 0.2, 0.2],
        reward_accuracy_points=[1e30, 1e30, -1e30, None],
    )
    dataset = open_store(tmp_path).dataset("faulty")
    dataset.commit({**tables, "steps": steps})
    version = dataset.seal(matrix_id="m", provenance={})
    html = build_health_page(version, verdict_of(version), rewards={}, docs=None, out=tmp_path / "p.html").read_text()
    assert Document(html).open == []
    assert len(Document(html).images) == 7


@pytest.fixture
def fresh(tmp_path):
    dataset = open_store(tmp_path / "s").dataset("fresh")
    dataset.commit(factories.synthetic_tables())
    return dataset.seal(matrix_id="m", provenance={})


def test_an_override_is_kept_beside_the_verdict_and_every_later_page_and_report_prints_its_reason(fresh, tmp_path):
    record_override(fresh, Use.OFFLINE_RL, Level.BLOCK, "  only to try\n <b>things</b> ", "iql")
    record_override(fresh, Use.OFFLINE_RL, Level.BLOCK, "only to try <b>things</b>", "iql")
    path = fresh.path.with_name("1.overrides.jsonl")
    assert len(path.read_text().splitlines()) == 2
    assert {item.reason for item in overrides_of(fresh)} == {"only to try <b>things</b>"}
    assert len(override_lines(overrides_of(fresh))) == 1
    dataset = open_store(tmp_path / "s").dataset("fresh")
    dataset.commit(factories.synthetic_tables(first_replicate=7))
    later = dataset.seal(matrix_id="m", provenance={})
    assert later.number == 2
    pages = [
        build_health_page(later, verdict_of(later), rewards={}, docs=None, out=tmp_path / "health.html"),
        build_report(later, evaluation=None, events=tmp_path, out=tmp_path / "report.html"),
    ]
    for written in pages:
        text = written.read_text()
        assert "fresh@1 was used for offline-rl by iql against its health (verdict block)" in text
        assert "only to try &lt;b&gt;things&lt;/b&gt;" in text


@pytest.mark.parametrize("reason", ["", "  ", "..", "??? !!!", "x" * 1001])
def test_a_reason_that_says_nothing_or_too_much_is_refused(fresh, reason):
    with pytest.raises(SpecError):
        record_override(fresh, Use.IMITATION, None, reason, "bc")
    assert overrides_of(fresh) == []


@pytest.mark.parametrize("line", ["{", '{"dataset": "fresh"}', "\xff"])
def test_a_damaged_override_is_an_integrity_error(fresh, line):
    fresh.path.with_name("1.overrides.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(IntegrityError, match=r"1\.overrides\.jsonl"):
        overrides_of(fresh)


def test_overrides_of_other_data_are_an_integrity_error(fresh, version):
    override = record_override(fresh, Use.IMITATION, None, "to test", "bc")
    other = override.model_copy(update={"dataset": "other"})
    fresh.path.with_name("1.overrides.jsonl").write_text(other.model_dump_json() + "\n")
    with pytest.raises(IntegrityError, match="other data"):
        overrides_of(fresh)


def test_the_one_line_tells_every_use_and_is_silent_about_good_data_where_asked(fresh):
    assert verdict_line(fresh) == "health of fresh@1: never checked; run `esper health fresh@1`"
    fresh.write_verdict(verdict_of(fresh, check("c", Level.WARN)))
    told = "health of fresh@1: imitation warn, offline-rl warn, off-policy-evaluation warn"
    assert (verdict_line(fresh), verdict_line(fresh, only_bad=True)) == (told, None)
    fresh.write_verdict(verdict_of(fresh, check("c", Level.BLOCK, uses=(Use.OFF_POLICY_EVALUATION,))))
    assert verdict_line(fresh, only_bad=True).endswith("offline-rl pass, off-policy-evaluation block")
    fresh.path.with_name("1.verdict.json").write_text("{")
    assert "damaged" in verdict_line(fresh, only_bad=True)


def test_a_check_as_text_has_its_remedy_and_uses_only_where_it_fires(version, verdict):
    rows = [check_row(item) for item in sorted_checks(verdict)]
    assert [row.level for row in rows] == ["block", "warn", "pass", "report"]
    assert [bool(row.remedy) for row in rows] == [True, True, False, False]
    assert [row.uses for row in rows] == ["off-policy-evaluation", "", "", ""]
    assert (rows[0].thresholds, rows[3].thresholds, rows[3].value) == ("warn 0.05\nblock 0.02", "–", "–")
