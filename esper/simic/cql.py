"""Conservative Q-learning on the tree."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from esper.leyline.keys import derive_seed
from esper.simic.batches import Transitions
from esper.simic.learning import Fitted, LearnerSpec, OnLog, Stepper, track
from esper.simic.replay import Batch, Replay
from esper.simic.returns import n_step
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import TreeNet, seeded


class CqlRecipe(LearnerSpec):
    r"""Conservative Q-learning, CQL(rho), for an additive Q over the valid leaves of the tree.

        y = R_n + gamma**n (1 - done) Qbar(s', argmax_a' Q(s', a'))        (double Q; argmax over valid actions)
        L = E (Q(s, a) - y)**2 + alpha E [ log sum_a rho(a | s) exp Q(s, a) - Q(s, a) ]

    both exact on the tree. `prior`: `hierarchical` takes rho = u, uniform over valid ops, then slots, then levers;
    `leaves` weighs every leaf with 1, the textbook CQL(H), under which thousands of GERMINATE leaves against one WAIT
    make the penalty an argument about their number. A forced row has no penalty under either. The policy is the best
    action; sampled, every choice is a softmax of the best value below it over `temperature`.
    Reference: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", NeurIPS 2020;
    van Hasselt, Guez, Silver 2016 (double Q).

    Attributes:
        alpha: Weight of the penalty; 0 is double Q-learning.
        n_step: Rewards before the bootstrap.
        gamma: Discount; 1 since the clock is observed.
        polyak: Rate at which the slow copy follows.
        temperature: Of the sampled policy, in units of return.
    """

    steps: Annotated[int, Field(ge=1)] = 2000
    alpha: Annotated[float, Field(ge=0)] = 0.5
    prior: Literal["hierarchical", "leaves"] = "hierarchical"
    n_step: Annotated[int, Field(ge=1)] = 5
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    polyak: Annotated[float, Field(gt=0, le=1)] = 0.005
    temperature: Annotated[float, Field(gt=0)] = 0.1


def conservative_gap(entries_NT: Tensor, batch: Batch, prior: Literal["hierarchical", "leaves"]) -> Tensor:
    """Return log sum_a rho(a | s) exp Q(s, a) - Q(s, a of the data), [N]."""
    chosen = tree_torch.path_sum(entries_NT, batch.action)
    if prior == "hierarchical":
        uniform = tree_torch.log_softmax(torch.zeros_like(entries_NT), batch.mask)
        entries_NT = entries_NT + uniform.masked_fill(~batch.mask, 0.0)
    return tree_torch.logsumexp(entries_NT, batch.mask) - chosen


def double_q_target(online: TreeNet, slow: TreeNet, batch: Batch) -> Tensor:
    """Return R_n + discount * Qbar(s', argmax Q(s', .)), [N], without gradient."""
    with torch.no_grad():
        best = tree_torch.argmax(online(batch.next_obs), batch.next_mask)
        return batch.reward + batch.discount * tree_torch.path_sum(slow(batch.next_obs), best)


def cql_losses(online: TreeNet, slow: TreeNet, batch: Batch, recipe: CqlRecipe) -> tuple[Tensor, Tensor]:
    """Return the temporal-difference loss and the mean penalty (without alpha)."""
    entries = online(batch.obs)
    error = tree_torch.path_sum(entries, batch.action) - double_q_target(online, slow, batch)
    return error.square().mean(), conservative_gap(entries, batch, recipe.prior).mean()


def fit_cql(train: Transitions, held_out: Transitions, recipe: CqlRecipe, *, seed: int, on_log: OnLog) -> Fitted:
    """Return the Q network after all steps.

    Args:
        train: One-step training rows, forced ones included.
        held_out: Rows of held-out environment seeds; may be empty.
        recipe: What to do.
        seed: Keys the initial weights and the minibatches.
        on_log: Receives step, td_loss, penalty and their held-out values.
    """
    with seeded(derive_seed("policy", seed)):
        return _fit_cql(train, held_out, recipe, seed, on_log)


def _fit_cql(train: Transitions, held_out: Transitions, recipe: CqlRecipe, seed: int, on_log: OnLog) -> Fitted:
    spec = recipe.network.model_copy(update={"head": "values", "temperature": recipe.temperature})
    online = TreeNet(spec)
    online.encoder.normaliser.fit(torch.from_numpy(train.obs_MV[train.state_N]))
    slow = deepcopy(online).eval()
    replay = Replay(
        n_step(train, recipe.n_step, recipe.gamma),
        key=("cql", seed),
        weighting=recipe.weighting,
        temperature=recipe.weighting_temperature,
    )
    check = None
    if len(held_out):
        check = Replay(n_step(held_out, recipe.n_step, recipe.gamma), key=("cql", seed)).rows()
    stepper = Stepper(
        online.parameters(), learning_rate=recipe.learning_rate, clip=recipe.gradient_clip, steps=recipe.steps
    )
    metrics: dict[str, float] = {}
    for step in range(1, recipe.steps + 1):
        td, penalty = cql_losses(online, slow, replay.sample(recipe.batch_size), recipe)
        stepper.step(td + recipe.alpha * penalty, "Q")
        track(slow, online, recipe.polyak)
        if step % recipe.log_every == 0 or step == recipe.steps:
            metrics = {"step": float(step), "td_loss": float(td.detach()), "penalty": float(penalty.detach())}
            if check is not None:
                online.eval()
                with torch.no_grad():
                    held_td, held_penalty = cql_losses(online, slow, check, recipe)
                online.train()
                metrics |= {"held_out_td_loss": float(held_td), "held_out_penalty": float(held_penalty)}
            on_log(metrics)
    return Fitted(online.eval(), metrics)
