"""Weighted behaviour cloning of a tree policy: the whole of BC, and the second half of IQL."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.leyline.keys import derive_seed
from esper.simic.batches import Transitions
from esper.simic.learning import CHUNK_ROWS, Fitted, LearnerSpec, OnLog, Stepper, TrainingError
from esper.simic.replay import Batch, Replay
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import TreeNet, seeded


def weighted_nll(policy: TreeNet, batch: Batch) -> Tensor:
    """Return mean over rows of -w log pi(a | s), the joint log-probability of the canonical action."""
    logp = tree_torch.log_prob(policy.log_policy(batch.obs, batch.mask), batch.action)
    return -(batch.weight * logp).mean()


def clone(
    train: Replay, held_out: Replay | None, recipe: LearnerSpec, *, seed: int, on_log: OnLog, normalise_on: Transitions
) -> Fitted:
    """Return the policy with the lowest held-out loss among those measured every `log_every` steps.

    Args:
        train: Unforced training rows with their weights.
        held_out: Unforced rows of held-out environment seeds; without them the last policy is returned.
        recipe: Steps, batch size, rates, network.
        seed: Keys the initial weights and the input noise.
        on_log: Receives step, loss and held_out_loss.
        normalise_on: Where the inputs' mean and sd come from.
    """
    with seeded(derive_seed("policy", seed)):
        return _clone(train, held_out, recipe, on_log=on_log, normalise_on=normalise_on)


def _clone(
    train: Replay, held_out: Replay | None, recipe: LearnerSpec, *, on_log: OnLog, normalise_on: Transitions
) -> Fitted:
    policy = TreeNet(recipe.network)
    policy.encoder.normaliser.fit(torch.from_numpy(normalise_on.obs_MV[normalise_on.state_N]))
    stepper = Stepper(
        policy.parameters(), learning_rate=recipe.learning_rate, clip=recipe.gradient_clip, steps=recipe.steps
    )
    best_loss, best_state, best_step = float("inf"), policy.state_dict(), recipe.steps
    metrics: dict[str, float] = {}
    running = 0.0
    for step in range(1, recipe.steps + 1):
        loss = weighted_nll(policy, train.sample(recipe.batch_size))
        stepper.step(loss, "the policy")
        running += float(loss.detach())
        if step % recipe.log_every and step != recipe.steps:
            continue
        since = (step - 1) % recipe.log_every + 1
        metrics = {"step": float(step), "policy_loss": running / since}
        running = 0.0
        if held_out is not None:
            measured = _mean_loss(policy, held_out)
            metrics["held_out_policy_loss"] = measured
            if measured < best_loss:
                best_loss, best_step = measured, step
                best_state = {name: value.clone() for name, value in policy.state_dict().items()}
        on_log(metrics)
    if held_out is not None:
        if best_loss == float("inf"):
            raise TrainingError("the held-out loss was never finite\n  check the features and masks of the data set")
        policy.load_state_dict(best_state)
        metrics |= {"held_out_policy_loss": best_loss, "chosen_step": float(best_step)}
    return Fitted(policy.eval(), metrics)


def _mean_loss(policy: TreeNet, replay: Replay) -> float:
    rows = replay.rows()
    total = 0.0
    policy.eval()
    with torch.no_grad():
        for start in range(0, len(replay), CHUNK_ROWS):
            part = Batch(*(tensor[start : start + CHUNK_ROWS] for tensor in rows))
            total += float(weighted_nll(policy, part)) * len(part.action)
    policy.train()
    return total / len(replay)
