"""Weighted behaviour cloning of a tree policy: the whole of BC and return-weighted BC, and the second half of IQL."""

from __future__ import annotations

from torch import Tensor

from esper.leyline.keys import derive_seed
from esper.simic.batches import Transitions
from esper.simic.learning import Fitted, LearnerSpec, Loop, OnLog, Stepper, held_out_mean, new_tree_net
from esper.simic.replay import Batch, Replay
from esper.simic.resume import Progress
from esper.tamiyo.networks import TreeNet, seeded


def weighted_nll(policy: TreeNet, batch: Batch) -> Tensor:
    """Return mean over rows of -w log pi(a | s), the joint log-probability of the canonical action."""
    logp = policy.log_prob(batch.obs, batch.mask, batch.action)
    return -(batch.weight * logp).mean()


def clone(
    train: Replay,
    held_out: Replay | None,
    recipe: LearnerSpec,
    *,
    seed: int,
    on_log: OnLog,
    normalise_on: Transitions,
    progress: Progress | None = None,
) -> Fitted:
    """Return the policy with the lowest held-out loss among those measured every `log_every` steps.

    Args:
        train: Unforced training rows with their weights.
        held_out: Unforced rows of held-out environment seeds; without them the last policy is returned.
        recipe: Steps, batch size, rates, network.
        seed: Keys the initial weights and the input noise.
        on_log: Receives step, loss and held_out_loss.
        normalise_on: Where the inputs' mean and sd come from.
        progress: Where a killed run left off.
    """
    with seeded(derive_seed("policy", seed)):
        policy = new_tree_net(recipe.network.model_copy(update={"head": "logits"}), normalise_on)
        stepper = Stepper(
            policy.parameters(), learning_rate=recipe.learning_rate, clip=recipe.gradient_clip, steps=recipe.steps
        )

        def update() -> dict[str, float]:
            loss = weighted_nll(policy, train.sample(recipe.batch_size))
            stepper.step(loss, "the policy")
            return {"policy_loss": float(loss.detach())}

        def measure(rows: Replay) -> tuple[dict[str, float], float]:
            (loss,) = held_out_mean(rows, lambda part: [weighted_nll(policy, part)])
            return {"held_out_policy_loss": loss}, loss

        loop = Loop(phase="policy", recipe=recipe, steps=recipe.steps, keep_best=True)
        metrics = loop.run(
            policy,
            update,
            None if held_out is None else lambda: measure(held_out),
            {"stepper": stepper, "replay": train},
            on_log=on_log,
            progress=progress,
        )
    return Fitted(policy.eval(), metrics)
