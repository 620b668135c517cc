"""Each check of each gate opens and closes at its threshold, and the page tells what the code asks."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from esper.kasmina.gates import gate_g1, gate_g2, gate_g3, gate_g5
from esper.kasmina.lifecycle import SlotState
from esper.leyline import gate_thresholds
from esper.leyline.actions import DWELL_EPOCHS
from esper.leyline.stages import COOLDOWN_EPOCHS, Stage

PAGE = (Path(__file__).parents[2] / "docs" / "gates.md").read_text(encoding="utf-8")
NAN = math.nan
BELOW = np.nextafter(0.5, 0)


def slot(stage, epochs=9, dwell=0):
    return SlotState(stage=stage, epochs_in_stage=epochs, blend=0, tempo=0, dwell=dwell, isolation=0)


def g1(stage=Stage.GERMINATED, **facts):
    return gate_g1(slot(stage), **{"shape_kept": True, "within_budget": True, **facts})


def g2(stage=Stage.TRAINING, *, epochs=9, dwell=0, strict=True, **facts):
    good = {"weights_finite": True, "seed_improvement": 0.5, "gradient_vanishing": 0.99, "gradient_ratio": 0.1}
    return gate_g2(slot(stage, epochs, dwell), strict=strict, **{**good, **facts})


def g3(stage=Stage.BLENDING, alpha=1.0):
    return gate_g3(slot(stage), alpha=alpha)


def g5(stage=Stage.HOLDING, *, strict=True, removal_cost=1.0):
    return gate_g5(slot(stage), strict=strict, removal_cost=removal_cost)


GATES = {
    "G1": (g1, {"slot_ready", "shape_kept", "within_budget"}),
    "G2": (g2, {"training", "dwell_reached", "weights_finite", "seed_improvement", "gradient_alive"}),
    "G3": (g3, {"blending", "alpha_full"}),
    "G5": (g5, {"holding", "removal_cost"}),
}


@pytest.mark.parametrize("name", GATES)
def test_at_its_thresholds_a_gate_is_open_and_names_every_check(name):
    ask, checks = GATES[name]
    report = ask()
    assert (report.gate, set(report.passed), report.failed, report.is_open) == (name, checks, (), True)


@pytest.mark.parametrize(
    ("report", "failed"),
    [
        (g1(shape_kept=False), "shape_kept"),
        (g1(within_budget=False), "within_budget"),
        (g2(epochs=2, dwell=DWELL_EPOCHS.index(3)), "dwell_reached"),
        (g2(weights_finite=False), "weights_finite"),
        (g2(weights_finite=False, strict=False), "weights_finite"),
        (g2(seed_improvement=BELOW), "seed_improvement"),
        (g2(gradient_vanishing=1.0), "gradient_alive"),
        (g2(gradient_ratio=np.nextafter(0.1, 0)), "gradient_alive"),
        (g3(alpha=1 - 2e-6), "alpha_full"),
        (g5(removal_cost=np.nextafter(1.0, 0)), "removal_cost"),
    ],
)
def test_just_beyond_its_threshold_a_check_closes_the_gate_and_no_other_check_does(report, failed):
    assert report.failed == (failed,)
    assert not report.is_open


def test_the_dwell_is_reached_in_its_last_epoch():
    for index, epochs in enumerate(DWELL_EPOCHS):
        assert g2(epochs=epochs, dwell=index).is_open
        assert g2(epochs=epochs - 1, dwell=index).failed == ("dwell_reached",)


@pytest.mark.parametrize("unmeasured", ["seed_improvement", "gradient_vanishing", "gradient_ratio"])
def test_what_was_not_measured_closes_a_strict_gate_and_no_permissive_one(unmeasured):
    check = "seed_improvement" if unmeasured == "seed_improvement" else "gradient_alive"
    assert g2(**{unmeasured: NAN}).failed == (check,)
    assert g2(**{unmeasured: NAN}, strict=False).is_open
    assert g5(removal_cost=NAN).failed == ("removal_cost",)
    assert g5(removal_cost=NAN, strict=False).is_open


@pytest.mark.parametrize("stage", list(Stage))
def test_every_gate_opens_from_its_own_stage_alone(stage):
    assert g1(stage).is_open == (stage in (Stage.DORMANT, Stage.GERMINATED))
    assert g2(stage).is_open == (stage is Stage.TRAINING)
    assert g3(stage).is_open == (stage is Stage.BLENDING)
    assert g5(stage).is_open == (stage is Stage.HOLDING)


def test_the_page_names_every_check_under_its_gate_and_every_threshold_with_its_value():
    sections = dict(re.findall(r"^\| (G\d)[^|]*\|.*?\|(.*)$", PAGE, flags=re.MULTILINE))
    for name, (ask, _) in GATES.items():
        told = set(re.findall(r"`(\w+)`", sections[name]))
        assert set(ask().passed) <= told
    thresholds = {name: value for name, value in vars(gate_thresholds).items() if name.isupper()}
    assert thresholds
    for name, value in thresholds.items():
        assert f"| `{name}` | {value:g} |" in PAGE or f"| `{name}` | {value!r} |" in PAGE
    for stage, epochs in COOLDOWN_EPOCHS.items():
        assert f"{stage.name} {epochs}" in PAGE
