"""Conservative Q-learning on the tree."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from esper.leyline.keys import derive_seed
from esper.simic.batches import Transitions
from esper.simic.learning import Fitted, Follower, LearnerSpec, Loop, OnLog, Stepper, held_out_mean, new_tree_net
from esper.simic.replay import Batch, Replay, Weighting
from esper.simic.resume import Progress
from esper.simic.returns import n_step, returns_to_go
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

    With `monte_carlo_bound` the first term of the penalty is

        max( log sum_a rho(a | s) exp Q(s, a),   log sum_a rho(a | s) exp G(s) )

    G(s) being what the data's episode went on to earn from s: values are pushed down no further than the behaviour's
    own, so that they have the scale of returns. Cal-QL takes max(Q(s, a), G(s)) for each action inside the sum, which
    no factored Q can do exactly; this lower bound of that term is at most log 2 below it.

    `network.form = "listed"` lets all of it range over the actions of the training data alone, as the flat learners of
    `esper.simic.d3rlpy_backend` do. An additive Q else adds up levers that no episode has tried together, where neither
    a reward nor the penalty of any one state corrects the sum (the extrapolation error of Fujimoto, Meger, Precup,
    "Off-Policy Deep Reinforcement Learning without Exploration", ICML 2019). There rho = u is uniform over valid ops,
    then slots, then the listed actions there.

    The network after all steps is the policy, since a held-out temporal difference does not tell which is best. With
    `patience` the held-out L decides instead.
    Reference: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", NeurIPS 2020;
    van Hasselt, Guez, Silver 2016 (double Q); Nakamoto et al., "Cal-QL", NeurIPS 2023 (the bound).

    Attributes:
        alpha: Weight of the penalty; 0 is double Q-learning.
        n_step: Rewards before the bootstrap.
        gamma: Discount; 1 since the clock is observed.
        polyak: Rate at which the slow copy follows.
        temperature: Of the sampled policy, in units of return.
    """

    chooses_by_value = True

    steps: Annotated[int, Field(ge=1)] = 2000
    alpha: Annotated[float, Field(ge=0)] = 0.5
    prior: Literal["hierarchical", "leaves"] = "hierarchical"
    monte_carlo_bound: bool = False
    n_step: Annotated[int, Field(ge=1)] = 5
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    polyak: Annotated[float, Field(gt=0, le=1)] = 0.005
    temperature: Annotated[float, Field(gt=0)] = 0.1


def conservative_gap(network: TreeNet, entries: Tensor, taken_N: Tensor, batch: Batch, recipe: CqlRecipe) -> Tensor:
    """Return log sum_a rho(a | s) exp Q(s, a) - Q(s, a of the data), [N], the first term bounded where asked for."""
    prior = None
    if recipe.prior == "hierarchical":
        prior = tree_torch.log_softmax(entries.new_zeros(batch.mask.shape), batch.mask)
    soft = network.log_sum(entries, batch.mask, prior)
    if recipe.monte_carlo_bound:
        weight = network.log_sum(torch.zeros_like(entries), batch.mask, prior)
        soft = torch.where(batch.forced, soft, torch.maximum(soft, batch.to_go + weight))
    return soft - taken_N


def double_q_target(online: TreeNet, slow: TreeNet, batch: Batch) -> Tensor:
    """Return R_n + discount * Qbar(s', argmax Q(s', .)), [N], without gradient."""
    with torch.no_grad():
        best = slow.at_best(slow(batch.next_obs), online(batch.next_obs), batch.next_mask)
        return batch.reward + batch.discount * best


def cql_losses(online: TreeNet, slow: TreeNet, batch: Batch, recipe: CqlRecipe) -> tuple[Tensor, Tensor]:
    """Return the temporal-difference loss and the mean penalty (without alpha)."""
    entries = online(batch.obs)
    taken = online.of_action(entries, batch.action)
    error = taken - double_q_target(online, slow, batch)
    return error.square().mean(), conservative_gap(online, entries, taken, batch, recipe).mean()


def fit_cql(
    train: Transitions,
    held_out: Transitions,
    recipe: CqlRecipe,
    *,
    seed: int,
    on_log: OnLog,
    progress: Progress | None = None,
) -> Fitted:
    """Return the Q network after all steps; with `patience` the one with the lowest held-out loss.

    Args:
        train: One-step training rows, forced ones included.
        held_out: Rows of held-out environment seeds; may be empty.
        recipe: What to do.
        seed: Keys the initial weights and the minibatches.
        on_log: Receives step, td_loss, penalty and their held-out values.
        progress: Where a killed run left off; None stores nothing.
    """

    def replay_of(rows: Transitions, weighting: Weighting) -> Replay:
        return Replay(
            n_step(rows, recipe.n_step, recipe.gamma),
            key=("cql", seed),
            weighting=weighting,
            temperature=recipe.weighting_temperature,
            to_go_N=returns_to_go(rows, recipe.gamma) if recipe.monte_carlo_bound else None,
            whole_episodes=recipe.network.trunk == "gru",
        )

    with seeded(derive_seed("policy", seed)):
        reads = {"head": "values", "temperature": recipe.temperature}
        online = new_tree_net(recipe.network.model_copy(update=reads), train)
        slow = deepcopy(online).eval()
        replay = replay_of(train, recipe.weighting)
        check = replay_of(held_out, "none") if len(held_out) else None
        stepper = Stepper(
            online.parameters(), learning_rate=recipe.learning_rate, clip=recipe.gradient_clip, steps=recipe.steps
        )
        follower = Follower(slow, online, recipe.polyak)

        def update() -> dict[str, float]:
            td, penalty = cql_losses(online, slow, replay.sample(recipe.batch_size), recipe)
            stepper.step(td + recipe.alpha * penalty, "Q")
            follower.step()
            return {"td_loss": float(td.detach()), "penalty": float(penalty.detach())}

        def measure(rows: Replay) -> tuple[dict[str, float], float]:
            td, penalty = held_out_mean(rows, lambda part: cql_losses(online, slow, part, recipe))
            return {"held_out_td_loss": td, "held_out_penalty": penalty}, td + recipe.alpha * penalty

        metrics = Loop(phase="policy", recipe=recipe, steps=recipe.steps).run(
            online,
            update,
            None if check is None else lambda: measure(check),
            {"slow": slow, "stepper": stepper, "replay": replay},
            on_log=on_log,
            progress=progress,
        )
    return Fitted(online.eval(), metrics)
