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
from esper.simic.learning import Fitted, Follower, LearnerSpec, Loop, OnLog, Stepper, held_out_mean, new_tree_net
from esper.simic.replay import Batch, Replay, Weighting, row_weights, unforced
from esper.simic.resume import Progress
from esper.simic.returns import n_step
from esper.tamiyo.networks import ValueNet, seeded


class IqlRecipe(LearnerSpec):
    r"""Implicit Q-learning with advantage-weighted extraction.

        L_V  = E |tau - 1(u < 0)| u**2,              u = min_k Qbar_k(s, a) - V(s)
        L_Q  = sum_k E (Q_k(s, a) - R_n - gamma**n (1 - done) V(s_(t+n)))**2,          k = 1, 2
        Qbar <- Qbar + polyak (Q - Qbar)
        L_pi = - E_unforced [ w log pi(a | s) ],     w = min(exp(beta A / sigma_A), largest_weight) / mean w

    with A = min_k Qbar_k(s, a) - V(s) and sigma_A its standard deviation. No action outside the data is ever valued, so
    masks matter to the policy alone. The policy is extracted after the values (it does not act on them), with fixed
    weights, so that its held-out loss can choose the step. tau = 0.5 is the one-step variant: V is then the value of
    the behaviour itself, and the policy one step of improvement over it. `patience` watches the held-out L_V + L_Q of
    the values (whose targets move: a small patience stops them early), then the held-out L_pi of the policy.
    References: Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022; Peng et
    al. 2019 (AWR); Brandfonbrener et al. 2021 (one step).

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

    def __init__(self, recipe: IqlRecipe, train: Transitions) -> None:
        super().__init__()
        self.q1, self.q2 = new_tree_net(recipe.network, train), new_tree_net(recipe.network, train)
        self.v = ValueNet(recipe.network)
        self.v.encoder.normaliser.load_state_dict(self.q1.encoder.normaliser.state_dict())
        self.slow1, self.slow2 = deepcopy(self.q1), deepcopy(self.q2)

    def slow_q(self, batch: Batch) -> Tensor:
        """Return min_k Qbar_k(s, a), without gradient."""
        with torch.no_grad():
            both = [net.of_action(net(batch.obs), batch.action) for net in (self.slow1, self.slow2)]
        return torch.minimum(*both)

    def losses(self, batch: Batch, expectile: float) -> tuple[Tensor, Tensor]:
        """Return L_V and L_Q."""
        loss_v = expectile_loss(self.slow_q(batch) - self.v(batch.obs), expectile)
        with torch.no_grad():
            target = batch.reward + batch.discount * self.v(batch.next_obs)
        errors = [net.of_action(net(batch.obs), batch.action) - target for net in (self.q1, self.q2)]
        return loss_v, errors[0].square().mean() + errors[1].square().mean()

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that gradients move."""
        return [p for net in (self.q1, self.q2, self.v) for p in net.parameters()]

    def advantages(self, transitions: Transitions) -> Floats:
        """Return A(s, a) of every transition, [N]."""
        replay = Replay(transitions, key=("iql",), whole_episodes=self.q1.spec.trunk == "gru")
        found_N, start = np.empty(len(transitions)), 0
        with torch.no_grad():
            for part in replay.chunks():
                # Into one array made beforehand: small ones kept between the large ones would hold the heap open.
                stop = start + len(part.action)
                found_N[start:stop] = (self.slow_q(part) - cast(Tensor, self.v(part.obs))).numpy()
                start = stop
        return found_N


def fit_values(
    train: Transitions,
    held_out: Transitions,
    recipe: IqlRecipe,
    *,
    seed: int,
    on_log: OnLog,
    progress: Progress | None = None,
) -> tuple[Values, dict[str, float]]:
    """Return Q and V after `value_steps`, and the last measured losses (held-out ones where there is a hold-out)."""

    def replay_of(rows: Transitions, weighting: Weighting) -> Replay:
        return Replay(
            n_step(rows, recipe.n_step, recipe.gamma),
            key=("iql values", seed),
            weighting=weighting,
            temperature=recipe.weighting_temperature,
            whole_episodes=recipe.network.trunk == "gru",
        )

    with seeded(derive_seed("values", seed)):
        values = Values(recipe, train)
        replay = replay_of(train, recipe.weighting)
        check = replay_of(held_out, "none") if len(held_out) else None
        stepper = Stepper(
            values.trained(), learning_rate=recipe.learning_rate, clip=recipe.gradient_clip, steps=recipe.value_steps
        )
        pairs = ((values.slow1, values.q1), (values.slow2, values.q2))
        followers = [Follower(slow, critic, recipe.polyak) for slow, critic in pairs]

        def update() -> dict[str, float]:
            loss_v, loss_q = values.losses(replay.sample(recipe.batch_size), recipe.expectile)
            stepper.step(loss_v + loss_q, "the values")
            for follower in followers:
                follower.step()
            return {"value_loss": float(loss_v.detach()), "critic_loss": float(loss_q.detach())}

        def measure(rows: Replay) -> tuple[dict[str, float], float]:
            held_v, held_q = held_out_mean(rows, lambda part: values.losses(part, recipe.expectile))
            return {"held_out_value_loss": held_v, "held_out_critic_loss": held_q}, held_v + held_q

        loop = Loop(
            phase="values", recipe=recipe, steps=recipe.value_steps, counter="value_step", chosen="chosen_value_step"
        )
        metrics = loop.run(
            values,
            update,
            None if check is None else lambda: measure(check),
            {"stepper": stepper, "replay": replay},
            on_log=on_log,
            progress=progress,
        )
    metrics.pop("value_step")
    return values.eval(), metrics


def advantage_weights(advantage_N: Floats, recipe: IqlRecipe, spread: float) -> Floats:
    """Return min(exp(beta A / spread), largest_weight), [N], not yet normalised."""
    scaled = recipe.beta * advantage_N / max(spread, 1e-6)
    return np.exp(np.minimum(scaled, np.log(recipe.largest_weight)))


def fit_iql(
    train: Transitions,
    held_out: Transitions,
    recipe: IqlRecipe,
    *,
    seed: int,
    on_log: OnLog,
    progress: Progress | None = None,
) -> Fitted:
    """Return the advantage-weighted policy with the lowest weighted held-out loss.

    Args:
        train: One-step training rows, forced ones included (they count for values).
        held_out: Rows of held-out environment seeds; may be empty.
        recipe: What to do.
        seed: Keys the initial weights and the minibatches.
        on_log: Receives the losses of the values (`value_step`), then of the policy (`step`).
        progress: Where a killed run left off, phases `values` and `policy`; None stores nothing.
    """
    values, metrics = fit_values(train, held_out, recipe, seed=seed, on_log=on_log, progress=progress)
    choices, others = unforced(train), unforced(held_out)
    advantage = values.advantages(choices)
    spread = float(advantage.std())
    weight = advantage_weights(advantage, recipe, spread)
    scale = float(weight.mean())
    metrics["advantage_sd"] = spread
    metrics["weight_ess_share"] = float(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))
    episodes = recipe.network.trunk == "gru"
    replay = Replay(
        choices,
        key=("iql policy", seed),
        weighting=recipe.weighting,
        temperature=recipe.weighting_temperature,
        weight_N=weight / scale,
        whole_episodes=episodes,
    )
    check = None
    if len(others):
        held_weight = advantage_weights(values.advantages(others), recipe, spread) / scale
        held_weight *= row_weights(others, recipe.weighting, recipe.weighting_temperature)
        check = Replay(others, key=("iql policy", seed), weight_N=held_weight, whole_episodes=episodes)
    fitted = clone(replay, check, recipe, seed=seed, on_log=on_log, normalise_on=train, progress=progress)
    return Fitted(fitted.network, metrics | fitted.metrics)
