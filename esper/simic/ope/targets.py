"""Policies that are valued: mixtures of tree distributions, known in every logged state.

A deterministic policy is a point mass per state, u and a tree network have their log-probabilities by choice. A mixture
(1 - epsilon) greedy + epsilon u is no tree distribution (its levers are not independent), so its parts are kept apart:
E_pi[Q] and pi(a | s) of a mixture are the weighted sums of its parts', both exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.leyline import tree
from esper.leyline.actions import Actions, Bools
from esper.leyline.controller_specs import ControllerSpec, LearnedPolicy, UniformRandom
from esper.leyline.errors import SpecError
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.protocols import Controller
from esper.leyline.views import get_view
from esper.simic.batches import Floats, Ints
from esper.simic.learning import in_chunks
from esper.simic.ope.logged import Logged, replay_actions
from esper.tamiyo import tree_torch
from esper.tamiyo.mixing import uniform_log_probs
from esper.tamiyo.networks import TreeNet


class Part(Protocol):
    """A policy in the logged states."""

    def expect(self, values_NT: Tensor, mask_NT: Tensor, states_N: Ints) -> Tensor:
        """Return E_a[Q(s, a)] of additive values at some states, [N]."""
        ...

    def log_prob(self, states_N: Ints, actions_NA: Actions, mask_NT: Bools) -> Floats:
        """Return log pi(a | s), float64 [N]."""
        ...


@dataclass(frozen=True, slots=True)
class PointMass:
    """One action per state, int8 [M, A]."""

    actions_MA: Actions

    def expect(self, values_NT: Tensor, mask_NT: Tensor, states_N: Ints) -> Tensor:
        """Return Q of the action."""
        return tree_torch.path_sum(values_NT, torch.from_numpy(self.actions_MA[states_N]))

    def log_prob(self, states_N: Ints, actions_NA: Actions, mask_NT: Bools) -> Floats:
        """Return 0 where it is the action, else -inf."""
        return np.where((self.actions_MA[states_N] == actions_NA).all(axis=1), 0.0, -np.inf)


@dataclass(frozen=True, slots=True)
class Uniform:
    """The hierarchical uniform policy u."""

    def expect(self, values_NT: Tensor, mask_NT: Tensor, states_N: Ints) -> Tensor:
        """Return E_u[Q] by recursion over the tree."""
        logp = torch.from_numpy(uniform_log_probs(mask_NT.numpy())).to(values_NT.dtype)
        return tree_torch.expectation(logp, values_NT, mask_NT)

    def log_prob(self, states_N: Ints, actions_NA: Actions, mask_NT: Bools) -> Floats:
        """Return log u(a | s)."""
        return tree.log_prob(uniform_log_probs(mask_NT), actions_NA, mask_NT)


@dataclass(frozen=True, slots=True)
class TreePolicy:
    """Log-probabilities of each choice, float [M, T], as `log_softmax` gives them."""

    logp_MT: NDArray[np.floating]

    def expect(self, values_NT: Tensor, mask_NT: Tensor, states_N: Ints) -> Tensor:
        """Return E_pi[Q] by recursion over the tree."""
        logp = torch.from_numpy(self.logp_MT[states_N]).to(values_NT.dtype)
        return tree_torch.expectation(logp, values_NT, mask_NT)

    def log_prob(self, states_N: Ints, actions_NA: Actions, mask_NT: Bools) -> Floats:
        """Return log pi(a | s)."""
        return tree.log_prob(self.logp_MT[states_N].astype(np.float64), actions_NA, mask_NT)


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """A mixture of policies with weights that add up to 1."""

    parts: tuple[tuple[float, Part], ...]

    def expect(self, values_NT: Tensor, mask_NT: Tensor, states_N: Ints) -> Tensor:
        """Return E_a[Q(s, a)] of additive values at some states, [N]."""
        terms = [weight * part.expect(values_NT, mask_NT, states_N) for weight, part in self.parts]
        return torch.stack(terms).sum(dim=0)

    def log_prob(self, states_N: Ints, actions_NA: Actions, mask_NT: Bools) -> Floats:
        """Return log pi(a | s), float64 [N]."""
        terms = [np.log(weight) + part.log_prob(states_N, actions_NA, mask_NT) for weight, part in self.parts]
        total: Floats = np.logaddexp.reduce(terms, axis=0)
        return total


def mixture(parts: Sequence[tuple[float, Part]]) -> TargetPolicy:
    """Return a mixture without its parts of weight 0; SpecError unless the weights add up to 1."""
    kept = tuple((weight, part) for weight, part in parts if weight > 0)
    if abs(sum(weight for weight, _ in kept) - 1) > 1e-9:
        raise SpecError(f"weights of a mixture: {[weight for weight, _ in parts]}\n  expected: they add up to 1")
    return TargetPolicy(kept)


def rule_target(spec: ControllerSpec, epsilon: float, logged: Logged) -> TargetPolicy:
    """Return (1 - epsilon) rule + epsilon u in the logged states."""
    from esper.tamiyo.registry import build_controller

    if isinstance(spec, UniformRandom):
        return mixture([(1.0, Uniform())])
    if epsilon == 1.0:
        return mixture([(1.0, Uniform())])
    greedy = PointMass(replay_actions(build_controller(spec), logged))
    return mixture([(1.0 - epsilon, greedy), (epsilon, Uniform())])


def policy_target(policy: LearnedPolicy, logged: Logged) -> TargetPolicy:
    """Return a checkpoint's policy in the logged states: its most probable choices, or its distribution if sampled.

    Raises:
        SpecError: It is sampled, and has no distribution over the tree without a memory.
        CheckpointError: The checkpoint is missing, damaged or another one.
    """
    from esper.tamiyo.registry import build_controller

    controller = build_controller(policy)
    if not policy.sampled:
        return mixture([(1.0, PointMass(replay_actions(controller, logged)))])
    network = tree_network(controller)
    if network is None:
        raise SpecError(
            f"policy {policy.name!r} has no distribution over the tree that depends on the observation alone\n"
            "  leave out --sampled: it is then valued as it acts in evaluation, by its most probable choices"
        )
    obs, mask = encode(logged, network.spec.view), torch.from_numpy(logged.transitions.mask_MT)
    return mixture([(1.0, TreePolicy(in_chunks(network.log_policy, torch.from_numpy(obs), mask).numpy()))])


def tree_network(controller: Controller) -> TreeNet | None:
    """Return the tree network of a learned controller, None where it is of another kind, atomic or has a memory."""
    network = getattr(controller, "network", None)
    if not isinstance(network, TreeNet) or (network.spec.trunk, network.spec.form) != ("mlp", "additive"):
        return None
    return network


def encode(logged: Logged, view: str) -> NDArray[np.float32]:
    """Return every logged row in a view, float32 [M, V]."""
    if view == logged.transitions.view:
        return logged.transitions.obs_MV
    steps = np.arange(len(logged.features_MF)) - np.repeat(logged.first_E, logged.length_E)
    return get_view(view).encode(dict(zip(FEATURE_COLUMNS, logged.features_MF.T)), steps)
