"""Implicit Q-learning on the tree: values by expectile regression, then one advantage-weighted extraction."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from esper.leyline.keys import derive_seed
from esper.simic.batches import Floats, Transitions
from esper.simic.cloning import clone
from esper.simic.learning import Fitted, LearnerSpec, OnLog, Stepper, in_chunks, track
from esper.simic.replay import Batch, Replay, row_weights, unforced
from esper.simic.returns import n_step
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import TreeNet, ValueNet, seeded


class IqlRecipe(LearnerSpec):
    r"""Implicit Q-learning with advantage-weighted extraction.

        L_V  = E |tau - 1(u < 0)| u**2,              u = min_k Qbar_k(s, a) - V(s)
        L_Q  = sum_k E (Q_k(s, a) - R_n - gamma**n (1 - done) V(s_(t+n)))**2
        Qbar <- Qbar + polyak (Q - Qbar)
        L_pi = - E_unforced [ w log pi(a | s) ],     w = min(exp(beta A / sigma_A), largest_weight) / mean w

    with A = min_k Qbar_k(s, a) - V(s) and sigma_A its standard deviation. No action outside the data is ever valued, so
    masks matter to the policy alone. The policy is extracted after the values (it does not act on them), with fixed
    weights, so that its held-out loss can choose the step. References: Kostrikov, Nair, Levine, "Offline Reinforcement
    Learning with Implicit Q-Learning", ICLR 2022; Peng et al. 2019 (AWR).

    Attributes:
        steps: Gradient steps of the policy.
        value_steps: Gradient steps of Q and V.
        expectile: tau.
        beta: Inverse temperature in standard deviations of the advantage; 0 is behaviour cloning.
        n_step: Rewards before the bootstrap.
        gamma: Discount; 1 since the clock is observed.
    """

    value_steps: Annotated[int, Field(ge=1)] = 1500
    steps: Annotated[int, Field(ge=1)] = 1000
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.7
    beta: Annotated[float, Field(ge=0)] = 3.0
    largest_weight: Annotated[float, Field(ge=1)] = 100.0
    polyak: Annotated[float, Field(gt=0, le=1)] = 0.005
    n_step: Annotated[int, Field(ge=1)] = 5
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Return the mean of |expectile - 1(u < 0)| u**2: least at the expectile of the targets."""
    weight = torch.where(difference < 0, 1.0 - expectile, expectile)
    return (weight * difference.square()).mean()


class Values(nn.Module):
    """Two critics, their slow copies and a state value, with one normalisation."""

    def __init__(self, recipe: IqlRecipe, obs_NV: Tensor) -> None:
        super().__init__()
        self.q1, self.q2 = TreeNet(recipe.network), TreeNet(recipe.network)
        self.v = ValueNet(recipe.network)
        for net in (self.q1, self.q2, self.v):
            net.encoder.normaliser.fit(obs_NV)
        self.slow1, self.slow2 = deepcopy(self.q1), deepcopy(self.q2)

    def slow_q(self, batch: Batch) -> Tensor:
        """Return min_k Qbar_k(s, a), without gradient."""
        with torch.no_grad():
            both = [tree_torch.path_sum(net(batch.obs), batch.action) for net in (self.slow1, self.slow2)]
        return torch.minimum(*both)

    def losses(self, batch: Batch, expectile: float) -> tuple[Tensor, Tensor]:
        """Return L_V and L_Q."""
        loss_v = expectile_loss(self.slow_q(batch) - self.v(batch.obs), expectile)
        with torch.no_grad():
            target = batch.reward + batch.discount * self.v(batch.next_obs)
        errors = [tree_torch.path_sum(net(batch.obs), batch.action) - target for net in (self.q1, self.q2)]
        return loss_v, errors[0].square().mean() + errors[1].square().mean()

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that gradients move."""
        return [p for net in (self.q1, self.q2, self.v) for p in net.parameters()]

    def advantages(self, transitions: Transitions) -> Floats:
        """Return A(s, a) of every transition, [N]."""
        obs = torch.from_numpy(transitions.obs_MV[transitions.state_N])
        action = torch.from_numpy(transitions.action_NA)

        def advantage(part: Tensor, act: Tensor) -> Tensor:
            both = [tree_torch.path_sum(net(part), act) for net in (self.slow1, self.slow2)]
            return torch.minimum(*both) - cast(Tensor, self.v(part))

        return in_chunks(advantage, obs, action).double().numpy()


def fit_values(
    train: Transitions, held_out: Transitions, recipe: IqlRecipe, *, seed: int, on_log: OnLog
) -> tuple[Values, dict[str, float]]:
    """Return Q and V after `value_steps`, and the last measured losses (held-out ones where there is a hold-out)."""
    with seeded(derive_seed("values", seed)):
        return _fit_values(train, held_out, recipe, seed, on_log)


def _fit_values(
    train: Transitions, held_out: Transitions, recipe: IqlRecipe, seed: int, on_log: OnLog
) -> tuple[Values, dict[str, float]]:
    values = Values(recipe, torch.from_numpy(train.obs_MV[train.state_N]))
    replay = Replay(
        n_step(train, recipe.n_step, recipe.gamma),
        key=("iql values", seed),
        weighting=recipe.weighting,
        temperature=recipe.weighting_temperature,
    )
    check = None
    if len(held_out):
        check = Replay(n_step(held_out, recipe.n_step, recipe.gamma), key=("iql values", seed)).rows()
    stepper = Stepper(
        values.trained(), learning_rate=recipe.learning_rate, clip=recipe.gradient_clip, steps=recipe.value_steps
    )
    metrics: dict[str, float] = {}
    for step in range(1, recipe.value_steps + 1):
        loss_v, loss_q = values.losses(replay.sample(recipe.batch_size), recipe.expectile)
        stepper.step(loss_v + loss_q, "the values")
        track(values.slow1, values.q1, recipe.polyak)
        track(values.slow2, values.q2, recipe.polyak)
        if step % recipe.log_every == 0 or step == recipe.value_steps:
            metrics = {"value_loss": float(loss_v.detach()), "critic_loss": float(loss_q.detach())}
            if check is not None:
                values.eval()
                with torch.no_grad():
                    held_v, held_q = values.losses(check, recipe.expectile)
                values.train()
                metrics |= {"held_out_value_loss": float(held_v), "held_out_critic_loss": float(held_q)}
            on_log({"value_step": float(step), **metrics})
    return values.eval(), metrics


def advantage_weights(advantage_N: Floats, recipe: IqlRecipe, spread: float) -> Floats:
    """Return min(exp(beta A / spread), largest_weight), [N], not yet normalised."""
    scaled = recipe.beta * advantage_N / max(spread, 1e-6)
    return np.exp(np.minimum(scaled, np.log(recipe.largest_weight)))


def fit_iql(train: Transitions, held_out: Transitions, recipe: IqlRecipe, *, seed: int, on_log: OnLog) -> Fitted:
    """Return the advantage-weighted policy with the lowest weighted held-out loss.

    Args:
        train: One-step training rows, forced ones included (they count for values).
        held_out: Rows of held-out environment seeds; may be empty.
        recipe: What to do.
        seed: Keys the initial weights and the minibatches.
        on_log: Receives the losses of the values (`value_step`), then of the policy (`step`).
    """
    values, metrics = fit_values(train, held_out, recipe, seed=seed, on_log=on_log)
    choices, others = unforced(train), unforced(held_out)
    advantage = values.advantages(choices)
    spread = float(advantage.std())
    weight = advantage_weights(advantage, recipe, spread)
    scale = float(weight.mean())
    metrics["advantage_sd"] = spread
    metrics["weight_ess_share"] = float(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))
    replay = Replay(
        choices,
        key=("iql policy", seed),
        weighting=recipe.weighting,
        temperature=recipe.weighting_temperature,
        weight_N=weight / scale,
    )
    check = None
    if len(others):
        held_weight = advantage_weights(values.advantages(others), recipe, spread) / scale
        held_weight *= row_weights(others, recipe.weighting, recipe.weighting_temperature)
        check = Replay(others, key=("iql policy", seed), weight_N=held_weight)
    fitted = clone(replay, check, recipe, seed=seed, on_log=on_log, normalise_on=train)
    return Fitted(fitted.network, metrics | fitted.metrics)
