"""PPO learns a one-decision task from live tables, starts every update at ratio one, and steps back when worse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tree_bandit import REWARD, live_bandit

from esper.leyline.errors import CheckpointError, SpecError
from esper.leyline.identity import SELECTION_START
from esper.leyline.library import load
from esper.leyline.pipelines import PpoSettings
from esper.leyline.specs import EnvironmentSpec
from esper.simic.gate import Gate
from esper.simic.learning import TrainingError
from esper.simic.ppo import FIRST_REPLICATE, cohort_plans, fine_tune
from esper.simic.surrogate import PpoRecipe, clipped_surrogate
from esper.tamiyo.checkpoints import PolicyCard, load_checkpoint, read_card, save_checkpoint
from esper.tamiyo.networks import NetworkSpec, TreeNet, seeded

SPEC = load("environments", "digits-gap", EnvironmentSpec)
NETWORK = NetworkSpec(view="v1", hidden=16, slot_hidden=8)
EAGER = PpoRecipe(
    learning_rate=1e-2, target_kl=0.5, epochs=4, critic_epochs=2, kl_coefficient=0.0, kl_high=50.0, warmup_updates=1,
    entropy_bonus=0.0,
)  # fmt: skip


def start_policy(folder: Path, network: NetworkSpec = NETWORK):
    with seeded(0):
        net = TreeNet(network)
    card = PolicyCard(name="start", algorithm="bc", network=network, recipe={}, rewards={}, training_seed=0)
    return save_checkpoint(folder, net, card)


def tune(folder: Path, start, settings: PpoSettings, recipe: PpoRecipe = EAGER, run=live_bandit):
    logs: list[dict[str, float]] = []
    tables: list[dict] = []
    policy = fine_tune(
        start, settings=settings, recipe=recipe, environments=[(SPEC, REWARD)], run=run, out=folder / "ppo", seed=0,
        on_log=logs.append, on_tables=tables.append,
    )  # fmt: skip
    return policy, logs, tables


@pytest.mark.parametrize("head", ["logits", "values"])
def test_the_return_improves_on_live_episodes_and_the_run_is_reproducible(tmp_path: Path, head: str) -> None:
    start = start_policy(tmp_path / "start", NETWORK.model_copy(update={"head": head, "temperature": 0.1}))
    settings = PpoSettings(updates=8, episodes_per_update=128, env_seeds_per_update=4)
    policy, logs, tables = tune(tmp_path / "a", start, settings)
    assert len(tables) == 8 * 4
    assert [log["update"] for log in logs] == list(range(8))
    assert (logs[0]["frozen"], logs[1]["frozen"]) == (1.0, 0.0)
    assert logs[-1]["return"] > logs[0]["return"] + 0.25
    card = read_card(tmp_path / "a" / "ppo")
    assert (card.algorithm, card.start_digest, card.weights_sha256) == ("ppo", start.digest, policy.digest)
    assert tune(tmp_path / "b", start, settings)[0].digest == policy.digest


def test_the_frozen_policy_is_the_start_and_the_critic_alone_learns(tmp_path: Path) -> None:
    start = start_policy(tmp_path / "start")
    settings = PpoSettings(updates=2, episodes_per_update=8, env_seeds_per_update=2)
    policy, _, _ = tune(tmp_path, start, settings, EAGER.model_copy(update={"warmup_updates": 2}))
    assert policy.digest == start.digest


def test_a_strong_leash_keeps_the_policy_at_its_start(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Gate, "passes", lambda *_: True)  # stepping back would halve the rate and set the leash anew
    start = start_policy(tmp_path / "start")
    settings = PpoSettings(updates=3, episodes_per_update=32, env_seeds_per_update=2)
    _, loose, _ = tune(tmp_path / "loose", start, settings)
    tight = EAGER.model_copy(update={"kl_coefficient": 100.0})
    _, held, _ = tune(tmp_path / "tight", start, settings, tight)
    assert held[-1]["kl_to_start"] < 0.2 * loose[-1]["kl_to_start"]


def test_rows_that_the_current_policy_did_not_act_are_refused(tmp_path: Path) -> None:
    start = start_policy(tmp_path / "start")

    def other_noise(plans):
        episodes = [plan.episodes[0].model_copy(update={"epsilon": 0.5}) for plan in plans]
        return live_bandit([p.model_copy(update={"episodes": (e,) * 8}) for p, e in zip(plans, episodes)])

    settings = PpoSettings(updates=2, episodes_per_update=8, env_seeds_per_update=1)
    with pytest.raises(TrainingError, match="ratio differs from 1"):
        tune(tmp_path, start, settings, run=other_noise)


def test_environment_seeds_never_repeat_and_environments_take_turns(tmp_path: Path) -> None:
    start = start_policy(tmp_path / "start")
    plain = load("environments", "digits-baseline", EnvironmentSpec)
    settings = PpoSettings(updates=3, episodes_per_update=10, env_seeds_per_update=4)
    plans = [p for u in range(3) for p in cohort_plans(start, u, settings, [(SPEC, REWARD), (plain, REWARD)], 0.02)]
    replicates = [plan.replicate for plan in plans]
    assert replicates == list(range(FIRST_REPLICATE, FIRST_REPLICATE + 12))
    assert max(replicates) < SELECTION_START
    assert [plan.environment.name for plan in plans[:3]] == ["digits-gap", "digits-baseline", "digits-gap"]
    assert [len(plan.episodes) for plan in plans[:4]] == [3, 3, 2, 2]
    assert len({episode for plan in plans for episode in plan.episode_ids()}) == 30


def test_bad_starts_and_settings_are_refused(tmp_path: Path) -> None:
    start = start_policy(tmp_path / "start")
    with pytest.raises(SpecError, match="at least one episode on each"):
        tune(tmp_path, start, PpoSettings(episodes_per_update=2, env_seeds_per_update=4))
    with pytest.raises(CheckpointError, match="another policy"):
        tune(tmp_path, start.model_copy(update={"digest": "0" * 64}), PpoSettings())


def test_the_gate_fails_on_clearly_worse_returns_alone() -> None:
    rng = np.random.default_rng(0)
    gate = Gate(window=2)
    gate.note_start({"a": list(rng.normal(1, 0.1, 16)), "b": list(rng.normal(5, 0.1, 16))})
    assert gate.passes({"a": list(rng.normal(1, 0.1, 8))})
    assert gate.passes({"b": list(rng.normal(5.2, 0.1, 8))})
    gate.restart()
    assert not gate.passes({"a": list(rng.normal(0.5, 0.1, 8)), "b": list(rng.normal(4.9, 0.1, 8))})
    gate.restart()
    assert gate.passes({"a": [0.5]})


def test_the_surrogate_clips_gains_and_not_losses() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert clipped_surrogate(ratio, advantage, 0.2).item() == pytest.approx((1.2 - 1.5 + 0.5 - 0.8) / 4)


def test_the_policies_on_the_way_are_kept(tmp_path: Path) -> None:
    start = start_policy(tmp_path / "start")
    tune(tmp_path, start, PpoSettings(updates=2, episodes_per_update=4, env_seeds_per_update=2))
    first, _ = load_checkpoint(tmp_path / "ppo.updates" / "000")
    assert first.spec == NETWORK
