"""The arms of the sunk-cost study: the host is trained already, and only further operations count."""

from __future__ import annotations

import math

from esper.leyline.identity import Root
from esper.leyline.specs import EnvironmentSpec
from esper.simic.poc_arms import HEAVY, PocArm, bigger_flops_per_epoch, early_schedule, middle_slot, variant

SUNK_COST_REFERENCES = ("continued", "new-bigger")


def sunk_cost_arms(environment: EnvironmentSpec, warm_epochs: int, further_epochs: int) -> list[PocArm]:
    """Return the arms of the sunk-cost study, every one with a learning rate that starts anew.

    The grown network is the bigger network from its first further epoch on, so the new bigger network gets exactly
    its epochs and batches. The host alone gets as many epochs as its further operations pay for, rounded up.

    Args:
        environment: Data, host, optimiser and learning rate, with the `step` schedule.
        warm_epochs: Epochs in which the host was trained.
        further_epochs: Epochs of growth.
    """
    every = list(range(environment.host.num_slots))
    host, big = bigger_flops_per_epoch(environment, []), bigger_flops_per_epoch(environment, every)
    ratio = big / host
    continued_epochs = math.ceil(further_epochs * ratio - 1e-9)
    whole_epochs = math.ceil(warm_epochs / ratio - 1e-9) + further_epochs
    continued = PocArm(
        name="continued",
        what=f"the host goes on alone for {continued_epochs} epochs: the operations of grown, rounded up",
        environment=_of(environment, "continued", warm_epochs, continued_epochs),
    )
    warm = _of(environment, "warm", warm_epochs, further_epochs)
    fresh = _of(environment, "fresh", 0, further_epochs)
    return [continued, *_warm_arms(warm), *_new_arms(fresh, _of(environment, "whole", 0, whole_epochs))]


def _of(environment: EnvironmentSpec, suffix: str, warm_epochs: int, horizon: int) -> EnvironmentSpec:
    return variant(environment, suffix, schedule="step", warm_start_epochs=warm_epochs, horizon=horizon)


def _warm_arms(warm: EnvironmentSpec) -> list[PocArm]:
    """What can be done with the trained host in as many epochs."""
    heavy, mid = HEAVY[warm.host.topology], middle_slot(warm)
    return [
        PocArm(
            name="continued-same-epochs",
            what=f"the host goes on alone for {warm.horizon} epochs",
            environment=warm,
        ),
        PocArm(
            name="grown",
            what=f"{heavy} planted in every slot at once, then {warm.horizon} epochs",
            environment=warm,
            root=f"{Root.GROWN.value}:{heavy}",
        ),
        PocArm(
            name="grown-by-actions",
            what=f"{heavy} in slot {warm.slot_names[mid]} alone: germinated, blended and committed in those epochs",
            environment=warm,
            controller=early_schedule(warm, [mid], "early-mid"),
        ),
    ]


def _new_arms(fresh: EnvironmentSpec, whole: EnvironmentSpec) -> list[PocArm]:
    """The bigger network from scratch, for the further operations and for all of them."""
    heavy = HEAVY[fresh.host.topology]
    bigger = f"{Root.ORDINARY.value}:{heavy}"
    return [
        PocArm(
            name="new-bigger",
            what=f"host with {heavy} in every slot from scratch: the further operations alone",
            environment=fresh,
            root=bigger,
        ),
        PocArm(
            name="new-bigger-zero",
            what="the same, its additions zero at birth as a seed's are",
            environment=fresh,
            root=f"{Root.BIGGER.value}:{heavy}",
        ),
        PocArm(
            name="bigger-whole-bill",
            what=f"new-bigger for {whole.horizon} epochs: the operations of the warm start too, rounded up",
            environment=whole,
            root=bigger,
        ),
    ]
