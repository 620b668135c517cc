"""A library of tiny specifications: an environment that trains in milliseconds, and matrices over it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from esper.karn.store import open_store
from esper.nissa.writer import EventWriter
from esper.tolaria.workers import CohortPool, Engine
from flows.context import Context
from flows.orchestration import LocalOrchestrator, Orchestrator
from flows.progress import PlainReporter

ENVIRONMENT = """
name = "{name}"
learning_rate = 0.05
batch_size = 8
batches_per_epoch = 1
horizon = {horizon}
tempos = [3]
dwells = [1]

[task]
kind = "digits"
sources = [32, 16, 16]

[host]
kind = "cnn"
channels = [2, 2]
kernels = [1, 1]
pools = [2, 2]
"""

REWARD = 'name = "tiny"\nmode = "gain"\nrent_points = 3.0\nscale_points = 9.0\n'


def write_library(
    folder: Path, *, replicates: int = 3, horizon: int = 5, behaviours: str = '"baseline", "random"'
) -> Path:
    root = folder / "datasets"
    for kind in ("environments", "rewards", "matrices", "pipelines"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    (root / "environments" / "tiny.toml").write_text(ENVIRONMENT.format(name="tiny", horizon=horizon))
    (root / "rewards" / "tiny.toml").write_text(REWARD)
    (root / "matrices" / "tiny.toml").write_text(
        f'name = "tiny"\n[[cells]]\nenvironment = "tiny"\nreward = "tiny"\nbehaviours = ["baseline", "random"]\n'
        f"epsilons = [0.0, 0.5]\nexplorers = 1\nreplicates = {replicates}\n"
    )
    return root


PIPELINE = """
name = "tiny"
matrix = "tiny"
[ppo]
updates = 1
episodes_per_update = 2
env_seeds_per_update = 2
[[evaluation]]
environment = "tiny"
reward = "tiny"
env_seeds = 2
selection_seeds = 2
[[controls]]
environment = "tiny"
best_fixed_gain_points = {bounds}
"""

RECIPES = {
    "bc": "steps = 5\nbatch_size = 32\nlearning_rate = 1e-3\n",
    "iql": "value_steps = 5\nsteps = 5\nbatch_size = 32\nlearning_rate = 1e-3\n",
    "cql": "steps = 5\nbatch_size = 32\nlearning_rate = 1e-3\n",
}


def write_pipeline(folder: Path, *, bounds: str) -> None:
    """A pipeline over a host that trains: all behaviours, learners of five steps, one control."""
    root = write_library(folder, horizon=12)
    spec = root / "environments" / "tiny.toml"
    wider = (
        spec.read_text().replace("channels = [2, 2]", "channels = [6, 6]").replace("batch_size = 8", "batch_size = 16")
    )
    spec.write_text(wider.replace("sources = [32, 16, 16]", "sources = [64, 32, 32]"))
    (root / "matrices" / "tiny.toml").write_text(
        'name = "tiny"\n[[cells]]\nenvironment = "tiny"\nreward = "tiny"\nexplorers = 4\nreplicates = 3\n'
    )
    (root / "pipelines" / "tiny.toml").write_text(PIPELINE.format(bounds=bounds))
    (root / "recipes").mkdir()
    for name, text in RECIPES.items():
        (root / "recipes" / f"{name}.toml").write_text(text)


@contextlib.contextmanager
def context(folder: Path, engine: Engine, *, workers: int = 0, orchestrator: Orchestrator | None = None):
    """A context as `open_context` makes it, with another engine in its pool."""
    store = open_store(folder / "store")
    run = store.root / "tiny" / "runs" / "r1"
    with EventWriter(run, "r1") as events, CohortPool(workers, engine=engine) as pool:
        chosen = orchestrator or LocalOrchestrator(max(1, workers))
        yield Context(store, store.dataset("tiny"), "r1", run, pool, chosen, PlainReporter(io.StringIO()), events)
