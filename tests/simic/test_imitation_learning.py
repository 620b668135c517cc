"""The imitation policy learns, from the rows it should, and is judged on rows that had no part in it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import concat_tables, synthetic_tables
from safetensors.torch import save
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight

from esper.karn.store import open_store
from esper.leyline.actions import TREE_WIDTH, Op
from esper.leyline.errors import SpecError
from esper.leyline.imitation import ActionClass, Confusion, class_mask, classes_of
from esper.leyline.keys import numpy_generator
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.views import get_view
from esper.simic.batches import Transitions, from_steps
from esper.simic.imitation import (
    ALL_DECISIONS,
    CHOICES,
    ImitateRecipe,
    class_weights,
    fit_imitation,
    load_demonstrations,
)
from esper.simic.resume import Progress
from esper.tamiyo.imitation import class_logits
from esper.tamiyo.networks import single_thread

REWARDS = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}
OP_OF = np.array([Op.WAIT, Op.GERMINATE, Op.ADVANCE, Op.PRUNE])
FAST = ImitateRecipe(steps=250, batch_size=64, learning_rate=5e-3, log_every=50)


@pytest.fixture(autouse=True)
def _one_thread():
    with single_thread():
        yield


def quiet(values: dict[str, float]) -> None:
    assert all(np.isfinite(value) for value in values.values())


def separable(num: int = 3000, seed: int = 0) -> Transitions:
    """Decisions that a plateau, a stage and an improvement settle, 94 % of them WAIT; every tenth row is forced."""
    rng = numpy_generator("separable", seed)
    obs = rng.normal(size=(num, 27)).astype(np.float32)
    obs[:, 1] *= 3000.0  # global steps, as they come
    code = rng.choice(4, size=num, p=[0.94, 0.02, 0.03, 0.01])
    obs[:, 8] = np.where(code == 1, 4, 0) + rng.uniform(0, 1, num)
    obs[:, 22] = np.where(code == 2, 6, 3) * (code != 1)
    obs[:, 25] = np.where(code == 3, -3, 1) + rng.uniform(-1, 1, num)
    forced = (np.arange(num) % 10 == 9) & (code == 0)
    mask = np.ones((num, TREE_WIDTH), dtype=bool)
    mask[forced] = np.arange(TREE_WIDTH) == Op.WAIT
    action = np.zeros((num, 8), dtype=np.int8)
    action[:, 0] = OP_OF[code]
    index = np.arange(num)
    return Transitions(
        view="v1", environments=("x",), obs_MV=obs, mask_MT=mask, state_N=index, next_N=index, action_NA=action,
        reward_N=np.zeros(num), discount_N=np.zeros(num), forced_N=forced, env_seed_N=index // 10 % 20,
        environment_N=np.zeros(num, dtype=np.int64), episode_N=index // 10, return_N=np.zeros(num),
        logp_N=np.zeros(num),
    )  # fmt: skip


def split(data: Transitions) -> tuple[Transitions, Transitions]:
    held = data.env_seed_N < 4
    return data.select(~held), data.select(held)


def weights(network: torch.nn.Module) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})


def test_class_weights_are_scikit_learns_balanced_ones():
    codes = np.array([0] * 90 + [1] * 7 + [3] * 3)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=codes)
    np.testing.assert_allclose(class_weights(codes)[[0, 1, 3]], expected)
    assert class_weights(codes)[2] == 0.0


def test_a_separable_rule_is_learned_and_held_out_counts_are_those_of_scikit_learn():
    train, held = split(separable())
    fitted = fit_imitation(train, held, FAST, seed=0, on_log=quiet)
    choices = Confusion.from_metrics(fitted.metrics, CHOICES)
    assert choices.accuracy > 0.95
    assert choices.balanced_accuracy > 0.95
    right = classes_of(held.action_NA)
    logits = class_logits(fitted.network, held.obs_MV[held.state_N])
    allowed = class_mask(held.mask_MT[held.state_N])
    predicted = np.where(allowed, logits, -np.inf).argmax(axis=1)
    choice = ~held.forced_N
    assert choices.total == choice.sum()
    assert fitted.metrics[f"{CHOICES}_accuracy"] == pytest.approx(accuracy_score(right[choice], predicted[choice]))
    assert fitted.metrics[f"{CHOICES}_balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(right[choice], predicted[choice])
    )
    everything = Confusion.from_metrics(fitted.metrics, ALL_DECISIONS)
    forced = int(held.forced_N.sum())
    assert everything.total == choices.total + forced
    wait = ActionClass.WAIT
    assert everything.counts[wait][wait] == choices.counts[wait][wait] + forced  # the mask makes forced rows right


def test_the_weights_of_rare_classes_outweigh_their_rarity():
    """Where nothing can be learned an unweighted policy always waits: 94 % of the decisions are WAIT."""
    data = separable()
    noise = numpy_generator("noise").normal(size=data.obs_MV.shape).astype(np.float32)
    train, held = split(replace(data, obs_MV=noise))
    fitted = fit_imitation(train, held, FAST.model_copy(update={"steps": 100}), seed=0, on_log=quiet)
    found = Confusion.from_metrics(fitted.metrics, CHOICES)
    assert found.num_predicted(ActionClass.WAIT) / found.total < 0.85 < 0.94


def test_the_same_seed_gives_the_same_bytes_and_held_out_or_forced_rows_have_no_part_in_them():
    train, held = split(separable(1000))
    recipe = FAST.model_copy(update={"steps": 60})
    first = weights(fit_imitation(train, held, recipe, seed=0, on_log=quiet).network)
    torch.manual_seed(5)
    assert weights(fit_imitation(train, held, recipe, seed=0, on_log=quiet).network) == first
    assert (
        weights(fit_imitation(train, held.select(held.env_seed_N == 0), recipe, seed=0, on_log=quiet).network) == first
    )
    assert weights(fit_imitation(train.select(~train.forced_N), held, recipe, seed=0, on_log=quiet).network) == first
    assert weights(fit_imitation(train, held, recipe, seed=1, on_log=quiet).network) != first


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    train, held = split(separable(1000))
    recipe = FAST.model_copy(update={"steps": 120, "log_every": 20, "patience": 3})
    whole = fit_imitation(train, held, recipe, seed=0, on_log=quiet)

    def killed(values: dict[str, float]) -> None:
        if values["step"] == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_imitation(train, held, recipe, seed=0, on_log=killed, progress=Progress(tmp_path / "p", 25))
    steps: list[float] = []
    again = fit_imitation(
        train, held, recipe, seed=0, on_log=lambda values: steps.append(values["step"]),
        progress=Progress(tmp_path / "p", 25),
    )  # fmt: skip
    assert steps[0] == 60
    assert weights(again.network) == weights(whole.network)
    assert again.metrics == whole.metrics


def test_patience_stops_where_the_seeds_set_aside_get_no_better():
    train, held = split(separable(600, seed=3))
    noise = numpy_generator("noise").normal(size=train.obs_MV.shape).astype(np.float32)
    train = replace(train, obs_MV=noise)  # nothing to learn: more steps only learn rows by heart
    seen: list[float] = []
    recipe = FAST.model_copy(update={"log_every": 10, "patience": 2})
    fitted = fit_imitation(train, held, recipe, seed=0, on_log=lambda values: seen.append(values["step"]))
    assert seen[-1] < recipe.steps
    assert fitted.metrics["chosen_step"] == seen[-1] - 20


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("small")
    mixed = synthetic_tables(num_env_seeds=5, behaviours=("baseline", "aggressive", "random"), horizon=8)
    dataset.commit(concat_tables(mixed, synthetic_tables(num_env_seeds=5, behaviours=("heuristic",), horizon=8)))
    return dataset.seal(matrix_id="test", provenance={})


def test_only_the_rules_own_decisions_are_demonstrations(version):
    found = load_demonstrations(version, ImitateRecipe(), REWARDS)
    episodes = version.table("episodes", columns=["episode_id", "controller", "epsilon"]).to_pylist()
    wanted = {
        row["episode_id"] for row in episodes if row["controller"] in ("baseline", "heuristic") and row["epsilon"] == 0
    }
    steps = version.table("steps").to_pylist()
    assert (len(wanted), found.view) == (10, "v1")
    assert len(found) == sum(row["episode_id"] in wanted and not row["is_last"] for row in steps)
    ops = sorted(row["op"] for row in steps if row["episode_id"] in wanted and not row["is_last"])
    assert sorted(Op(op).name for op in found.action_NA[:, 0]) == ops
    noisy = load_demonstrations(version, ImitateRecipe(behaviours=("aggressive",), max_epsilon=0.2), REWARDS)
    assert len(noisy) == 2 * 5 * 8


def test_a_version_without_the_behaviour_says_what_it_has(version):
    with pytest.raises(SpecError, match=r"aggressive \(0\), aggressive \(0.2\), baseline"):
        load_demonstrations(version, ImitateRecipe(behaviours=("periodic",)), REWARDS)
    with pytest.raises(SpecError, match="epsilon at most"):
        load_demonstrations(version, ImitateRecipe(behaviours=("random",), max_epsilon=0.5), REWARDS)


def test_a_decision_is_seen_as_the_27_numbers_of_v1(version):
    found = load_demonstrations(version, ImitateRecipe(), REWARDS)
    whole = from_steps(version.table("steps"), "v1", REWARDS)
    assert found.obs_MV.shape[1] == get_view("v1").width == 27
    rows = {row.tobytes() for row in whole.obs_MV}
    assert all(row.tobytes() in rows for row in found.obs_MV)


def test_the_bundled_recipe_is_the_default():
    assert load("recipes", "imitate", ImitateRecipe) == ImitateRecipe()
