"""From the specification of a controller to the controller."""

from __future__ import annotations

from pathlib import Path

from esper.leyline.controller_specs import (
    ControllerSpec,
    FixedSchedule,
    Heuristic,
    LearnedPolicy,
    NeverAct,
    ScheduleSampler,
    TrialKeep,
)
from esper.leyline.protocols import Controller
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.rules import NeverActController, UniformRandomController
from esper.tamiyo.schedules import FixedScheduleController, ScheduleSamplerController
from esper.tamiyo.trials import TrialKeepController


def build_controller(spec: ControllerSpec) -> Controller:
    """Return the controller that a specification describes; its name is the specification's.

    Only a learned policy imports torch.

    Raises:
        SpecError: The specification cannot be carried out.
        CheckpointError: The checkpoint of a learned policy is missing, damaged or another one.
    """
    if isinstance(spec, NeverAct):
        return NeverActController(spec)
    if isinstance(spec, Heuristic):
        return HeuristicController(spec)
    if isinstance(spec, FixedSchedule):
        return FixedScheduleController(spec)
    if isinstance(spec, ScheduleSampler):
        return ScheduleSamplerController(spec)
    if isinstance(spec, TrialKeep):
        return TrialKeepController(spec)
    if isinstance(spec, LearnedPolicy):
        from esper.tamiyo.loading import load_policy

        return load_policy(Path(spec.path), sampled=spec.sampled, name=spec.name, digest=spec.digest)
    return UniformRandomController(spec)
