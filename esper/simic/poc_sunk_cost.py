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
    heavy, mid = HEAVY[environment.host.topology], middle_slot(environment)
    middle = environment.slot_names[mid]
    bigger = f"{Root.ORDINARY.value}:{heavy}"

    def of(suffix: str, warm: int, horizon: int) -> EnvironmentSpec:
        return variant(environment, suffix, schedule="step", warm_start_epochs=warm, horizon=horizon)

    warm = of("warm", warm_epochs, further_epochs)
    return [
        PocArm(
            name="continued",
            what=f"the host goes on alone for {continued_epochs} epochs: the operations of grown, rounded up",
            environment=of("continued", warm_epochs, continued_epochs),
        ),
        PocArm(
            name="continued-same-epochs",
            what=f"the host goes on alone for {further_epochs} epochs",
            environment=warm,
        ),
        PocArm(
            name="grown",
            what=f"{heavy} planted in every slot at once, then {further_epochs} epochs",
            environment=warm,
            root=f"{Root.GROWN.value}:{heavy}",
        ),
        PocArm(
            name="grown-by-actions",
            what=f"{heavy} in slot {middle} alone: germinated, blended and committed in {further_epochs} epochs",
            environment=warm,
            controller=early_schedule(environment, [mid], "early-mid"),
        ),
        PocArm(
            name="new-bigger",
            what=f"host with {heavy} in every slot from scratch: the further operations alone",
            environment=of("fresh", 0, further_epochs),
            root=bigger,
        ),
        PocArm(
            name="new-bigger-zero",
            what="the same, its additions zero at birth as a seed's are",
            environment=of("fresh", 0, further_epochs),
            root=f"{Root.BIGGER.value}:{heavy}",
        ),
        PocArm(
            name="bigger-whole-bill",
            what=f"new-bigger for {whole_epochs} epochs: the operations of the warm start too, rounded up",
            environment=of("whole", 0, whole_epochs),
            root=bigger,
        ),
    ]
