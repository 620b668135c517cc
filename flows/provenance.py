"""Where a sealed version comes from: specifications, code, packages, machine, and the host data's licence."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import JsonValue

from esper.leyline.matrix import CohortPlan, MatrixSpec
from esper.leyline.task_specs import TaskSpec

PACKAGES = (
    *("esper", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "pyarrow", "deltalake", "duckdb"),
    *("prefect", "pydantic"),
)

HOST_DATA: dict[str, dict[str, JsonValue]] = {
    "digits": {
        "name": "Optical Recognition of Handwritten Digits (test part), as bundled with scikit-learn",
        "source": "UCI Machine Learning Repository, E. Alpaydin and C. Kaynak, https://doi.org/10.24432/C50P49",
        "licence": "CC BY 4.0",
        "changes": "split by image; placed at random on a larger canvas with noise where the task says so",
    },
    "cifar10": {
        "name": "CIFAR-10",
        "source": "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "licence": "none stated by its authors",
        "changes": "split by image; mean-pooled where the task says so; a Parquet copy may hold JPEG images",
    },
    "images": {
        "name": "images of the user's own (the task's name and path say which)",
        "source": "the user",
        "licence": "not known to Esper",
        "changes": "split by image and resized",
    },
    "tinystories": {
        "name": "TinyStories, or the stories in the file that the task names",
        "source": "R. Eldan and Y. Li, TinyStories, 2023, https://arxiv.org/abs/2305.07759",
        "licence": "CDLA-Sharing-1.0; a file of one's own: not known to Esper",
        "changes": "split by story into words and marks; rare words replaced",
    },
    "tinystories-embedded": {
        "name": "generated stories, not TinyStories",
        "source": "Esper's embedded grammar",
        "licence": "MIT, as Esper",
        "changes": "split by story into words and marks; rare words replaced",
    },
}
"""Per kind of task, and for generated stories: whose data the hosts are trained on."""


def host_data(tasks: Iterable[TaskSpec]) -> list[JsonValue]:
    """Return whose data the tasks are made of, each named once."""
    embedded = {"embedded": "tinystories-embedded"}
    kinds = {embedded.get(getattr(task, "source", ""), task.kind) for task in tasks}
    return [HOST_DATA[kind] for kind in sorted(kinds)]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, JsonValue]:
    """Return what the machine is: CPU, cores, system, Python."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def provenance(matrix: MatrixSpec, plans: Sequence[CohortPlan], measured: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return what a version's manifest says about its origin; `rewards` are by environment."""
    from esper.tolaria.runtime import code_commit

    environments = {plan.environment.name: plan.environment for plan in plans}
    return {
        "matrix": matrix.model_dump(mode="json"),
        "environments": {name: spec.model_dump(mode="json") for name, spec in environments.items()},
        "rewards": {plan.environment.name: plan.reward.model_dump(mode="json") for plan in plans},
        "code_commit": code_commit(),
        "packages": {name: _package_version(name) for name in PACKAGES},
        "machine": machine(),
        "numerics": [*sorted({str(environment.numerics) for environment in environments.values()})],
        "host_data": host_data(environment.task for environment in environments.values()),
        "host_epochs": measured,
    }
