"""Specifications of controllers: rules, schedules, explorers and learned policies."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.leyline.actions import CNN_BLUEPRINTS, MAX_SLOTS, SEED_LR_FACTORS, Blend
from esper.leyline.blueprint_names import check_blueprint, have_one_topology
from esper.leyline.errors import UnknownNameError, unknown_name
from esper.leyline.spec_base import Spec


def _check_blueprint(name: str) -> None:
    try:
        check_blueprint(name)
    except UnknownNameError as error:
        raise ValueError(str(error)) from None


class NeverAct(Spec):
    """The control: WAIT at every step."""

    kind: Literal["never-act"] = "never-act"
    name: Literal["never-act"] = "never-act"


class UniformRandom(Spec):
    """The hierarchical uniform policy u: uniform over valid ops, then slots, then each lever."""

    kind: Literal["random"] = "random"
    name: Literal["random"] = "random"


class Heuristic(Spec):
    """Rules on a plateau counter. The eleven behaviours and the reference heuristic are settings of these fields.

    Attributes:
        min_epochs: No germination before this step.
        plateau_epochs: Epochs without half a point of progress that trigger a germination.
        prune_after: Epochs in TRAINING after which a seed is advanced or pruned.
        blueprints: The rotation, in the names of one topology; on a host of the other each stands for its counterpart.
        inverted: Germinate when not on a plateau; FOSSILIZE and PRUNE swapped.
        period_epochs: Germinate every so many epochs instead of on a plateau.
        cycle_levers: Slots and levers rotate with the blueprint.
        start_by_replicate: The rotation starts at the replicate instead of 0.
    """

    kind: Literal["heuristic"] = "heuristic"
    name: str
    min_epochs: Annotated[int, Field(ge=0)] = 5
    plateau_epochs: Annotated[int, Field(ge=1)] = 3
    prune_after: Annotated[int, Field(ge=1)] = 5
    blueprints: Annotated[tuple[str, ...], Field(min_length=1)] = ("conv_light", "attention", "norm", "depthwise")
    inverted: bool = False
    period_epochs: Annotated[int, Field(ge=1)] | None = None
    cycle_levers: bool = False
    start_by_replicate: bool = False

    @model_validator(mode="after")
    def _known_blueprints(self) -> Self:
        for blueprint in self.blueprints:
            _check_blueprint(blueprint)
        if not have_one_topology(self.blueprints):
            raise ValueError(f"blueprints {list(self.blueprints)}: no host has all of them")
        if self.inverted and self.period_epochs is not None:
            raise ValueError("inverted has no effect with period_epochs")
        return self


class Plant(Spec):
    """One seed of a schedule: carried out as soon as possible from `birth_epoch` on, and committed when it can be.

    The host must have the blueprint and the slot; that is checked when an episode begins.
    """

    slot: Annotated[int, Field(ge=0, lt=MAX_SLOTS)]
    blueprint: str
    birth_epoch: Annotated[int, Field(ge=0)] = 0
    blend: Blend = Blend.LINEAR
    tempo_epochs: Literal[3, 5, 8, 12] = 3
    dwell_epochs: Literal[1, 2, 3, 5] = 1
    isolation: Literal["isolated", "coadapt", "topology"] = "topology"
    seed_lr_factor: float = 1.0

    @model_validator(mode="after")
    def _known_blueprint(self) -> Self:
        _check_blueprint(self.blueprint)
        if self.seed_lr_factor not in SEED_LR_FACTORS:
            raise ValueError(f"seed_lr_factor {self.seed_lr_factor} is not one of {SEED_LR_FACTORS}")
        return self


class FixedSchedule(Spec):
    """Carries out a list of plants, whatever is observed."""

    kind: Literal["schedule"] = "schedule"
    name: str
    plants: tuple[Plant, ...]


class ScheduleSampler(Spec):
    """Carries out whole plans from a pool keyed by (pool name, plan index), the same on every env_seed.

    Repetition r carries out plan r: the declared plans first, then sampled ones of 1 to 3 seeds. No propensity.
    The number of plans has no part in the id: a larger pool begins with the smaller one's plans.
    """

    kind: Literal["schedule-sampler"] = "schedule-sampler"
    name: Literal["schedule-sampler"] = "schedule-sampler"
    pool: str
    num_plans: Annotated[int, Field(ge=1)]
    num_slots: Annotated[int, Field(ge=1, le=MAX_SLOTS)]
    max_birth_epoch: Annotated[int, Field(ge=0)]

    @property
    def spec_id(self) -> str:
        """The id, in which the number of plans has no part."""
        return self.id_without("num_plans")


class TrialKeep(Spec):
    """Tries one seed in each of several slots in isolation at once, then blends one of them and prunes the others.

    While the seeds incubate the host stays what it is, and each shows by its shadow probes what it would bring. Which
    of them it keeps is told in advance (so that every choice is in the data, whatever the probes said) or read off the
    probes. Its action is certain, so under epsilon its probabilities are exact.

    Attributes:
        slots: Where seeds are tried, in the order of their birth, one a step. A single one is a plan with a
            probability: it germinates there at once and is kept.
        blueprint: What is tried; on a host of the other topology its counterpart.
        incubation_epochs: Epochs that the last seed to be born trains before one is kept.
        keep: A slot among `slots`; or `largest`, the one with the largest drop of the validation loss in its probe.
        tempo_epochs: Epochs over which the kept one is blended.
    """

    kind: Literal["trial"] = "trial"
    name: str
    slots: Annotated[tuple[Annotated[int, Field(ge=0, lt=MAX_SLOTS)], ...], Field(min_length=1)]
    blueprint: str = "conv_heavy"
    incubation_epochs: Annotated[int, Field(ge=1)] = 5
    keep: Annotated[int, Field(ge=0, lt=MAX_SLOTS)] | Literal["largest"] = "largest"
    tempo_epochs: Literal[3, 5, 8, 12] = 3

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_blueprint(self.blueprint)
        if len(set(self.slots)) != len(self.slots):
            raise ValueError(f"slots {list(self.slots)} names one twice")
        if self.keep != "largest" and self.keep not in self.slots:
            raise ValueError(f"slot {self.keep} cannot be kept: only slots {list(self.slots)} are tried")
        return self


class LearnedPolicy(Spec):
    """A checkpoint: `digest` is the SHA-256 of its weights, `sampled` draws from the policy instead of its argmax."""

    kind: Literal["policy"] = "policy"
    name: str
    path: str
    digest: str
    sampled: bool = False

    @property
    def spec_id(self) -> str:
        """The id, in which the path has no part."""
        return self.id_without("path")


ControllerSpec = Annotated[
    NeverAct | UniformRandom | Heuristic | FixedSchedule | ScheduleSampler | TrialKeep | LearnedPolicy,
    Field(discriminator="kind"),
]

HEURISTIC = Heuristic(name="heuristic")
"""The reference rule that every comparison includes."""

ELEVEN_BEHAVIOURS: dict[str, Heuristic | UniformRandom] = {
    "baseline": Heuristic(name="baseline"),
    "early-intervener": Heuristic(name="early-intervener", min_epochs=3, plateau_epochs=2),
    "late-intervener": Heuristic(name="late-intervener", min_epochs=8, plateau_epochs=5),
    "quick-culler": Heuristic(name="quick-culler", prune_after=3),
    "patient-culler": Heuristic(name="patient-culler", prune_after=8),
    "blueprint-explorer": Heuristic(
        name="blueprint-explorer", blueprints=CNN_BLUEPRINTS, cycle_levers=True, start_by_replicate=True
    ),
    "aggressive": Heuristic(name="aggressive", min_epochs=3, plateau_epochs=2, prune_after=3),
    "conservative": Heuristic(name="conservative", min_epochs=8, plateau_epochs=5, prune_after=8),
    "random": UniformRandom(),
    "anti-kasmina": Heuristic(name="anti-kasmina", inverted=True),
    "periodic": Heuristic(name="periodic", period_epochs=5),
}


def behaviour(name: str) -> Heuristic | UniformRandom:
    """Return one of the eleven behaviours; an unknown name raises UnknownNameError."""
    if name not in ELEVEN_BEHAVIOURS:
        raise unknown_name("behaviour", name, ELEVEN_BEHAVIOURS)
    return ELEVEN_BEHAVIOURS[name]
