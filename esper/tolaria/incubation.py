"""How a seed learns before the host knows it. Both ways leave the host bit for bit what it would be without the seed.

`own_pass`: the seed is trained through a pass of its own, y = h + delta(h) with h detached, host weights frozen and
batch statistics that leave the running ones alone. It learns the true residual.

`linearised`: the seed gets the gradient g = dL/dh that the host computes at the slot anyway, as if it were that of y.
It costs the seed's own passes alone, but the objective <g, delta> is linear in delta and has no feedback: it would make
delta ever larger. So an increment beyond its cap gets no gradient, and the weights stand still after a few epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.tolaria.lineage import Incubation, Lineage
from esper.tolaria.probes import batch_loss

LINEARISED_EPOCHS = 3
"""Epochs in which a linearised seed's weights are trained; without an end it was measured to diverge after 3 or 4."""

INCREMENT_CAP = 1.0
"""||delta|| / ||h|| of a sample beyond which a linearised seed gets no gradient from it: an increment larger than the
activation itself is far outside of where a gradient taken without it says anything."""


def own_pass(lineage: Lineage, incubation: Incubation, h: Tensor, labels: Tensor) -> Tensor:
    """Set the gradient of a seed from h + delta(h.detach()) through the frozen suffix; return its loss (detached).

    Called within `Network.batch_statistics`.
    """
    source = h.detach().requires_grad_()
    logits = lineage.network.suffix(incubation.key.slot, h.detach() + incubation.module(source))
    loss = batch_loss(logits, labels)
    _set_gradients(incubation, loss, None, source)
    return loss.detach()


def _set_gradients(incubation: Incubation, end: Tensor, pull: Tensor | None, source: Tensor) -> None:
    """Set the gradients of the seed's weights, and of nothing else but its input's.

    The input's is asked for too: without it GroupNorm's backward crashes on a channels_last input. `backward` gives
    each gradient its weight's memory layout, which `grad` does not; the fused optimisers read both as they lie there.
    """
    drop_gradients(incubation.weights)
    torch.autograd.backward(end, pull, inputs=[*incubation.weights, source])


def unseeded_loss(lineage: Lineage, slot: int, h: Tensor, labels: Tensor, host_loss: Tensor) -> Tensor:
    """Return the loss that an own pass at a slot is compared with: the host's, or without its dropout where it has any.

    Called within `Network.batch_statistics`.
    """
    if not lineage.network.has_dropout:
        return host_loss
    with torch.no_grad():
        return batch_loss(lineage.network.suffix(slot, h), labels)


def linearised(incubation: Incubation, h: Tensor, needs_gradient: bool) -> Tensor:
    """Set the gradient of a seed from the host's at its slot; return the linear estimate of the loss drop (detached).

    The estimate is minus the inner product <dL/dh, delta>: what the batch's loss would fall by if it were linear in the
    activation. Samples whose increment is beyond the cap count in the estimate and not in the gradient.

    Args:
        incubation: The seed.
        h: The activation that arrived at the slot, with the gradient dL/dh of the host's own loss.
        needs_gradient: Whether to set the seed's gradient at all.

    Raises:
        ValueError: The activation's gradient was not retained.
    """
    if h.grad is None:
        raise ValueError("the activation has no gradient; retain it before the host's backward pass")
    if not needs_gradient:
        with torch.no_grad():
            return -torch.sum(h.grad * incubation.module(h))
    source = h.detach().requires_grad_()
    delta = incubation.module(source)
    size_B, room_B = (values.detach().flatten(1).norm(dim=1) for values in (delta, h))
    within_B = (size_B <= INCREMENT_CAP * room_B).to(h.dtype)
    pull = h.grad * within_B.view(-1, *(1,) * (h.ndim - 1))
    _set_gradients(incubation, delta, pull.to(delta.dtype), source)
    return -torch.sum(h.grad * delta.detach())


def learns_in(incubation: Incubation, epoch: int) -> bool:
    """Return whether the weights of an incubating seed are trained in an epoch."""
    age = epoch - incubation.key.start_epoch
    return incubation.key.incubation == "own_pass" or age < LINEARISED_EPOCHS


def drop_gradients(weights: Sequence[Tensor]) -> None:
    """Forget the gradients of weights: an optimiser passes over them."""
    for weight in weights:
        weight.grad = None


def clip_gradient(weights: Sequence[Tensor], limit: float) -> None:
    """Scale the gradient down to a norm of at most `limit`, as torch's `clip_grad_norm_` does, without its overhead."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if gradients:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


def step_seed(incubation: Incubation, clip: float) -> None:
    """Clip the seed's gradient, apart from the host's, and take a step of its optimiser."""
    clip_gradient(incubation.weights, clip)
    incubation.optimiser.step()
