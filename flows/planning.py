"""From a matrix to the cohorts that remain to be run, and what they cost: alone, shared, and at the least."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

import pyarrow as pa
from pydantic import Field

from esper.karn.store import Dataset
from esper.karn.versions import Version
from esper.leyline.controller_specs import ELEVEN_BEHAVIOURS
from esper.leyline.errors import SpecError, unknown_name
from esper.leyline.identity import root_host_key
from esper.leyline.library import family_of, load, load_environment
from esper.leyline.matrix import Branch, Cell, CohortPlan, MatrixSpec
from esper.leyline.plans import expand
from esper.leyline.spec_base import Spec
from esper.leyline.specs import Numerics

BESIDE_BEHAVIOURS = ("schedule-sampler", "trials")
"""What a selection of behaviours may name beside the behaviours themselves: a cell's explorers, and its trials."""

GPU_POOL = "gpu"
"""The work pool whose slots are GPUs."""


class Selection(Spec):
    """A part of a matrix, or another number of its episodes; None leaves everything as it is.

    Attributes:
        environments: Environments of the matrix, or members of its families.
        behaviours: Behaviours, `schedule-sampler` and `trials`.
        epsilons: In place of the matrix's.
        episodes_per_combo: Episodes of each environment, behaviour and epsilon: its replicates times its repetitions.
        max_epochs: A shorter horizon.
    """

    environments: tuple[str, ...] | None = None
    behaviours: tuple[str, ...] | None = None
    epsilons: tuple[float, ...] | None = None
    episodes_per_combo: Annotated[int, Field(ge=1)] | None = None
    max_epochs: Annotated[int, Field(ge=1)] | None = None


class Estimate(Spec):
    """Host epochs of a plan.

    Attributes:
        episodes: Episodes planned, branches included.
        branches: How many of them branch off another one.
        cohorts: Cohorts they run in.
        alone_epochs: Host epochs if each episode ran alone, warm starts included.
        least_epochs: Host epochs of the trunks alone; nothing can be cheaper.
        measured_ratio: Epochs alone over epochs computed in the newest run of the dataset, None before the first.
    """

    episodes: int
    branches: int
    cohorts: int
    alone_epochs: int
    least_epochs: int
    measured_ratio: float | None


def plan_matrix(name: str, selection: Selection | None = None) -> tuple[MatrixSpec, list[CohortPlan]]:
    """Return a matrix, by name or TOML path, cut down to a selection, and its cohorts.

    `max_epochs` shortens horizons, which makes other environments (other ids) of the same names.

    Raises:
        UnknownNameError: The matrix, an environment or a behaviour is unknown; an environment is not in the matrix.
        SpecError: Nothing is left.
    """
    matrix = load("matrices", name, MatrixSpec)
    if selection is not None:
        matrix = _select(matrix, selection)
    plans = expand(matrix)
    if selection is not None and selection.max_epochs is not None:
        plans = [_shorten(plan, selection.max_epochs) for plan in plans]
    return matrix, plans


def _select(matrix: MatrixSpec, selection: Selection) -> MatrixSpec:
    environments = _selected_environments(matrix, selection)
    for name in selection.behaviours or ():
        if name not in BESIDE_BEHAVIOURS and name not in ELEVEN_BEHAVIOURS:
            raise unknown_name("behaviour", name, [*ELEVEN_BEHAVIOURS, *BESIDE_BEHAVIOURS])
    cells = []
    for cell in matrix.cells:
        changes: dict[str, object] = {}
        if selection.behaviours is not None:
            changes["behaviours"] = tuple(name for name in cell.behaviours if name in selection.behaviours)
            changes["explorers"] = cell.explorers if "schedule-sampler" in selection.behaviours else 0
            changes["trials"] = cell.trials if "trials" in selection.behaviours else ()
        if selection.epsilons is not None:
            changes["epsilons"] = selection.epsilons
        if selection.episodes_per_combo is not None:
            changes["replicates"] = _replicates(cell, selection.episodes_per_combo)
        for environment in environments[cell.environment]:
            cut = cell.model_copy(update={**changes, "environment": environment})
            if cut.behaviours or cut.explorers or cut.trials:
                cells.append(cut)
    branches = [branch for branch in matrix.branches if _is_selected(branch, selection)]
    if not cells and not branches:
        raise SpecError(
            f"nothing of matrix {matrix.name!r} is left after the selection\n"
            f"  its behaviours: {', '.join(sorted({name for cell in matrix.cells for name in cell.behaviours}))}"
        )
    kept = {"cells": [cell.model_dump() for cell in cells], "branches": [branch.model_dump() for branch in branches]}
    return MatrixSpec.parse({"name": matrix.name, **kept}, "the selection")


def _replicates(cell: Cell, episodes_per_combo: int) -> int:
    """The replicates of a cell that make so many episodes of each combination."""
    replicates, rest = divmod(episodes_per_combo, cell.repetitions)
    if rest or not replicates:
        raise SpecError(
            f"--episodes-per-combo {episodes_per_combo}: cell {cell.environment!r} repeats each episode "
            f"{cell.repetitions} times\n  expected: a multiple of {cell.repetitions}"
        )
    return replicates


def _selected_environments(matrix: MatrixSpec, selection: Selection) -> dict[str, list[str]]:
    """Return per cell what of it is selected: itself, or the members of its family that are named."""
    chosen: dict[str, list[str]] = {cell.environment: [] for cell in matrix.cells}
    if selection.environments is None:
        return {name: [name] for name in chosen}
    for name in (requested.replace("_", "-") for requested in selection.environments):
        family = family_of(name)
        if name in chosen:
            chosen[name] = [name]
        elif family in chosen and family is not None:
            member = load_environment(name).name
            chosen[family] = [*chosen[family], member] if family not in chosen[family] else [family]
        else:
            raise unknown_name(f"environment of matrix {matrix.name!r}:", name, chosen)
    return chosen


def _is_selected(branch: Branch, selection: Selection) -> bool:
    """Whether a branching's environment and parent are selected; its parent's epsilon is never replaced."""
    parent = branch.parent
    if selection.environments is not None and branch.environment not in selection.environments:
        return False
    if selection.behaviours is not None and parent.controller not in selection.behaviours:
        return False
    follows_epsilon = parent.controller not in ("never-act", "random", "schedule-sampler")
    return selection.epsilons is None or not follows_epsilon or (parent.epsilon or 0.0) in selection.epsilons


def _shorten(plan: CohortPlan, max_epochs: int) -> CohortPlan:
    """Cut the horizon, without the branches that leave later."""
    if plan.environment.horizon <= max_epochs:
        return plan
    environment = plan.environment.model_copy(update={"horizon": max_epochs})
    branches = tuple(branch for branch in plan.branches if branch.step < max_epochs)
    return plan.model_copy(update={"environment": environment, "branches": branches})


def remaining(plans: Sequence[CohortPlan], known: Collection[str]) -> list[CohortPlan]:
    """Return the plans without the episodes and branches whose ids are known; those with nothing left are left out."""
    rest = []
    for plan in plans:
        episodes = tuple(e for e, name in zip(plan.episodes, plan.episode_ids(), strict=True) if name not in known)
        branches = tuple(b for b, name in zip(plan.branches, plan.branch_ids(), strict=True) if name not in known)
        if episodes or branches:
            rest.append(plan.model_copy(update={"episodes": episodes, "branches": branches}))
    return rest


def under_numerics(
    plans: Sequence[CohortPlan], devices: Sequence[str] | None, numerics: Numerics | None = None
) -> list[CohortPlan]:
    """Return the plans as slots on these devices carry them out; other numerics give an episode another id.

    On GPUs an environment that declares the CPU's numerics runs under `cuda-fp32`; environment seeds stay the same, so
    the episodes are paired with those of the CPU.

    Args:
        plans: The cohorts.
        devices: The slots, all of one kind; left out, the CPU.
        numerics: For every environment, in place of its own.

    Raises:
        SpecError: Numerics that are not those of the devices.
    """
    kind = "cuda" if devices and devices[0] != "cpu" else "cpu"
    fitted = []
    for plan in plans:
        declared = plan.environment.numerics
        if numerics is None and kind == "cuda" and declared == "cpu-fp32":
            wanted: Numerics = "cuda-fp32"
        else:
            wanted = numerics or declared
        if wanted.partition("-")[0] != kind:
            raise SpecError(
                f"environment {plan.environment.name!r} under numerics {wanted!r} cannot run on "
                f"{' '.join(devices or ['cpu'])}\n  expected: --devices of that kind, or --numerics of the devices' own"
            )
        environment = plan.environment.model_copy(update={"numerics": wanted})
        fitted.append(plan if wanted == declared else plan.model_copy(update={"environment": environment}))
    return fitted


def slot_of_pool(pool: str, plans: Sequence[CohortPlan], numerics: Numerics | None) -> str:
    """Return a slot of the kind that a pool's workers fill: a GPU in pool `gpu`, else what the numerics ask for."""
    stated = numerics or (plans[0].environment.numerics if plans else "cpu-fp32")
    return "cuda:0" if pool == GPU_POOL or stated.startswith("cuda") else "cpu"


def slices(plan: CohortPlan, max_lineages: int | None) -> list[CohortPlan]:
    """Return a plan in parts of which none trains more than `max_lineages` lineages at once; None leaves it whole.

    A cohort has at most one lineage for each episode, and the trunk, which every part runs again. Episodes with less
    noise share more of their way, so those of one epsilon stay together. A branch goes with its parent. The rows are
    those of the whole cohort.

    Raises:
        SpecError: Not even one episode fits beside the trunk.
    """
    if max_lineages is None:
        return [plan]
    if max_lineages < 2:
        raise SpecError(f"--max-lineages {max_lineages}\n  expected: 2 or more, an episode's own lineage and the trunk")
    parents = [(plan.identity(branch.parent).episode_id, branch) for branch in plan.branches]
    stored = dict(zip(plan.episode_ids(), plan.episodes, strict=True))
    members = stored | {name: branch.parent for name, branch in parents}
    order = sorted(members, key=lambda name: (members[name].epsilon, members[name].temperature or 0.0))
    parts = []
    for start in range(0, len(order), max_lineages - 1):
        names = order[start : start + max_lineages - 1]
        episodes = tuple(stored[name] for name in names if name in stored)
        branches = tuple(branch for name, branch in parents if name in names)
        parts.append(plan.model_copy(update={"episodes": episodes, "branches": branches}))
    return parts


def one_by_one(plan: CohortPlan) -> list[CohortPlan]:
    """Return a plan's episodes as one plan and each of its branches as a plan of its own."""
    parts = [plan.model_copy(update={"branches": ()})] if plan.episodes else []
    return [*parts, *(plan.model_copy(update={"episodes": (), "branches": (b,)}) for b in plan.branches)]


def epochs_per_episode(plan: CohortPlan) -> int:
    """Return the host epochs of one episode that runs alone."""
    return plan.environment.horizon + plan.environment.warm_start_epochs


def estimate(plans: Sequence[CohortPlan], dataset: Dataset) -> Estimate:
    """Return what the plans cost."""
    return Estimate(
        episodes=sum(plan.num_planned for plan in plans),
        branches=sum(len(plan.branches) for plan in plans),
        cohorts=len(plans),
        alone_epochs=sum(plan.num_planned * epochs_per_episode(plan) for plan in plans),
        least_epochs=sum(epochs_per_episode(plan) for plan in plans),
        measured_ratio=_newest_ratio(dataset),
    )


def _newest_ratio(dataset: Dataset) -> float | None:
    ratios = (measured_ratio(version) for version in reversed(dataset.versions()))
    return next((ratio for ratio in ratios if ratio is not None), None)


def measured_ratio(version: Version) -> float | None:
    """Return host epochs alone over computed in the run that sealed a version, None where it computed none."""
    measured = version.manifest.provenance.get("host_epochs")
    ratio = measured.get("ratio") if isinstance(measured, dict) else None
    return float(ratio) if isinstance(ratio, int | float) else None


def computed_epochs(plan: CohortPlan, steps: pa.Table) -> int:
    """Return the host epochs that a cohort computed: distinct (host_key, epoch), the trunk always among them.

    A branch computes everything since its snapshot again, the trunk included. A parent that is not among the plan's
    episodes counts in full: its rows are not in the table.
    """
    trunk = root_host_key(plan.environment.spec_id, plan.env_seed, "host")
    trunk_pairs = {(trunk, epoch) for epoch in range(plan.environment.horizon + 1)}
    shared = set(trunk_pairs)
    start_of = {name: _snapshot(branch.step) for name, branch in zip(plan.branch_ids(), plan.branches, strict=True)}
    again = {name: set(trunk_pairs) for name in start_of}
    names = ("episode_id", "host_key", "step")
    for name, key, epoch in zip(*(steps[column].to_pylist() for column in names), strict=True):
        again.get(name, shared).add((key, epoch))
    replayed = sum(sum(epoch > start_of[name] for _, epoch in pairs) for name, pairs in again.items())
    parents = {plan.identity(branch.parent).episode_id for branch in plan.branches} - set(plan.episode_ids())
    own = sum(1 for _, epoch in shared if epoch >= 1) + plan.environment.warm_start_epochs
    return own + replayed + len(parents) * plan.environment.horizon


def _snapshot(step: int) -> int:
    """The epoch of the snapshot from which a branch at a step starts."""
    from esper.tolaria.governor import SNAPSHOT_EVERY_EPOCHS  # torch: after the cohorts ran, never before

    return step - step % SNAPSHOT_EVERY_EPOCHS
