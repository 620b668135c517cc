"""Training against a verdict: refused without a reason; with one, the reason is stored and printed from then on."""

import pytest
from factories import synthetic_tables

from esper.karn.overrides import overrides_of
from esper.karn.store import open_store
from esper.leyline.errors import HealthError, SpecError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.verdict import CheckResult, Level, Use, Verdict
from esper.simic.bc import BcRecipe
from esper.simic.iql import IqlRecipe
from esper.simic.training import train
from esper.tamiyo.checkpoints import CARD, read_card
from esper.tamiyo.networks import NetworkSpec

TINY = {"network": NetworkSpec(hidden=16, slot_hidden=8), "steps": 2, "batch_size": 16, "log_every": 2}
BC, IQL = BcRecipe(**TINY), IqlRecipe(**TINY, value_steps=2)


@pytest.fixture
def version(tmp_path):
    dataset = open_store(tmp_path / "store").dataset("small")
    dataset.commit(synthetic_tables(num_env_seeds=4, behaviours=("baseline",)))
    return dataset.seal(matrix_id="test", provenance={})


@pytest.fixture
def run(version, tmp_path):
    rewards = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}

    def run(algorithm, reason, name="p"):
        recipe = {"bc": BC, "iql": IQL}[algorithm]
        options = {"rewards": rewards, "seed": 0, "recipe": recipe, "on_log": lambda values: None}
        train(algorithm, version, out=tmp_path / name, name=name, override_health=reason, **options)
        return read_card(tmp_path / name)

    return run


def block(version, *uses):
    check = CheckResult(name="c", environment="all", level=Level.BLOCK, value=0.0, message="too few", uses=uses)
    return Verdict(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        checked_at="2026-01-01T00:00:00Z",
        checks=(check,),
    )


@pytest.mark.parametrize("checked", [True, False])
def test_with_a_reason_training_goes_ahead_and_card_and_version_keep_it(version, run, checked):
    if checked:
        version.write_verdict(block(version, *Use))
    with pytest.raises(HealthError, match="--override-health REASON"):
        run("iql", None)
    assert overrides_of(version) == []
    card = run("iql", "to see how far it gets")
    level = Level.BLOCK if checked else None
    assert (card.unchecked, card.override_reason, card.verdict) == (True, "to see how far it gets", level)
    (kept,) = overrides_of(version)
    assert (kept.use, kept.level, kept.reason, kept.by) == (Use.OFFLINE_RL, level, "to see how far it gets", "p")
    assert kept.digest == version.manifest.digest


def test_a_reason_that_was_not_needed_is_not_an_override(version, run):
    version.write_verdict(block(version, Use.OFFLINE_RL))
    card = run("bc", "just in case")  # blocked for another use
    assert (card.unchecked, card.override_reason, card.verdict) == (False, None, Level.PASS)
    assert overrides_of(version) == []


def test_an_empty_reason_trains_nothing(version, run, tmp_path):
    with pytest.raises(SpecError, match="the reason"):
        run("bc", " ")
    assert not (tmp_path / "p").exists()


def test_the_same_override_gives_the_same_card(version, run, tmp_path):
    run("bc", "to test", name="p")
    first = (tmp_path / "p" / CARD).read_bytes()
    run("bc", "to test", name="p")
    assert (tmp_path / "p" / CARD).read_bytes() == first
    assert len(overrides_of(version)) == 2
