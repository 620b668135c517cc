"""The incubation study as a flow. What is stored is never run again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from esper.karn.incubation_page import update_incubation_page
from esper.karn.poc_page import check_page
from esper.leyline.poc import IncubationFile, IncubationTable
from esper.simic.poc_arms import replicates
from esper.simic.poc_incubation import (
    arm_results,
    cost_ratios,
    gains,
    plan_incubation,
    probe_columns,
    probe_correlations,
)
from flows.context import RunOptions, open_context
from flows.orchestration import Orchestrator
from flows.poc import DATASET, given_flags, run_missing, run_origin, use_data_folder
from flows.sizes import Sizes, sized_environment
from flows.stored import stored_episodes, stored_steps


class IncubationRequest(RunOptions):
    """The study on one environment; `out` is the page, raw values lie in the JSON file beside it."""

    task: str
    sizes: Sizes = Sizes()
    seeds: Annotated[int, Field(ge=2)] = 8
    data: str | None = None
    out: str = "docs/results/incubation.md"

    def check(self) -> None:
        """Raise where the environment is unknown, the study does not fit it, or the page cannot be written."""
        plan_incubation(sized_environment(self.task, self.sizes), 1)
        check_page(Path(self.out), IncubationFile)


def run_incubation(request: IncubationRequest, orchestrator: Orchestrator) -> IncubationTable:
    """Carry out the study and write its page.

    Raises:
        SpecError: The environment or a size is wrong.
        StoreError: The store or the page cannot be written.
    """
    use_data_folder(request.data)
    environment = sized_environment(request.task, request.sizes)
    plans, trials = plan_incubation(environment, request.seeds)
    started = time.monotonic()
    with open_context(
        request, DATASET, "poc-incubation", orchestrator, events={"environment": environment.name}
    ) as context:
        origin_of = run_origin(environment, command_line(request), started)  # a missing data set ends it here
        run_missing(context, f"incubation {request.task}", plans)
        ids = {trial.episode_id for trial in trials}
        episodes = stored_episodes(context.dataset, ids)
        gain = gains(trials, episodes)
        steps = stored_steps(context.dataset, ids, probe_columns(environment.host.num_slots))
    table = IncubationTable(
        environment=environment.name,
        replicates=tuple(replicates(request.seeds)),
        arms=tuple(arm_results(trials, gain, environment.slot_names)),
        probes=tuple(probe_correlations(trials, gain, steps)),
        costs=tuple(cost_ratios(trials, episodes)),
        origin=origin_of.model_copy(update={"wall_s": time.monotonic() - started}),
    )
    update_incubation_page(Path(request.out), table)
    return table


def command_line(request: IncubationRequest) -> str:
    """Return the command that makes the table."""
    parts = [f"esper poc incubation --task {request.task} --seeds {request.seeds}"]
    parts += given_flags(request, "data", "store")
    parts += given_flags(request.sizes, *Sizes.model_fields)
    return " ".join([*parts, f"--workers {request.workers} --out {request.out}"])
