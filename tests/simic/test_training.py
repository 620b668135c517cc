"""From a sealed version to a checkpoint: refusals, determinism, and what the card says."""

from pathlib import Path

import pytest
import torch
from factories import synthetic_tables

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.errors import HealthError, SpecError, UnknownNameError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.verdict import CheckResult, Level, Use, Verdict
from esper.simic.bc import BcRecipe, RwbcRecipe
from esper.simic.cql import CqlRecipe
from esper.simic.d3rlpy_backend import D3rlpyRecipe
from esper.simic.iql import IqlRecipe
from esper.simic.ppo import PpoRecipe
from esper.simic.resume import Notes, Progress
from esper.simic.training import RECIPES, load_recipe, total_steps, train
from esper.tamiyo.checkpoints import CARD, WEIGHTS, read_card
from esper.tamiyo.networks import NetworkSpec

REWARDS = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}
TINY = {"network": NetworkSpec(hidden=16, slot_hidden=8), "steps": 4, "batch_size": 16, "log_every": 2}
FAST = {
    "bc": BcRecipe(**TINY),
    "rwbc": RwbcRecipe(**TINY),
    "iql": IqlRecipe(**TINY, value_steps=4),
    "cql": CqlRecipe(**TINY),
}


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("small")
    dataset.commit(synthetic_tables(num_env_seeds=4, behaviours=("baseline",)))
    return dataset.seal(matrix_id="test", provenance={})


def verdict(version: Version, level: Level, uses: tuple[Use, ...]) -> Verdict:
    check = CheckResult(
        name="c", environment="digits-gap", level=level, value=0.0, message="too few ADVANCE", uses=uses
    )
    return Verdict(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        checked_at="2026-01-01T00:00:00Z",
        checks=(check,),
    )


@pytest.mark.parametrize("algorithm", ["bc", "rwbc", "iql", "cql"])
def test_the_same_specification_data_and_seed_give_the_same_bytes(
    version: Version, tmp_path: Path, algorithm: str
) -> None:
    def files(folder: str, seed: int, threads: int) -> list[bytes]:
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        logs: list[dict[str, float]] = []
        out = tmp_path / folder / "p"
        train(
            algorithm, version, rewards=REWARDS, out=out, seed=seed, override_health="a test", recipe=FAST[algorithm],
            on_log=logs.append,
        )  # fmt: skip
        assert any("held_out" in key for key in logs[-1])
        return [(out / name).read_bytes() for name in (CARD, WEIGHTS)]

    first = files("a", 0, 1)
    assert files("b", 0, 2) == first
    assert files("c", 1, 1)[1] != first[1]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["p"]


def test_an_unchecked_version_is_refused_unless_allowed_and_the_card_says_so(version: Version, tmp_path: Path) -> None:
    options = {"rewards": REWARDS, "seed": 0, "recipe": FAST["bc"], "on_log": print}
    with pytest.raises(HealthError, match="never checked"):
        train("bc", version, out=tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
    policy = train("bc", version, out=tmp_path / "p", name="copy", override_health="a test", **options)
    card = read_card(tmp_path / "p")
    assert (policy.name, policy.digest, card.verdict, card.unchecked) == ("copy", card.weights_sha256, None, True)
    assert (card.dataset, card.dataset_digest) == (version.ref, version.manifest.digest)
    assert card.metrics["training_rows"] > card.metrics["held_out_rows"] > 0


def test_a_blocked_version_is_refused_for_the_uses_that_it_is_blocked_for(tmp_path: Path) -> None:
    dataset = open_store(tmp_path / "store").dataset("blocked")
    dataset.commit(synthetic_tables(num_env_seeds=1, behaviours=("baseline",)))
    version = dataset.seal(matrix_id="test", provenance={})
    version.write_verdict(verdict(version, Level.BLOCK, (Use.OFFLINE_RL,)))
    options = {"rewards": REWARDS, "seed": 0, "on_log": print}
    with pytest.raises(HealthError, match="too few ADVANCE"):
        train("iql", version, out=tmp_path / "iql", recipe=FAST["iql"], **options)
    train("bc", version, out=tmp_path / "bc", recipe=FAST["bc"], **options)
    assert (read_card(tmp_path / "bc").verdict, read_card(tmp_path / "bc").unchecked) == (Level.PASS, False)


def test_wrong_algorithms_and_recipes_are_named(version: Version, tmp_path: Path) -> None:
    options = {"rewards": REWARDS, "out": tmp_path / "x", "seed": 0, "override_health": "a test", "on_log": print}
    with pytest.raises(UnknownNameError, match="did you mean 'cql'"):
        train("cqll", version, **options)
    with pytest.raises(SpecError, match="BcRecipe"):
        train("bc", version, recipe=FAST["cql"], **options)
    with pytest.raises(SpecError, match="expected: BcRecipe"):
        train("bc", version, recipe=FAST["rwbc"], **options)
    with pytest.raises(SpecError, match="expected: D3rlpyRecipe"):
        train("iql", version, backend="d3rlpy", recipe=D3rlpyRecipe(algorithm="cql"), **options)
    with pytest.raises(SpecError, match="d3rlpy has no rwbc"):
        train("rwbc", version, backend="d3rlpy", **options)


def test_a_recipe_is_a_file_with_changes_and_names_what_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("steps = 7\nnetwork.hidden = 9\n")
    recipe = load_recipe("iql", "esper", str(path), {"expectile": 0.6, "network": {"slot_hidden": 5}})
    assert recipe == IqlRecipe(steps=7, expectile=0.6, network=NetworkSpec(hidden=9, slot_hidden=5))
    assert total_steps(recipe) == (1500, 7)
    assert total_steps(load_recipe("bc")) == (0, 1500)
    assert load_recipe("cql", "d3rlpy", changes={"alpha": 2.0}).alpha == 2.0
    with pytest.raises(SpecError, match=r"mine.toml\): unknown key 'expectil'; did you mean 'expectile'"):
        load_recipe("iql", "esper", str(path), {"expectil": 0.6})
    with pytest.raises(UnknownNameError, match="did you mean 'cql'"):
        load_recipe("cql", "esper", "cqk")


def test_a_policy_that_is_there_is_kept_and_anything_else_is_trained_again(version: Version, tmp_path: Path) -> None:
    def steps(**changes) -> int:
        logs: list[dict[str, float]] = []
        options = {"rewards": REWARDS, "out": tmp_path / "p", "seed": 0, "override_health": "a test"}
        train(
            "bc", version, **{**options, "recipe": FAST["bc"], "resume": tmp_path / "r", **changes}, on_log=logs.append
        )
        return len(logs)

    assert [steps(), steps()] == [2, 0]
    page = tmp_path / "p" / "README.md"
    page.unlink()
    assert steps() == 0
    assert page.is_file()
    assert steps(resume=None) == 2
    assert steps(seed=1) == 2
    assert steps(seed=1, override_health="another reason") == 2
    weights = tmp_path / "p" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    assert steps(seed=1, override_health="another reason") == 2
    assert not (tmp_path / "r").exists()


def test_the_progress_of_another_recipe_is_not_taken_up(version: Version, tmp_path: Path) -> None:
    Progress(tmp_path / "r", 1, "another").save("policy", 1, {"notes": Notes()})
    options = {"rewards": REWARDS, "out": tmp_path / "p", "seed": 0, "override_health": "a test", "on_log": print}
    with pytest.raises(SpecError, match="choose another --run-name, or delete the folder"):
        train("bc", version, recipe=FAST["bc"], resume=tmp_path / "r", **options)
    assert not (tmp_path / "p").exists()


def test_the_bundled_recipes_are_the_defaults() -> None:
    for name, spec in {**RECIPES, "ppo": PpoRecipe}.items():
        assert load("recipes", name, spec) == spec()
