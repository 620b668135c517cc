"""d3rlpy (Seno and Imai, JMLR 2022) as a backend: DiscreteBC, DiscreteCQL and a DiscreteIQL plug-in.

The library trains on flat canonical actions through its own `fit`. The trained network is copied into a `FlatNet`,
which acts, is evaluated and is saved like every other policy, with the tree's masks applied when it decides. What the
library cannot do, and therefore this backend does not do:

- masks while learning: DiscreteCQL's next-state target takes its argmax, and its penalty its logsumexp, over all listed
  actions, valid or not; valid ones compete with others that no state of theirs allows.
- forced decisions: DiscreteIQL's policy loss counts rows at which WAIT was the only choice. DiscreteBC is given the
  others alone.
- weights of trajectories, noise on the inputs, and resuming: a run that was killed starts over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from esper.leyline.keys import derive_seed
from esper.leyline.spec_base import Spec
from esper.simic.batches import Transitions
from esper.simic.d3rlpy_export import import_d3rlpy, library_randomness, mdp_dataset
from esper.simic.flat_actions import FlatActions
from esper.simic.learning import Fitted, OnLog, TrainingError
from esper.simic.replay import CHUNK_ROWS, unforced
from esper.simic.resume import Progress
from esper.tamiyo.flat import FlatNet, FlatSpec
from esper.tamiyo.networks import seeded

FlatAlgorithm = Literal["bc", "iql", "cql"]

_READ_BY: dict[str, tuple[FlatAlgorithm, ...]] = {
    "logit_penalty": ("bc",),
    "gamma": ("iql", "cql"),
    "n_step": ("iql", "cql"),
    "alpha": ("cql",),
    "target_steps": ("cql",),
    "temperature": ("cql",),
    "expectile": ("iql",),
    "beta": ("iql",),
    "polyak": ("iql",),
}


class D3rlpyRecipe(Spec):
    r"""A recipe for one of three algorithms of d3rlpy on flat actions.

        bc:  L = - E_unforced log pi(a | s) + logit_penalty E log pi(. | s)**2            (DiscreteBC)
        cql: L = E Huber(Q(s, a) - y) + alpha E [ log sum_a exp Q(s, a) - Q(s, a) ]       (DiscreteCQL)
             y = R_n + gamma**n (1 - done) Qbar(s', argmax Q(s', .)),  over all listed actions
        iql: see `esper.simic.d3rlpy_iql`                                                 (a plug-in of this project)

    References: Seno, Imai, "d3rlpy: An Offline Deep Reinforcement Learning Library", JMLR 2022; Kumar et al., NeurIPS
    2020 (CQL); Kostrikov et al., ICLR 2022 (IQL).

    Attributes:
        algorithm: bc, iql or cql.
        view: Observation view.
        hidden: Widths of the hidden layers of every network.
        steps: Gradient steps.
        batch_size: Rows drawn with replacement per step.
        learning_rate: Adam's, constant.
        log_every: Steps between two measurements. A last part shorter than that is not trained, so it divides `steps`.
        logit_penalty: Weight of DiscreteBC's penalty on squared log-probabilities (d3rlpy's `beta`). The library's own
            0.5 pushes a policy over hundreds of actions towards uniform.
        gamma: Discount; 1 since the clock is observed.
        n_step: Rewards before the bootstrap.
        alpha: Weight of the conservative penalty.
        target_steps: Steps between two copies of Q to its target.
        temperature: Of the sampled policy, in units of return.
        expectile: tau of the state value.
        beta: Inverse temperature in standard deviations of the advantage; 0 is behaviour cloning.
        polyak: Rate at which the target networks follow.
    """

    algorithm: FlatAlgorithm
    view: Literal["v1", "v3", "v4", "v4-hidden"] = "v4"
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (256, 256)
    steps: Annotated[int, Field(ge=1)] = 2000
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    log_every: Annotated[int, Field(ge=1)] = 100
    logit_penalty: Annotated[float, Field(ge=0)] = 0.0
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    n_step: Annotated[int, Field(ge=1)] = 5
    alpha: Annotated[float, Field(ge=0)] = 0.5
    target_steps: Annotated[int, Field(ge=1)] = 200
    temperature: Annotated[float, Field(gt=0)] = 0.1
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.7
    beta: Annotated[float, Field(ge=0)] = 3.0
    polyak: Annotated[float, Field(gt=0, le=1)] = 0.005

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        if self.steps % self.log_every:
            raise ValueError(f"steps {self.steps} is not a multiple of log_every {self.log_every}")
        for name, readers in _READ_BY.items():
            if self.algorithm not in readers and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not read by {self.algorithm}; it is for {', '.join(readers)}")
        return self


def fit_d3rlpy(
    train: Transitions,
    held_out: Transitions,
    recipe: D3rlpyRecipe,
    *,
    seed: int,
    on_log: OnLog,
    progress: Progress | None = None,
) -> Fitted:
    """Return a flat policy that d3rlpy trained.

    Args:
        train: One-step training rows, forced ones included; the list of actions comes from them.
        held_out: Rows of held-out environment seeds; may be empty. Cloning returns the network with the lowest masked
            held-out loss, as the tree's own does; for the others the last one is returned and the loss is only told.
        recipe: What to do.
        seed: Keys the initial weights and the minibatches.
        on_log: Receives step, d3rlpy's losses and held_out_policy_loss.
        progress: Not used: d3rlpy cannot resume a run to the same bytes, a run that was killed starts over.

    Raises:
        SpecError: Nothing to learn from.
        TrainingError: A loss is not finite.
    """
    cloning = recipe.algorithm == "bc"
    actions = FlatActions.of(train)
    rows = unforced(train) if cloning else train
    network = _new_network(train, actions, recipe)
    inputs = _network_inputs(network, train)
    dataset = mdp_dataset(rows, actions, obs_MV=inputs, n_step=recipe.n_step, gamma=recipe.gamma, chained=not cloning)
    check = _HeldOut(unforced(held_out), actions)
    metrics: dict[str, float] = {"listed_actions": float(len(actions)), "held_out_unlisted": float(check.num_unlisted)}
    best_loss, best_state, best_step = float("inf"), network.state_dict(), recipe.steps
    with library_randomness(derive_seed("d3rlpy", seed)):
        algorithm, module_of = build_algorithm(recipe)
        for epoch, losses in _epochs(algorithm, dataset, recipe):
            step = epoch * recipe.log_every
            _check_finite(losses, recipe, step)
            copy_network(module_of(), network)
            now = {"step": float(step), **losses, **check.measure(network)}
            on_log(now)
            metrics |= now
            if cloning and now.get("held_out_policy_loss", float("inf")) < best_loss:
                best_loss, best_step = now["held_out_policy_loss"], step
                best_state = {name: value.clone() for name, value in network.state_dict().items()}
    if best_loss < float("inf"):
        network.load_state_dict(best_state)
        metrics |= {"held_out_policy_loss": best_loss, "chosen_step": float(best_step)}
    return Fitted(network.eval(), metrics)


def _new_network(train: Transitions, actions: FlatActions, recipe: D3rlpyRecipe) -> FlatNet:
    spec = FlatSpec(
        view=recipe.view,
        hidden=recipe.hidden,
        num_actions=len(actions),
        head="values" if recipe.algorithm == "cql" else "logits",
        temperature=recipe.temperature,
    )
    with seeded(0):  # every weight is overwritten with d3rlpy's
        network = FlatNet(spec)
    network.normaliser.fit(torch.from_numpy(train.obs_MV[train.state_N]))
    network.actions.copy_(torch.from_numpy(actions.actions_LA))
    return network


def _network_inputs(network: FlatNet, transitions: Transitions) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return what the network's layers see of every state: d3rlpy is given these instead of the view's rows."""
    obs = torch.from_numpy(transitions.obs_MV)
    with torch.no_grad():
        return torch.cat([network.inputs(part) for part in torch.split(obs, CHUNK_ROWS)]).numpy()


def build_algorithm(recipe: D3rlpyRecipe) -> tuple[Any, Callable[[], nn.Module]]:
    """Return d3rlpy's algorithm, and a function that gives the module of its policy or Q once it has been built."""
    d3rlpy = import_d3rlpy()
    shared = {
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "encoder_factory": d3rlpy.models.encoders.VectorEncoderFactory(hidden_units=list(recipe.hidden)),
    }
    algorithm: Any
    if recipe.algorithm == "bc":
        algorithm = d3rlpy.algos.DiscreteBCConfig(beta=recipe.logit_penalty, **shared).create()
        return algorithm, lambda: algorithm.impl.modules.imitator
    if recipe.algorithm == "cql":
        targets = {"target_update_interval": recipe.target_steps, "gamma": recipe.gamma, "alpha": recipe.alpha}
        algorithm = d3rlpy.algos.DiscreteCQLConfig(n_critics=1, **targets, **shared).create()
        return algorithm, lambda: algorithm.impl.modules.q_funcs[0]
    from esper.simic.d3rlpy_iql import DiscreteIQLConfig

    values: dict[str, Any] = {
        "gamma": recipe.gamma,
        "tau": recipe.polyak,
        "expectile": recipe.expectile,
        "beta": recipe.beta,
    }
    algorithm = DiscreteIQLConfig(**values, **shared).create()
    return algorithm, lambda: algorithm.impl.modules.policy


def _epochs(algorithm: Any, dataset: Any, recipe: D3rlpyRecipe) -> Iterator[tuple[int, dict[str, float]]]:
    """Train; yield after every `log_every` steps their number and the losses, without d3rlpy's own timings."""
    logger = import_d3rlpy().logging.NoopAdapterFactory()
    epochs = algorithm.fitter(
        dataset,
        n_steps=recipe.steps,
        n_steps_per_epoch=recipe.log_every,
        logger_adapter=logger,
        show_progress=False,
    )
    for epoch, metrics in epochs:
        yield epoch, {name: float(value) for name, value in metrics.items() if not name.startswith("time_")}


def _check_finite(losses: dict[str, float], recipe: D3rlpyRecipe, step: int) -> None:
    for name, value in losses.items():
        if not np.isfinite(value):
            raise TrainingError(
                f"{name} of d3rlpy's {recipe.algorithm} is {value} at step {step}\n"
                "  expected: a finite number; lower the learning rate, or check the data set's features and rewards"
            )


def copy_network(source: nn.Module, network: FlatNet) -> None:
    """Copy the linear layers of a d3rlpy policy or Q function (encoder, then output) into a flat network."""
    theirs = [part for part in source.modules() if isinstance(part, nn.Linear)]
    ours = [part for part in network.layers if isinstance(part, nn.Linear)]
    with torch.no_grad():
        for mine, yours in zip(ours, theirs, strict=True):
            mine.weight.copy_(yours.weight)
            mine.bias.copy_(yours.bias)


class _HeldOut:
    """The held-out decisions whose action is listed: what a policy would have to say about them."""

    def __init__(self, transitions: Transitions, actions: FlatActions) -> None:
        index = actions.index(transitions.action_NA)
        listed = index >= 0
        state = transitions.state_N[listed]
        self.num_unlisted = int((~listed).sum())
        self._obs = torch.from_numpy(transitions.obs_MV[state])
        self._valid = torch.from_numpy(actions.valid(transitions.mask_MT[state]))
        self._index = torch.from_numpy(index[listed])

    def measure(self, network: FlatNet) -> dict[str, float]:
        """Return the masked policy's mean loss and how often its best action is the one taken; nothing without rows."""
        if not len(self._index):
            return {}
        with torch.no_grad():
            logits = torch.cat([network.logits(part) for part in torch.split(self._obs, CHUNK_ROWS)])
        logp = logits.masked_fill(~self._valid, -torch.inf).log_softmax(dim=1)
        loss = -logp.gather(1, self._index.unsqueeze(1)).mean()
        agreement = (logp.argmax(dim=1) == self._index).double().mean()
        return {"held_out_policy_loss": float(loss), "held_out_agreement": float(agreement)}
