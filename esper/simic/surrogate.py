"""One update of PPO on the tree: the clipped surrogate of whole actions, the critic, and the recipe of both."""

from __future__ import annotations

from typing import Annotated, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from esper.leyline.actions import OP_SLICE
from esper.leyline.keys import KeyPart, numpy_generator
from esper.leyline.spec_base import Spec
from esper.simic.batches import Floats, Transitions
from esper.simic.learning import Stepper, TrainingError, in_chunks
from esper.simic.replay import Batch, Replay
from esper.simic.returns import generalised_advantages
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import TreeNet, ValueNet

RATIO_TOLERANCE = 1e-4


class PpoRecipe(Spec):
    r"""Masked PPO with an exact KL leash to the policy that it starts from.

        mu = (1 - explore) pi + explore u                                        (executed, in every ratio)
        L  = - E[ min(r A, clip(r, 1 - clip, 1 + clip) A) ] - c_H E[H_norm] + beta E[ KL(pi || pi_start) ]
        r  = mu(a | s) / mu_old(a | s)      of whole actions;  A: GAE, standardised over unforced rows

    H_norm is the entropy of each choice over the log of its number of valid values (`tree_torch.normalised_entropy`);
    KL is exact. Forced rows count for values alone. The critic regresses lambda-returns. References: Schulman et al.
    2017 (PPO) and 2016 (GAE); Huang & Ontanon 2022 (masks in the update); Baker et al. 2022 (KL leash); Zhou et al.
    2024 (critic warm-up).

    Attributes:
        warmup_updates: Updates, of the budget, in which the policy is frozen and the critic alone learns; fewer where
            the critic explains `warmup_explained_variance` of fresh returns before that.
        explore: Share of the hierarchical uniform policy that live episodes are mixed with.
        kl_low, kl_high: beta falls below and rises above this range (nats, mean over unforced rows), by `kl_factor`.
        target_kl: Ends an update's epochs once the policy has moved 1.5 times this far within it.
        gate_updates: Updates over which returns are compared with those of the start; see `esper.simic.gate`.
    """

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epochs: Annotated[int, Field(ge=1)] = 6
    minibatch: Annotated[int, Field(ge=1)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    critic_epochs: Annotated[int, Field(ge=1)] = 20
    gradient_clip: Annotated[float, Field(gt=0)] = 0.5
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.01
    explore: Annotated[float, Field(ge=0, lt=1)] = 0.02
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.1
    kl_low: Annotated[float, Field(ge=0)] = 0.05
    kl_high: Annotated[float, Field(gt=0)] = 0.2
    kl_factor: Annotated[float, Field(gt=1)] = 1.5
    target_kl: Annotated[float, Field(gt=0)] = 0.02
    warmup_updates: Annotated[int, Field(ge=0)] = 2
    warmup_explained_variance: Annotated[float, Field(le=1)] = 0.6
    gate_updates: Annotated[int, Field(ge=1)] = 2


class Critic:
    """V(s) for live episodes, standardised by the returns that it has seen first."""

    def __init__(self, net: ValueNet, recipe: PpoRecipe, key: tuple[KeyPart, ...]) -> None:
        self.net = net
        self.recipe = recipe
        self._generator = numpy_generator("critic", *key)
        self._stepper = Stepper(net.parameters(), learning_rate=recipe.critic_learning_rate, clip=recipe.gradient_clip)
        self._shift: float | None = None
        self._scale = 1.0

    def values(self, obs_MV: Tensor) -> Floats:
        """Return V of states, [M]."""
        if self._shift is None:
            return np.zeros(len(obs_MV))
        standard = in_chunks(lambda part, _: self.net(part), obs_MV, obs_MV).double().numpy()
        return np.asarray(standard * self._scale + self._shift)

    def learn(self, obs_NV: Tensor, target_N: Floats) -> None:
        """Regress the targets, several passes over them."""
        if self._shift is None:
            self._shift, self._scale = float(target_N.mean()), max(float(target_N.std()), 1e-3)
        target = torch.from_numpy((target_N - self._shift) / self._scale).float()
        for _ in range(self.recipe.critic_epochs):
            for rows in _minibatches(self._generator, len(target), self.recipe.minibatch):
                loss = (self.net(obs_NV[rows]) - target[rows]).square().mean()
                self._stepper.step(loss, "the critic")


def fit_critic(transitions: Transitions, critic: Critic, recipe: PpoRecipe) -> tuple[Floats, float]:
    """Return the advantages of live one-step transitions under the critic as it is, [N]; then train it on them.

    The second number is the share of the variance of what really followed (lambda 1) that it foresaw; nan at first.
    """
    value = critic.values(torch.from_numpy(transitions.obs_MV))
    at, after = value[transitions.state_N], value[transitions.next_N]
    advantage = generalised_advantages(transitions, at, after, gamma=recipe.gamma, lam=recipe.lam)
    surprise = generalised_advantages(transitions, at, after, gamma=recipe.gamma, lam=1.0)
    actual = float((surprise + at).var())
    explained = 1.0 - float(surprise.var()) / actual if at.any() and actual > 0 else float("nan")
    critic.learn(torch.from_numpy(transitions.obs_MV[transitions.state_N]), advantage + at)
    return advantage, explained


def behaviour_logp(logp_NT: Tensor, batch: Batch, explore: float) -> Tensor:
    """Return log((1 - explore) pi(a | s) + explore u(a | s)), [N]."""
    own = tree_torch.log_prob(logp_NT, batch.action)
    if explore == 0.0:
        return own
    uniform = tree_torch.log_softmax(torch.zeros_like(logp_NT), batch.mask)
    noise = tree_torch.log_prob(uniform, batch.action) + float(np.log(explore))
    return torch.logaddexp(own + float(np.log1p(-explore)), noise)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return E[min(r A, clip(r) A)]."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


class PolicyUpdate:
    """One update of the policy on the episodes that it has just lived."""

    def __init__(
        self, policy: TreeNet, start: TreeNet, stepper: Stepper, recipe: PpoRecipe, key: tuple[KeyPart, ...]
    ) -> None:
        self.policy, self.start = policy, start
        self.stepper = stepper
        self.recipe = recipe
        self._generator = numpy_generator("ppo", *key)

    def run(self, transitions: Transitions, advantage_N: Floats, kl_coefficient: float) -> dict[str, float]:
        """Move the policy and return what was measured after it.

        Args:
            transitions: Unforced live rows, with the log-probability at which they were acted.
            advantage_N: Their advantages.
            kl_coefficient: beta.

        Raises:
            TrainingError: The ratio at the start is not 1: acting and learning disagree on masks, inputs or noise.
        """
        recipe = self.recipe
        replay = Replay(transitions, key=("ppo",))
        batch = replay.rows()
        old_logp = torch.from_numpy(transitions.logp_N).float()
        self._check_ratio(batch, old_logp)
        spread = max(float(advantage_N.std()), 1e-6)
        advantage = torch.from_numpy((advantage_N - advantage_N.mean()) / spread).float()
        start_logp = in_chunks(self.start.log_policy, cast(Tensor, batch.obs), batch.mask)
        epochs, moved = 0, 0.0
        for _ in range(recipe.epochs):
            for rows in _minibatches(self._generator, len(transitions), recipe.minibatch):
                part = replay.rows(rows.numpy())
                logp = self.policy.log_policy(part.obs, part.mask)
                ratio = (behaviour_logp(logp, part, recipe.explore) - old_logp[rows]).exp()
                gain = clipped_surrogate(ratio, advantage[rows], recipe.clip)
                spread_bonus = tree_torch.normalised_entropy(logp, part.mask).mean()
                leash = tree_torch.kl_divergence(logp, start_logp[rows], part.mask).mean()
                loss = -gain - recipe.entropy_bonus * spread_bonus + kl_coefficient * leash
                self.stepper.step(loss, "the policy")
            epochs += 1
            moved = self._moved(batch, old_logp)
            if moved > 1.5 * recipe.target_kl:
                break
        return {"epochs": float(epochs), "policy_moved_kl": moved, **self._measure(batch, start_logp, old_logp)}

    def _logp(self, batch: Batch) -> Tensor:
        return in_chunks(self.policy.log_policy, cast(Tensor, batch.obs), batch.mask)

    def _check_ratio(self, batch: Batch, old_logp: Tensor) -> None:
        ratio = (behaviour_logp(self._logp(batch), batch, self.recipe.explore) - old_logp).exp()
        worst = float((ratio - 1).abs().nan_to_num(nan=float("inf")).max())
        if worst > RATIO_TOLERANCE:
            raise TrainingError(
                f"before the first step the probability ratio differs from 1 by {worst:.3g}\n"
                f"  expected: at most {RATIO_TOLERANCE}; the live episodes were not acted by the current policy with "
                f"exploration {self.recipe.explore}, or observations or masks changed on the way to the tables"
            )

    def _moved(self, batch: Batch, old_logp: Tensor) -> float:
        """The k3 estimate of KL(old || new), mean over rows."""
        log_ratio = behaviour_logp(self._logp(batch), batch, self.recipe.explore) - old_logp
        return float((log_ratio.exp() - 1 - log_ratio).mean())

    def _measure(self, batch: Batch, start_logp: Tensor, old_logp: Tensor) -> dict[str, float]:
        logp = self._logp(batch)
        ratio = (behaviour_logp(logp, batch, self.recipe.explore) - old_logp).exp()
        ops = logp[:, OP_SLICE].exp()
        return {
            "kl_to_start": float(tree_torch.kl_divergence(logp, start_logp, batch.mask).mean()),
            "entropy": float(tree_torch.entropy(logp, batch.mask).mean()),
            "clip_share": float(((ratio - 1).abs() > self.recipe.clip).float().mean()),
            "wait_share": float(ops[:, 0].mean()),
        }


def _minibatches(generator: np.random.Generator, num: int, size: int) -> list[Tensor]:
    order = torch.from_numpy(generator.permutation(num))
    return [order[first : first + size] for first in range(0, num, size)]
