"""The imitation policy: from the heuristic's decisions to a classifier of four classes, and how right it is.

Live comparison: `esper.simic.imitation_live`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pyarrow.compute as pc
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from esper.leyline.actions import Bools
from esper.leyline.errors import SpecError
from esper.leyline.identity import Role
from esper.leyline.imitation import NUM_CLASSES, Confusion, classes_of
from esper.leyline.keys import derive_seed
from esper.leyline.rewards import RewardSpec
from esper.leyline.spec_base import Spec
from esper.simic.batches import Floats, Ints, Transitions
from esper.simic.learning import Fitted, LearnerSpec, Loop, OnLog, Stepper
from esper.simic.load_tensors import load_tensors
from esper.simic.replay import Batch, Replay, unforced
from esper.simic.resume import Progress
from esper.simic.splits import held_out_rows
from esper.tamiyo.imitation import ImitationNet, ImitationSpec, choose_classes, class_logits
from esper.tamiyo.networks import seeded

if TYPE_CHECKING:
    from esper.karn.versions import Version

CHOICES = "held_out_choices"
ALL_DECISIONS = "held_out_all"


class ImitateRecipe(Spec):
    r"""Weighted cross-entropy over four classes, WAIT, GERMINATE, ADVANCE (FOSSILIZE too) and PRUNE.

        L = - sum_i w(c_i) log softmax(f(s_i))[c_i] / sum_i w(c_i),    w(c) = N / (C n_c)

    over decisions that were not forced, n_c of the N being of class c and C classes occurring. No mask enters the loss,
    as published; at decision time a class of which no op is valid is passed over. Adam at a constant rate. References:
    "Policy Tamiyo Design"; the weights are those of King and Zeng, "Logistic Regression in Rare Events Data", 2001.

    Attributes:
        network: 27 numbers to four logits.
        behaviours: Controllers whose episodes are imitated; `baseline` and `heuristic` are the same rules.
        max_epsilon: Largest exploration of an episode that is imitated: 0 leaves the rule's own decisions alone.
        steps: Gradient steps.
        batch_size: Rows drawn with replacement per step.
        learning_rate: Adam's.
        log_every: Steps between two measurements on environment seeds set aside from training to choose the weights.
        patience: Measurements without a lower loss before training stops; None takes all steps.
    """

    network: ImitationSpec = ImitationSpec()
    behaviours: Annotated[tuple[str, ...], Field(min_length=1)] = ("baseline", "heuristic")
    max_epsilon: Annotated[float, Field(ge=0, le=1)] = 0.0
    steps: Annotated[int, Field(ge=1)] = 3000
    batch_size: Annotated[int, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    log_every: Annotated[int, Field(ge=1)] = 100
    patience: Annotated[int, Field(ge=1)] | None = None


def load_demonstrations(version: Version, recipe: ImitateRecipe, rewards: Mapping[str, RewardSpec]) -> Transitions:
    """Return the decisions of the behaviours that a recipe imitates, without branches and softened choices.

    Args:
        version: The version.
        recipe: Which behaviours, and their largest epsilon.
        rewards: The reward of each environment by its name.

    Raises:
        SpecError: The version has no such episode.
        IntegrityError: Rows that contradict each other.
    """
    keep = (
        pc.field("controller").isin(list(recipe.behaviours))
        & (pc.field("epsilon") <= recipe.max_epsilon)
        & pc.field("temperature").is_null()
        & pc.field("branch_parent").is_null()
    )
    of_data = pc.field("role") == Role.DATA.value
    if not len(version.table("episodes", columns=["episode_id"], filter=keep & of_data)):
        there = version.table("episodes", columns=["controller", "epsilon"], filter=of_data)
        names = sorted({(row["controller"], row["epsilon"]) for row in there.to_pylist()})
        raise SpecError(
            f"{version.ref} has no episode of {', '.join(recipe.behaviours)} with epsilon at most "
            f"{recipe.max_epsilon:g}\n  it has {', '.join(f'{name} ({epsilon:g})' for name, epsilon in names)}; "
            "name some of them in the recipe's `behaviours`, or raise its `max_epsilon`"
        )
    return load_tensors(version, recipe.network.view, rewards, keep=keep)


def class_weights(class_N: Ints) -> Floats:
    """Return N / (classes that occur * rows of the class) for each class, [C]; 0 for one that does not occur."""
    counts = np.bincount(class_N, minlength=NUM_CLASSES)
    there = np.maximum(np.count_nonzero(counts), 1)
    return np.where(counts > 0, len(class_N) / (there * np.maximum(counts, 1)), 0.0)


def confusion(network: ImitationNet, transitions: Transitions) -> Confusion:
    """Return the classes of the decisions (right) and those that the policy chooses under the masks (predicted)."""
    state = transitions.state_N
    predicted = choose_classes(class_logits(network, transitions.obs_MV[state]), transitions.mask_MT[state])
    return Confusion.of(classes_of(transitions.action_NA), predicted)


def fit_imitation(
    train: Transitions,
    held_out: Transitions,
    recipe: ImitateRecipe,
    *,
    seed: int,
    on_log: OnLog,
    progress: Progress | None = None,
) -> Fitted:
    """Return the imitation policy, and what it gets right on held-out environment seeds.

    The weights are those of the lowest loss on a part of the training seeds that is set aside for that alone, so that
    the held-out ones have no part in anything but the counts that are reported. With fewer than four training seeds
    nothing is set aside and the last weights are returned.

    Args:
        train: Training rows.
        held_out: Rows of held-out environment seeds; may be empty.
        recipe: What to do.
        seed: Keys the initial weights and the minibatches.
        on_log: Receives step, policy_loss and held_out_policy_loss (on the seeds set aside).
        progress: Where to keep what an interrupted run goes on from.

    Returns:
        The network; the metrics hold both held-out confusion matrices (see `Confusion.from_metrics`): of the decisions
        at which there was a choice, and of all of them.

    Raises:
        SpecError: There is no decision to learn from.
        TrainingError: A loss is not finite.
    """
    choices = unforced(train)
    aside: Bools = held_out_rows(choices)
    learned = choices.select(~aside)
    with seeded(derive_seed("policy", seed)):
        network = ImitationNet(recipe.network)
        network.normaliser.fit(torch.from_numpy(learned.obs_MV[learned.state_N]))
        check = Replay(choices.select(aside), key=("imitate", seed)).rows() if aside.any() else None
        metrics = _train(network, learned, check, recipe, seed=seed, on_log=on_log, progress=progress)
    network.eval()
    metrics |= confusion(network, unforced(held_out)).metrics(CHOICES)
    metrics |= confusion(network, held_out).metrics(ALL_DECISIONS)
    return Fitted(network, metrics)


def _train(
    network: ImitationNet,
    learned: Transitions,
    check: Batch | None,
    recipe: ImitateRecipe,
    *,
    seed: int,
    on_log: OnLog,
    progress: Progress | None,
) -> dict[str, float]:
    """Take the gradient steps; the network is left with the weights that were best on the rows to check."""
    replay = Replay(learned, key=("imitate", seed))
    weight_C = torch.from_numpy(class_weights(classes_of(learned.action_NA))).float()
    stepper = Stepper(network.parameters(), learning_rate=recipe.learning_rate, clip=math.inf)

    def update() -> dict[str, float]:
        loss = _loss(network, replay.sample(recipe.batch_size), weight_C)
        stepper.step(loss, "the policy")
        return {"policy_loss": float(loss.detach())}

    def measure(rows: Batch) -> tuple[dict[str, float], float]:
        loss = float(_loss(network, rows, weight_C))
        return {"held_out_policy_loss": loss}, loss

    shared = LearnerSpec(log_every=recipe.log_every, patience=recipe.patience)
    return Loop(phase="policy", recipe=shared, steps=recipe.steps, keep_best=True).run(
        network,
        update,
        None if check is None else lambda: measure(check),
        {"stepper": stepper, "replay": replay},
        on_log=on_log,
        progress=progress,
    )


def _loss(network: ImitationNet, batch: Batch, weight_C: Tensor) -> Tensor:
    classes = torch.from_numpy(classes_of(batch.action.numpy()))
    return cross_entropy(network(batch.obs), classes, weight=weight_C)
