"""A store with a small sealed version to learn from, and recipes of a few steps."""

from __future__ import annotations

from pathlib import Path

from factories import synthetic_tables

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec

SMALL = "batch_size = 16\nlog_every = {log_every}\nnetwork.hidden = 16\nnetwork.slot_hidden = 8\n"
REASON = ["--override-health", "a test"]


def write_store(folder: Path, *, num_env_seeds: int = 4) -> Version:
    """The version small@1 in FOLDER/store; never checked, so training it takes a reason."""
    dataset = open_store(folder / "store").dataset("small")
    dataset.commit(synthetic_tables(num_env_seeds=num_env_seeds, behaviours=("baseline", "random")))
    rewards = {"digits-gap": load("rewards", "digits-gap", RewardSpec).model_dump(mode="json")}
    return dataset.seal(matrix_id="test", provenance={"rewards": rewards})


def write_recipes(folder: Path, *, steps: int = 4, log_every: int = 2) -> None:
    """FOLDER/datasets/recipes: the learners with small networks and few steps."""
    recipes = folder / "datasets" / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    common = f"steps = {steps}\n" + SMALL.format(log_every=log_every)
    for name in ("bc", "rwbc", "cql"):
        (recipes / f"{name}.toml").write_text(common)
    (recipes / "iql.toml").write_text(common + f"value_steps = {steps}\n")
    (recipes / "imitate.toml").write_text(f"steps = {steps}\nlog_every = {log_every}\nbatch_size = 16\n")
    for name in ("bc", "cql"):
        text = f"steps = {steps}\nlog_every = {log_every}\nbatch_size = 16\nhidden = [16]\n"
        (recipes / f"d3rlpy-{name}.toml").write_text(text)


def write_grid(folder: Path, text: str) -> str:
    path = folder / "grid.toml"
    path.write_text('name = "g"\n' + text)
    return str(path)
