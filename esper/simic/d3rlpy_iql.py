r"""Discrete implicit Q-learning as an algorithm of d3rlpy, which has the continuous one alone.

    L_V  = E |tau - 1(u < 0)| u**2,          u = min_k Qbar_k(s, a) - V(s)
    L_Q  = sum_k E (Q_k(s, a) - R_n - gamma**n (1 - done) V(s_(t+n)))**2
    Qbar <- Qbar + polyak (Q - Qbar)
    L_pi = - E [ w log pi(a | s) ],          w = min(exp(beta A / sigma_A), largest_weight) / mean w

with A = min_k Qbar_k(s, a) - V(s), sigma_A its standard deviation in the batch, and one step of each loss per batch, as
d3rlpy's other algorithms take. Reference: Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit
Q-Learning", ICLR 2022.

Importing this module imports d3rlpy, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from d3rlpy.algos.qlearning.base import QLearningAlgoBase, QLearningAlgoImplBase
from d3rlpy.algos.qlearning.torch.utility import DiscreteQFunctionMixin
from d3rlpy.base import LearnableConfig, register_learnable
from d3rlpy.constants import ActionSpace
from d3rlpy.models.builders import create_categorical_policy, create_discrete_q_function, create_value_function
from d3rlpy.models.encoders import EncoderFactory, make_encoder_field
from d3rlpy.models.q_functions import MeanQFunctionFactory
from d3rlpy.models.torch import CategoricalPolicy, DiscreteEnsembleQFunctionForwarder, ValueFunction
from d3rlpy.optimizers.optimizers import OptimizerFactory, OptimizerWrapper, make_optimizer_field
from d3rlpy.torch_utility import Modules, TorchMiniBatch, hard_sync, soft_sync
from torch import Tensor, nn

from esper.simic.iql import expectile_loss

SMALLEST_SPREAD = 1e-6


@dataclasses.dataclass()
class DiscreteIQLConfig(LearnableConfig):  # type: ignore[misc]
    """Settings; `expectile` is tau, `tau` d3rlpy's name for the rate at which the target networks follow (polyak)."""

    learning_rate: float = 3e-4
    optim_factory: OptimizerFactory = make_optimizer_field()  # noqa: RUF009 (a dataclass field, as in d3rlpy)
    encoder_factory: EncoderFactory = make_encoder_field()  # noqa: RUF009
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    n_critics: int = 2
    expectile: float = 0.7
    beta: float = 3.0
    largest_weight: float = 100.0

    def create(self, device: bool | int | str = False, enable_ddp: bool = False) -> DiscreteIQL:
        """Return an algorithm with these settings."""
        return DiscreteIQL(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        """Return the name under which d3rlpy saves the algorithm."""
        return "discrete_iql"


@dataclasses.dataclass(frozen=True)
class DiscreteIQLModules(Modules):  # type: ignore[misc]
    """The networks and their optimisers."""

    policy: CategoricalPolicy
    q_funcs: nn.ModuleList
    targ_q_funcs: nn.ModuleList
    value_func: ValueFunction
    actor_optim: OptimizerWrapper
    critic_optim: OptimizerWrapper


class DiscreteIQLImpl(DiscreteQFunctionMixin, QLearningAlgoImplBase):  # type: ignore[misc]
    """One update: a step of L_V + L_Q, then one of L_pi, then the target networks."""

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        action_size: int,
        modules: DiscreteIQLModules,
        config: DiscreteIQLConfig,
        forwarders: tuple[DiscreteEnsembleQFunctionForwarder, DiscreteEnsembleQFunctionForwarder],
        device: str,
    ) -> None:
        """`forwarders` are those of the critics and of their targets."""
        super().__init__(observation_shape=observation_shape, action_size=action_size, modules=modules, device=device)
        self._config = config
        self._q_func_forwarder, self._targets = forwarders
        hard_sync(modules.targ_q_funcs, modules.q_funcs)

    def advantage(self, batch: TorchMiniBatch) -> Tensor:
        """Return min_k Qbar_k(s, a) - V(s), [N]; the gradient reaches V alone."""
        with torch.no_grad():
            slow = self._targets.compute_expected_q(batch.observations, reduction="min")
        chosen: Tensor = slow.gather(1, batch.actions.long()) - self._modules.value_func(batch.observations)
        return chosen.squeeze(1)

    def value_losses(self, batch: TorchMiniBatch) -> tuple[Tensor, Tensor]:
        """Return L_V and L_Q."""
        with torch.no_grad():
            following = self._modules.value_func(batch.next_observations)
            discount = self._config.gamma**batch.intervals * (1 - batch.terminals)
            target = batch.rewards + discount * following
        q_KNL = self._q_func_forwarder.compute_expected_q(batch.observations, reduction="none")
        chosen = q_KNL.gather(2, batch.actions.long().expand(len(q_KNL), -1, -1))
        loss_q = (chosen - target).square().mean(dim=(1, 2)).sum()
        return expectile_loss(self.advantage(batch), self._config.expectile), loss_q

    def policy_loss(self, batch: TorchMiniBatch) -> Tensor:
        """Return L_pi."""
        with torch.no_grad():
            advantage = self.advantage(batch)
            spread = advantage.std(correction=0).clamp(min=SMALLEST_SPREAD)
            scaled = self._config.beta * advantage / spread
            weight = scaled.clamp(max=math.log(self._config.largest_weight)).exp()
        logp = self._modules.policy(batch.observations).log_prob(batch.actions.squeeze(1))
        loss: Tensor = -(weight / weight.mean() * logp).mean()
        return loss

    def inner_update(self, batch: TorchMiniBatch, grad_step: int) -> dict[str, float]:
        """Take the steps of one batch; return the losses."""
        modules = self._modules
        modules.critic_optim.zero_grad()
        loss_v, loss_q = self.value_losses(batch)
        (loss_v + loss_q).backward()  # type: ignore[no-untyped-call]
        modules.critic_optim.step()
        modules.actor_optim.zero_grad()
        loss_pi = self.policy_loss(batch)
        loss_pi.backward()  # type: ignore[no-untyped-call]
        modules.actor_optim.step()
        soft_sync(modules.targ_q_funcs, modules.q_funcs, self._config.tau)
        losses = {"value_loss": loss_v, "critic_loss": loss_q, "policy_loss": loss_pi}
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def inner_predict_best_action(self, x: Tensor) -> Tensor:
        """Return the most probable action, [N]."""
        best: Tensor = self._modules.policy(x).logits.argmax(dim=1)
        return best

    def inner_sample_action(self, x: Tensor) -> Tensor:
        """Return an action drawn from the policy, [N]."""
        drawn: Tensor = self._modules.policy(x).sample()
        return drawn


class DiscreteIQL(QLearningAlgoBase[DiscreteIQLImpl, DiscreteIQLConfig]):  # type: ignore[misc]
    """The algorithm, trained by d3rlpy's own `fit`."""

    def inner_create_impl(self, observation_shape: tuple[int, ...], action_size: int) -> None:
        """Build the networks and optimisers."""
        config, device = self._config, {"device": self._device, "enable_ddp": self._enable_ddp}
        encoder, shape = config.encoder_factory, (observation_shape, action_size)
        mean_q = MeanQFunctionFactory()
        q_funcs, forwarder = create_discrete_q_function(*shape, encoder, mean_q, n_ensembles=config.n_critics, **device)
        targets, slow = create_discrete_q_function(*shape, encoder, mean_q, n_ensembles=config.n_critics, **device)
        value_func = create_value_function(observation_shape, encoder, **device)
        policy = create_categorical_policy(*shape, encoder, **device)
        critics = [*q_funcs.named_modules(), *value_func.named_modules()]
        rate = {"lr": config.learning_rate, "compiled": self.compiled}
        modules = DiscreteIQLModules(
            policy=policy,
            q_funcs=q_funcs,
            targ_q_funcs=targets,
            value_func=value_func,
            actor_optim=config.optim_factory.create(policy.named_modules(), **rate),
            critic_optim=config.optim_factory.create(critics, **rate),
        )
        self._impl = DiscreteIQLImpl(observation_shape, action_size, modules, config, (forwarder, slow), self._device)

    def get_action_type(self) -> ActionSpace:
        """Return that actions are discrete."""
        return ActionSpace.DISCRETE


register_learnable(DiscreteIQLConfig)
