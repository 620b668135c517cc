import base64
import json
import re
from html.parser import HTMLParser

import factories
import numpy as np
import pytest

from esper.karn import report_data
from esper.karn.comparison_table import HEADINGS, comparison_table, findings, interval_text, number
from esper.karn.report import build_report
from esper.karn.report_figures import spread
from esper.karn.store import open_store
from esper.leyline.comparison import ArmResult, BestFixed, ControlResult, Evaluation, Interval
from esper.leyline.errors import StoreError
from esper.leyline.events import Event, EventKind
from esper.leyline.verdict import CheckResult, Level, Verdict

ARMS = {
    "never-act": ("control", 0.0, 0.0, 0),
    "random": ("control", 3.4, 0.1, 300),
    "heuristic": ("rule", 0.6, -0.05, 40),
    "best-fixed": ("schedule", 28.1, 2.4, 1510),
    "bigger": ("from scratch", 29.0, 1.9, 6200),
    "wider": ("from scratch", 8.0, 0.4, 380),
    "bc": ("learned", 11.2, 0.8, 420),
    "iql": ("learned", 27.5, 2.41, 1480),
    "ppo": ("learned", 24.0, 2.0, 700),
}


def interval(mean, half=0.3):
    return Interval(mean=mean, low=mean - half, high=mean + half, num_env_seeds=20, method="BCa")


def evaluation(environments=("digits-gap", "digits-baseline"), *, passed=True):
    def arm(environment, name):
        group, gain, episode_return, params = ARMS[name]
        if environment == "digits-baseline":
            gain, episode_return = gain / 60, episode_return - 3
        others = [other for other in ("never-act", "heuristic", "best-fixed") if other != name]
        return ArmResult(
            environment=environment,
            arm=name,
            group=group,
            test_accuracy_percent=interval(28 + gain, 1.5),
            mean_return=interval(episode_return),
            gain_over={other: interval(gain - ARMS[other][1], 1.8) for other in others},
            return_over={other: interval(episode_return - ARMS[other][2]) for other in others},
            seed_params=params,
            growth_factor=1 + params / 422,
            train_gflops=12.3,
            num_diverged=0,
        )

    return Evaluation(
        dataset="demo",
        version=1,
        verdict=Level.PASS,
        arms=tuple(arm(environment, name) for environment in environments for name in ARMS),
        best_fixed=tuple(
            BestFixed(
                environment=environment,
                schedule="conv_heavy-s0+1-e0",
                description="conv_heavy in slots 0, 1 at epoch 0",
                selection_return=2.3,
                num_candidates=18,
                num_selection_seeds=4,
            )
            for environment in environments
        ),
        controls=tuple(
            ControlResult(
                environment=environment, name="best fixed gain (points)", value=28.1, low=10, high=100, passed=passed
            )
            for environment in environments
        ),
        created_at="2026-01-01T00:00:00+00:00",
        wall_s=71.0,
    )


def verdict(version):
    def check(name, level, message, environment="digits-gap", value=0.031, remedy=""):
        return CheckResult(
            name=name,
            environment=environment,
            level=level,
            value=value,
            warn_threshold=0.05,
            block_threshold=0.02,
            message=message,
            remedy=remedy,
        )

    return Verdict(
        dataset=version.manifest.dataset,
        version=version.manifest.number,
        digest=version.manifest.digest,
        checked_at="2026-01-01T00:00:00+00:00",
        checks=(
            check("legal_transitions", Level.PASS, "0 of 6,200 steps leave the lifecycle", value=0.0),
            check(
                "action_coverage",
                Level.WARN,
                "FOSSILIZE is 3.1 % of the steps where it was valid <not 5 %>",
                remedy="add explorers, or replicates of a behaviour that fossilizes",
            ),
            check("effective_sample_size", Level.REPORT, "per-horizon effective sample size", value=None),
        ),
    )


def write_events(folder, *, policies=("bc", "iql", "cql"), garbage=False):
    folder.mkdir(parents=True, exist_ok=True)
    events = [Event(kind=EventKind.RUN_STARTED, time="2026-01-01T00:00:00.000+00:00", run="r", data={})]
    generator = np.random.default_rng(0)
    for offset, policy in enumerate(policies):
        for step in range(0, 2000, 40):
            data = {"policy": policy, "step": step, "loss": 2.1 * 0.998**step + 0.1 * generator.random()}
            data |= {
                "valid_loss": data["loss"] + 0.1,
                "policy_entropy": 1 + 0.001 * step,
                "q_mean": step / (1 + offset),
            }
            events.append(Event(kind=EventKind.TRAIN_STEP, time="2026-01-01T00:01:00.000+00:00", run="r", data=data))
    for step in range(10):
        data = {"policy": "ppo", "step": step, "mean_return": 1 + 0.1 * step, "kl_to_offline": 0.01 * step, "note": "x"}
        events.append(Event(kind=EventKind.PPO_UPDATE, time="2026-01-01T00:02:30.000+00:00", run="r", data=data))
    lines = [event.model_dump_json() for event in events]
    if garbage:
        lines.append('{"kind": "train.st')
    (folder / "events-1.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    behaviours = ("baseline", "random", "anti-kasmina", "periodic", "schedule-sampler")
    for environment in ("digits-gap", "digits-baseline"):
        dataset.commit(factories.synthetic_tables(environment=environment, behaviours=behaviours, horizon=20))
    dataset.commit(
        factories.synthetic_tables(
            behaviours=("never-act", "random", "heuristic"), epsilons=(0.0,), horizon=20, role="evaluation"
        )
    )
    provenance = {
        "matrix": {"name": "demo"},
        "machine": {"cpu": "EPYC", "cores": 2},
        "rewards": {"digits-gap": {"rent_points": 3.0}},
    }
    return dataset.seal(matrix_id="0123456789abcdef", provenance=provenance)


@pytest.fixture(scope="module")
def full_page(version, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_events(run, garbage=True)
    version.write_verdict(verdict(version))
    return build_report(version, evaluation=evaluation(), events=run, out=run / "sub" / "report.html").read_text()


class Page(HTMLParser):
    """Collects what matters: ids, images, links to elsewhere, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.images, self.targets, self.text = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.targets += [values[name] for name in ("src", "href") if name in values]
        self.images += [values] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"unbalanced {tag}"

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_well_formed_document_that_loads_nothing(full_page):
    page = Page(full_page)
    assert page.open == []
    assert {"findings", "ran", "verdict", "comparison", "traces", "learning", "actions"} <= set(page.ids)
    assert all(target.startswith(("#", "data:")) for target in page.targets)
    assert "<script" not in full_page
    assert "@import" not in full_page
    assert "url(" not in full_page


def test_every_image_is_inlined_svg_with_words_for_those_who_cannot_see_it(full_page):
    images = Page(full_page).images
    assert len(images) == 3 + 2 * 4 + (3 * 4 + 2) + 2
    for image in images:
        assert len(image["alt"]) > 20
        svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in svg
        assert b"http://www.w3.org" in svg


def test_the_page_says_what_ran(full_page, version):
    text = " ".join(Page(full_page).text)
    assert version.manifest.digest in text
    for words in (
        "demo@1",
        "demo (0123456789abcdef)",
        "EPYC, 2 cores",
        "synthetic",
        "2.5 min",
        "host epochs",
        "asked for",
    ):
        assert words in text


def test_every_check_of_the_verdict_is_shown_worst_first_and_escaped(full_page):
    assert "&lt;not 5 %&gt;" in full_page
    order = [full_page.index(name) for name in ("action coverage", "legal transitions", "effective sample size")]
    assert order == sorted(order)
    assert "add explorers" in full_page


def test_the_findings_say_plainly_what_is_decided_and_what_is_not(full_page):
    text = " ".join("".join(Page(full_page).text).split())
    assert (
        "iql: its return is higher than never-act (+2.41) and heuristic (+2.46); "
        "not distinguishable from best-fixed (+0.01)." in text
    )
    assert (
        "bc: its return is higher than never-act (+0.80) and heuristic (+0.85); lower than best-fixed (−1.60)." in text
    )
    assert "All 2 controls passed." in text


def test_a_failed_control_is_an_alarm_at_the_top(version, tmp_path):
    html = build_report(
        version, evaluation=evaluation(passed=False), events=tmp_path, out=tmp_path / "r.html"
    ).read_text()
    assert html.index("2 of 2 controls failed") < html.index('id="ran"')
    assert ">fail<" in html


def test_a_version_alone_is_enough_for_a_report(version, tmp_path):
    html = build_report(version, evaluation=None, events=tmp_path / "nowhere", out=tmp_path / "r.html").read_text()
    assert "No evaluation has been made yet" in html
    assert "hold no training" in html
    assert Page(html).open == []


def test_the_report_is_the_same_bytes_twice(version, tmp_path):
    write_events(tmp_path, policies=())
    pages = [
        build_report(version, evaluation=evaluation(("digits-gap",)), events=tmp_path, out=tmp_path / f"{i}.html")
        for i in range(2)
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_where_the_page_cannot_be_written_the_error_names_the_file(version, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the report"):
        build_report(version, evaluation=None, events=tmp_path, out=tmp_path / "file" / "report.html")


def test_learning_curves_are_read_from_events_and_broken_lines_counted(tmp_path):
    write_events(tmp_path, garbage=True)
    nan = {"kind": "train.step", "time": "2026-01-01T00:01:00+00:00", "run": "r", "data": {"policy": "bc", "step": 9}}
    (tmp_path / "events-2.jsonl").write_text(json.dumps(nan) + "\n")
    found = report_data.read_telemetry(tmp_path)
    assert list(found.curves) == ["bc", "iql", "cql", "ppo"]
    assert set(found.curves["ppo"]) == {"mean_return", "kl_to_offline"}
    assert len(found.curves["bc"]["loss"]) == 50
    assert (found.wall_s, found.num_unreadable) == (150.0, 1)


def test_shared_host_epochs_are_counted_once_and_trunks_always(version):
    work = report_data.read_work(version)
    steps = version.table("steps", columns=["env_seed", "host_key", "step"]).to_pylist()
    ridden = {(row["env_seed"], row["host_key"], row["step"]) for row in steps if row["step"] > 0}
    assert len(ridden) <= work.epochs_computed < work.epochs_asked
    roots = {(row["env_seed"], row["host_key"]) for row in steps if row["step"] == 0}
    missing = {(*root, step) for root in roots for step in range(1, 21)} - ridden
    assert work.epochs_computed == len(ridden) + len(missing)


def test_action_shares_add_up_to_one_among_unforced_decisions(version):
    shares = report_data.read_action_shares(version)
    assert set(shares) == {"digits-gap", "digits-baseline"}
    for actors in shares.values():
        for ops in actors.values():
            assert sum(ops.values()) == pytest.approx(1.0)
    assert shares["digits-gap"]["never-act"]["WAIT"] == 1.0


def test_one_cohort_per_environment_and_role_is_traced_with_its_actions(version):
    traces = report_data.read_traces(version)
    assert [(trace.environment, trace.role) for trace in traces] == [
        ("digits-baseline", "data"),
        ("digits-gap", "evaluation"),
        ("digits-gap", "data"),
    ]
    for trace in traces:
        assert len(trace.trunk) == 21
        assert any(episode.actions for episode in trace.episodes)
        assert all(len(episode.accuracy) == 21 for episode in trace.episodes)


def test_a_row_of_the_table_has_a_cell_per_heading_and_two_lines_with_an_interval():
    rows = comparison_table(evaluation(), "digits-gap")
    assert [row[0] for row in rows] == list(ARMS)
    assert {len(row) for row in rows} == {len(HEADINGS)}
    assert rows[0][2] == "–"
    assert rows[3][2] == "+28.1\n+26.3 … +29.9"
    assert rows[3][8] == "1,510\n×4.58"
    assert len(findings(evaluation(), "digits-gap")) == 3


@pytest.mark.parametrize(("value", "text"), [(-0.04, "0.0"), (0.04, "0.0"), (-1.25, "−1.2"), (3.0, "+3.0")])
def test_numbers_have_a_proper_minus_and_no_signed_zero(value, text):
    assert number(value, 1, signed=True) == text


def test_intervals_are_the_mean_over_the_ends():
    assert interval_text(interval(-1.0, 2.0)) == "−1.0\n−3.0 … +1.0"


def test_labels_are_spread_apart_in_order_and_stay_near():
    values = [5.0, 5.1, 0.0, 5.05, 9.0]
    placed = spread(values, 1.0)
    order = np.argsort(values)
    assert (np.diff(np.array(placed)[order]) >= 1.0 - 1e-9).all()
    assert (placed[2], placed[4]) == (0.0, 9.0)
    assert np.mean([placed[i] for i in (0, 1, 3)]) == pytest.approx(5.05)
    assert spread([], 1.0) == []


def test_wide_words_can_wrap(full_page):
    assert "overflow-wrap: anywhere" in full_page
    assert not re.search(r"min-width: \d{4}", full_page)
