"""Training written out: autograd on whole expressions, SGD and clipping by hand, nothing of the engine's loop.

Of the project it uses only the host's segments and the seeds' and gates' modules, as plain functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class TextbookSeed:
    """A seed: blended where `incubation` is None."""

    slot: int
    module: nn.Module
    lr_factor: float = 1.0
    alpha: float = 0.0
    isolated: bool = False
    gate: nn.Module | None = None
    incubation: str | None = None

    def parameters(self) -> list[Tensor]:
        return [*self.module.parameters(), *(self.gate.parameters() if self.gate is not None else ())]


@dataclass
class HandSgd:
    """v <- momentum v + (g + decay w); w <- w - lr v. A weight without a gradient is left alone, its v too."""

    learning_rate: float
    momentum: float
    decay: float
    velocity: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
        for weight, gradient in zip(weights, gradients):
            if gradient is None:
                continue
            pull = gradient + self.decay * weight
            before = self.velocity.get(id(weight))
            self.velocity[id(weight)] = pull if before is None else self.momentum * before + pull
            weight.sub_(self.learning_rate * factor * self.velocity[id(weight)])


def blended(seed: TextbookSeed, h: Tensor) -> Tensor:
    """y = h + alpha g(h) delta(h), h a constant for the seed where it is isolated."""
    seen = h.detach().clone().requires_grad_() if seed.isolated else h
    increment = seed.module(seen)
    if seed.gate is not None:
        increment = seed.gate(seen) * increment
    return h + seed.alpha * increment


def forward(host: nn.Module, seeds: Sequence[TextbookSeed], x: Tensor, start: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Return logits and the activation after each segment from `start` on; x enters segment `start`."""
    arrived, h = [], x
    for index in range(start, len(host.segments)):
        h = host.segment(index, h)
        arrived.append(h)
        for seed in seeds:
            if seed.slot == index and seed.incubation is None:
                h = blended(seed, h)
    return host.classify(h), arrived


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy: -log softmax of the right answer, averaged over all answers."""
    right = torch.log_softmax(logits, dim=-1).gather(-1, labels[..., None])
    return -right.mean()


def own_pass_gradients(
    host: nn.Module, seeds: Sequence[TextbookSeed], seed: TextbookSeed, h: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Loss and seed gradients of h + delta(h) through the suffix, batch statistics, running ones put back after."""
    saved = copy.deepcopy({name: value for name, value in host.named_buffers() if value is not None})
    seen = h.detach().clone().requires_grad_()
    loss = mean_loss(forward(host, seeds, h.detach() + seed.module(seen), seed.slot + 1)[0], labels)
    gradients = torch.autograd.grad(loss, [*seed.module.parameters(), seen])
    for name, value in host.named_buffers():
        value.copy_(saved[name])
    return loss.detach(), list(gradients[:-1])


def linearised_gradients(seed: TextbookSeed, h: Tensor, pull: Tensor, cap: float) -> tuple[Tensor, list[Tensor]]:
    """Linear loss drop and seed gradients of the sum, sample by sample, of <dL/dh, delta> within the cap."""
    seen = h.detach().clone().requires_grad_()
    delta = seed.module(seen)
    inner = [(pull[b] * delta[b]).sum() for b in range(len(h))]
    within = [term for b, term in enumerate(inner) if delta[b].norm() <= cap * h[b].norm()]
    parameters = list(seed.module.parameters())
    objective = torch.stack(within).sum() if within else 0 * torch.stack(inner).sum()
    return -torch.stack(inner).sum().detach(), list(torch.autograd.grad(objective, [*parameters, seen])[:-1])


def clipped(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Scale gradients so that their joint norm is at most the limit."""
    norm = torch.sqrt(sum((g * g).sum() for g in gradients))
    return [g * min(1.0, limit / (float(norm) + 1e-6)) for g in gradients]


@dataclass
class TextbookEpoch:
    """Host, seeds and optimiser of a run written out.

    Attributes:
        host: In training mode.
        seeds: Blended and incubating.
        optimiser: By hand.
        clip: Limit of a seed's gradient norm.
        cap: Of linearised increments.
        held_still: The host's own weights get no step.
        dropout: Switches the host's dropout on with its generator, or off with None.
    """

    host: nn.Module
    seeds: list[TextbookSeed]
    optimiser: HandSgd
    clip: float
    cap: float = 1.0
    held_still: bool = False
    dropout: Callable[[torch.Generator | None], None] = lambda generator: None

    def run(self, batches: Iterator[tuple[Tensor, Tensor]], generator: torch.Generator | None) -> dict[int, float]:
        """Train on the batches; return the mean loss drop per incubating seed, by its place in `seeds`."""
        drops: dict[int, list[float]] = {}
        for x, labels in batches:
            self.dropout(generator)
            logits, arrived = forward(self.host, self.seeds, x)
            self.dropout(None)
            loss = mean_loss(logits, labels)
            slots = [seed.slot for seed in self.seeds if seed.incubation == "linearised"]
            own = [p for p in self.host.parameters() if p.requires_grad]
            mixed = [p for seed in self.seeds if seed.incubation is None for p in seed.parameters()]
            wanted = [*own, *mixed, *(arrived[slot] for slot in slots)]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            pulls = dict(zip(slots, gradients[len(own) + len(mixed) :]))
            learnt = []
            for place, seed in enumerate(self.seeds):
                if seed.incubation is None:
                    continue
                h = arrived[seed.slot].detach()
                if seed.incubation == "linearised":
                    drop, its = linearised_gradients(seed, h, pulls[seed.slot], self.cap)
                else:
                    bare = TextbookSeed(seed.slot, Nothing(), incubation="own_pass")
                    reference, _ = own_pass_gradients(self.host, self.seeds, bare, h, labels)
                    seeded, its = own_pass_gradients(self.host, self.seeds, seed, h, labels)
                    drop = reference - seeded
                drops.setdefault(place, []).append(float(drop))
                learnt.append((seed, its))
            for seed, its in learnt:
                self.optimiser.step(list(seed.module.parameters()), clipped(its, self.clip), seed.lr_factor)
            if not self.held_still:
                self.optimiser.step(own, gradients[: len(own)])
            rest = list(gradients[len(own) : len(own) + len(mixed)])
            for seed in self.seeds:
                if seed.incubation is None:
                    count = len(seed.parameters())
                    its, rest = rest[:count], rest[count:]
                    self.optimiser.step(seed.parameters(), clipped(its, self.clip), seed.lr_factor)
        return {place: sum(values) / len(values) for place, values in drops.items()}


class Nothing(nn.Module):
    """A seed that adds nothing: what the loss is without the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.weight * h
