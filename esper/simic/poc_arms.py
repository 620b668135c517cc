"""The arms of the growth study: growing against not growing, at equal epochs and with equal learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper.leyline.actions import DWELL_EPOCHS, TEMPO_EPOCHS, Blend
from esper.leyline.controller_specs import HEURISTIC, ControllerSpec, FixedSchedule, NeverAct, Plant
from esper.leyline.errors import SpecError
from esper.leyline.host_specs import Topology
from esper.leyline.identity import EVALUATION_START, Role, Root
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec

HEAVY: dict[Topology, str] = {"cnn": "conv_heavy", "transformer": "mlp"}
"""The largest blueprint of each topology: what the published schedule grew, and what pays most."""

NEVER_ACT = NeverAct()

DROP = 0.1
"""The published learning-rate drop, at the end of isolation."""

NO_REWARD = RewardSpec(name="poc", mode="gain", rent_points=0.0, scale_points=1.0)
"""The study compares accuracies; a reward has no part in an episode's identity."""

_KEPT = (
    "name",
    "task",
    "host",
    "optimiser",
    "learning_rate",
    "momentum",
    "weight_decay",
    "batch_size",
    "batches_per_epoch",
    "horizon",
    "augment",
    "incubation",
    "default_isolation",
    "numerics",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PocArm:
    """One way to train: an environment, the network that it starts from and who acts."""

    name: str
    what: str
    environment: EnvironmentSpec
    root: str = Root.HOST.value
    controller: ControllerSpec = NEVER_ACT

    @property
    def episode(self) -> PlannedEpisode:
        """The arm as an episode of a cohort."""
        return PlannedEpisode(controller=self.controller, root=self.root, role=Role.EVALUATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """The published schedule, scaled to a horizon: birth at 40 % of it, a fifth of isolation, a fifth of blending."""

    birth_epoch: int
    dwell_epochs: int
    tempo_epochs: int

    @property
    def drop_epoch(self) -> int:
        """When the learning rate falls: at the end of isolation."""
        return self.birth_epoch + self.dwell_epochs


def published_life(horizon: int) -> Life:
    """Return the published schedule (10 epochs of host, 5 isolated, 5 blending, 5 fossil) scaled to a horizon.

    Isolation and blending take the nearest value that the action tree has; where they do not fit, birth is earlier.

    Raises:
        SpecError: The horizon is too short for any life.
    """
    dwell = min(DWELL_EPOCHS, key=lambda value: abs(value - horizon / 5))
    tempo = min(TEMPO_EPOCHS, key=lambda value: abs(value - horizon / 5))
    birth = min(round(0.4 * horizon), horizon - 1 - dwell - tempo)
    if birth < 0:
        raise SpecError(
            f"{horizon} epochs are too few for a seed to be born, trained, blended and committed\n"
            f"  expected: at least {1 + dwell + tempo}"
        )
    return Life(birth_epoch=birth, dwell_epochs=dwell, tempo_epochs=tempo)


def middle_slot(environment: EnvironmentSpec) -> int:
    """Return the slot of the published schedule, `mid` where there are three."""
    return environment.host.num_slots // 2


def variant(environment: EnvironmentSpec, suffix: str, **changes: object) -> EnvironmentSpec:
    """Return an environment with the same data, host and optimiser, every option of growth at its default."""
    given = environment.model_dump()
    kept = {name: given[name] for name in _KEPT} | changes
    return EnvironmentSpec.parse(kept | {"name": f"{environment.name}-{suffix}"}, environment.name)


def with_drop(environment: EnvironmentSpec, suffix: str, drop_epoch: int, **changes: object) -> EnvironmentSpec:
    """Return a variant whose learning rate falls to a tenth from an epoch on."""
    return variant(environment, suffix, schedule="drops", lr_drops=((drop_epoch, DROP),), **changes)


def early_schedule(environment: EnvironmentSpec, slots: Sequence[int], name: str) -> FixedSchedule:
    """Return our fixed schedule: heavy seeds born as early as possible that adapt together with the host."""
    plants = tuple(Plant(slot=slot, blueprint=HEAVY[environment.host.topology], isolation="coadapt") for slot in slots)
    return FixedSchedule(name=name, plants=plants)


def growth_arms(environment: EnvironmentSpec, wider_factor: float) -> list[PocArm]:
    """Return the arms of the growth study.

    Args:
        environment: Data, host, optimiser and horizon; its learning-rate schedule is not used.
        wider_factor: Width factor whose host costs what the bigger network (one heavy seed) costs.
    """
    drop = with_drop(environment, "drop", published_life(environment.horizon).drop_epoch)
    return [*_fixed_networks(environment, drop, wider_factor), *_grown(environment, drop)]


def _fixed_networks(environment: EnvironmentSpec, drop: EnvironmentSpec, wider_factor: float) -> list[PocArm]:
    """The host, the wider host and the bigger network from scratch: nothing grows."""
    heavy = HEAVY[environment.host.topology]
    middle = environment.slot_names[middle_slot(environment)]
    constant = variant(environment, "constant", schedule="constant")
    bigger = f"{Root.ORDINARY.value}:{heavy}"
    return [
        PocArm(name="host", what="host alone, constant learning rate", environment=constant),
        PocArm(name="host-drop", what="host alone with the learning-rate drop of the grown one", environment=drop),
        PocArm(
            name="wider-drop",
            what=f"host {wider_factor:g} times as wide: the operations of bigger-drop; with the drop",
            environment=drop,
            root=f"{Root.WIDER.value}:{wider_factor}",
        ),
        PocArm(
            name="bigger",
            what=f"host with {heavy} in slot {middle} from scratch, constant learning rate",
            environment=constant,
            root=f"{bigger}@{middle}",
        ),
        PocArm(name="bigger-drop", what="the same with the drop", environment=drop, root=f"{bigger}@{middle}"),
        PocArm(
            name="bigger-zero-drop",
            what="the same, its addition zero at birth as a seed's is: what a seed could become at best",
            environment=drop,
            root=f"{Root.BIGGER.value}:{heavy}@{middle}",
        ),
        PocArm(
            name="bigger-all-drop",
            what=f"host with {heavy} in every slot from scratch, with the drop: the control of early-all",
            environment=drop,
            root=bigger,
        ),
    ]


def _grown(environment: EnvironmentSpec, drop: EnvironmentSpec) -> list[PocArm]:
    """The published schedule, ours, and the heuristic."""
    heavy, mid = HEAVY[environment.host.topology], middle_slot(environment)
    middle, num_slots = environment.slot_names[mid], environment.host.num_slots
    return [
        _published_arm(environment),
        PocArm(
            name="early-mid",
            what=f"our schedule: {heavy} born in slot {middle} at epoch 0, blending co-adapting from epoch 1",
            environment=drop,
            controller=early_schedule(environment, [mid], "early-mid"),
        ),
        PocArm(
            name="early-all",
            what=f"our schedule: {heavy} in every slot, born at epochs 0 to {num_slots - 1}",
            environment=drop,
            controller=early_schedule(environment, range(num_slots), "early-all"),
        ),
        PocArm(
            name="heuristic",
            what="grown by the heuristic, every slot free, with the drop",
            environment=drop,
            controller=HEURISTIC,
        ),
    ]


def _published_arm(environment: EnvironmentSpec) -> PocArm:
    """The published schedule: the host stands still while the seed is isolated."""
    life = published_life(environment.horizon)
    frozen = (life.birth_epoch, life.drop_epoch)
    plant = Plant(
        slot=middle_slot(environment),
        blueprint=HEAVY[environment.host.topology],
        birth_epoch=life.birth_epoch,
        blend=Blend.SIGMOID,
        tempo_epochs=life.tempo_epochs,
        dwell_epochs=life.dwell_epochs,
        isolation="coadapt",
    )
    span = (
        f"{life.birth_epoch} epochs of host, {life.dwell_epochs} isolated with the host frozen, "
        f"{life.tempo_epochs} blending (sigmoid), {environment.horizon - life.drop_epoch - life.tempo_epochs} fossil"
    )
    return PocArm(
        name="published",
        what=f"the published schedule: {span}",
        environment=with_drop(environment, "published", life.drop_epoch, host_frozen_epochs=frozen),
        controller=FixedSchedule(name="published", plants=(plant,)),
    )


GROWTH_REFERENCES = ("host-drop", "bigger-drop")


def plan_arms(arms: Iterable[PocArm], num_seeds: int) -> list[CohortPlan]:
    """Return one cohort per environment and replicate, seed by seed: the first part of them is a smaller study."""
    by_environment: dict[str, list[PocArm]] = {}
    for arm in arms:
        by_environment.setdefault(arm.environment.spec_id, []).append(arm)
    plans = []
    for replicate in replicates(num_seeds):
        for group in by_environment.values():
            plan = CohortPlan(
                environment=group[0].environment,
                reward=NO_REWARD,
                replicate=replicate,
                episodes=tuple(arm.episode for arm in group),
            )
            distinct = dict(zip(plan.episode_ids(), plan.episodes))
            plans.append(plan.model_copy(update={"episodes": tuple(distinct.values())}))
    return plans


def replicates(num_seeds: int) -> range:
    """Return the evaluation replicates of a study: the first of their range."""
    return range(EVALUATION_START, EVALUATION_START + num_seeds)


def bigger_flops_per_epoch(environment: EnvironmentSpec, slots: Sequence[int]) -> float:
    """Return the training operations of one epoch of the host with a heavy seed in each of the slots."""
    from esper.tolaria.cost import blueprint_costs, environment_costs

    costs = environment_costs(environment)
    blueprint = environment.blueprints.index(HEAVY[environment.host.topology])
    seeds = 0.0
    for slot in slots:
        place = costs.places[slot]
        seeds += blueprint_costs(environment.host.topology, blueprint, place.channels, place.resolution).forward
    samples = environment.batch_size * environment.batches_per_epoch
    return samples * (costs.train_per_sample + 3.0 * seeds)
