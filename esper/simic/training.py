"""From a sealed version to a checkpoint: verdict, hold-out, learner, card.

A run that was killed goes on: what it had stored is taken up, and the checkpoint is the same, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from esper.karn.kinds import refuse_skeleton
from esper.karn.overrides import record_override
from esper.karn.policy_card import write_policy_page
from esper.karn.splits_stored import DEFAULT_NAME, find_split
from esper.karn.versions import Version
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import CheckpointError, HealthError, SpecError, unknown_name
from esper.leyline.grid import Algorithm, Backend, default_name, merged
from esper.leyline.identity import ENGINE_VERSION
from esper.leyline.keys import hex_digest
from esper.leyline.library import find
from esper.leyline.rewards import RewardSpec
from esper.leyline.spec_base import read_toml
from esper.leyline.verdict import CheckResult, Level, Override, Use, Verdict
from esper.simic.batches import Transitions
from esper.simic.bc import BcRecipe, RwbcRecipe, fit_bc
from esper.simic.cql import CqlRecipe, fit_cql
from esper.simic.d3rlpy_backend import D3rlpyRecipe, fit_d3rlpy
from esper.simic.imitation import ImitateRecipe, fit_imitation, load_demonstrations
from esper.simic.iql import IqlRecipe, fit_iql
from esper.simic.learning import Fitted, LearnerSpec, OnLog
from esper.simic.load_tensors import load_tensors
from esper.simic.resume import Progress
from esper.simic.row_files import memory_budget
from esper.simic.splits import split_rows
from esper.tamiyo.checkpoints import PolicyCard, load_checkpoint, save_checkpoint
from esper.tamiyo.networks import single_thread

Recipe = BcRecipe | RwbcRecipe | IqlRecipe | CqlRecipe | ImitateRecipe | D3rlpyRecipe

RECIPES: dict[str, type[Recipe]] = {
    "bc": BcRecipe,
    "rwbc": RwbcRecipe,
    "iql": IqlRecipe,
    "cql": CqlRecipe,
    "imitate": ImitateRecipe,
}
D3RLPY = ("bc", "iql", "cql")
USES: dict[str, Use] = {
    "bc": Use.IMITATION,
    "rwbc": Use.IMITATION,
    "iql": Use.OFFLINE_RL,
    "cql": Use.OFFLINE_RL,
    "imitate": Use.IMITATION,
}

STORE_EVERY_STEPS = 500
"""Gradient steps from one stored state to the next; storing one costs about as much as ten of them."""


def recipe_class(algorithm: str, backend: Backend = "esper") -> type[Recipe]:
    """Return the class of a learner's recipe.

    Raises:
        UnknownNameError: There is no such learner.
        SpecError: The backend does not have it.
    """
    if algorithm not in RECIPES:
        raise unknown_name("algorithm", algorithm, RECIPES)
    if backend == "esper":
        return RECIPES[algorithm]
    if algorithm not in D3RLPY:
        raise SpecError(f"d3rlpy has no {algorithm} here\n  expected: {', '.join(D3RLPY)}, or --backend esper")
    return D3rlpyRecipe


def load_recipe(
    algorithm: Algorithm,
    backend: Backend = "esper",
    name: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return a recipe of the library or of a TOML file, with some fields replaced.

    Args:
        algorithm: The learner.
        backend: Whose implementation of it.
        name: Of the recipe, or a path that ends in `.toml`; the one of the learner's name unless given.
        changes: Values by field, nested as in the recipe.

    Raises:
        UnknownNameError: There is no such learner or recipe.
        SpecError: A field is unknown (the nearest is named) or its value is wrong.
    """
    kind = recipe_class(algorithm, backend)
    path = find("recipes", name or default_name(algorithm, backend))
    data = merged(read_toml(path), changes or {})
    if backend == "d3rlpy":
        data = {"algorithm": algorithm, **data}
    recipe = kind.parse(data, f"recipe of {algorithm} ({path})")
    return _matching(recipe, algorithm, backend)


def total_steps(recipe: Recipe) -> tuple[int, int]:
    """Return the gradient steps of a recipe's values, if it trains them first, and of its policy."""
    return int(getattr(recipe, "value_steps", 0)), recipe.steps


def train(
    algorithm: Algorithm,
    version: Version,
    *,
    rewards: Mapping[str, RewardSpec],
    out: Path,
    seed: int,
    name: str | None = None,
    override_health: str | None = None,
    backend: Backend = "esper",
    recipe: Recipe | None = None,
    split: str = DEFAULT_NAME,
    resume: Path | None = None,
    on_log: OnLog,
) -> LearnedPolicy:
    """Train a policy on a sealed version and write its checkpoint; the same inputs give the same bytes.

    Args:
        algorithm: The learner.
        version: The data; its verdict for the learner's use must not be block.
        rewards: The reward of each environment by its name.
        out: The checkpoint folder.
        seed: Training seed.
        name: The policy's name; the learner's unless given.
        override_health: Why to go ahead without a verdict, or against it; stored beside the verdict and in the
            checkpoint.
        backend: Whose implementation of the learner.
        recipe: The learner's specification; the recipe of the learner's name unless given.
        split: Name of the stored split of the version whose validation seeds are held out.
        resume: Folder for the state of the training while it goes on. What a killed run left there is taken up, and
            where `out` holds this very policy already, it is returned as it is. None starts over. d3rlpy's learners
            always start over: their state is not ours to store.
        on_log: Receives the losses; it is never called where the policy was there already.

    Returns:
        The policy's specification (acting by its most probable choices).

    Raises:
        HealthError: The version is blocked or was never checked.
        SpecError: The recipe is of another learner, the data has nothing to learn from, the reason says nothing, or
            `resume` holds the state of another training.
        UnknownNameError: There is no such split.
        TrainingError: A loss is not finite.
    """
    chosen = load_recipe(algorithm, backend) if recipe is None else _matching(recipe, algorithm, backend)
    label = name or default_name(algorithm, backend)
    level, override = admit(version, USES[algorithm], override_health, by=label)
    card: dict[str, Any] = {"name": label, "algorithm": algorithm, "training_seed": seed}
    card["recipe"] = chosen.model_dump(mode="json")
    card["rewards"] = {key: reward.model_dump(mode="json") for key, reward in rewards.items()}
    card |= {"dataset": version.ref, "dataset_digest": version.manifest.digest, "verdict": level}
    if override is not None:
        card |= {"unchecked": True, "override_reason": override.reason}
    of_version = find_split(version, split)
    card["split"] = None if split == DEFAULT_NAME else split
    if resume is not None and (stored := _stored(out, card)) is not None:
        return stored
    progress = None if resume is None else Progress(resume, STORE_EVERY_STEPS, _identity(card))
    transitions = _load(version, chosen, rewards)
    learned, held = (transitions.select(rows) for rows in split_rows(transitions, of_version))
    del transitions  # where the states stay on disk, what was copied into the two is most of the memory
    counts = {"training_rows": float(len(learned)), "held_out_rows": float(len(held))}
    counts["episodes_left_out"] = float(learned.num_left_out)
    card["rewards"] = {key: card["rewards"][key] for key in learned.environments}
    with single_thread():
        fitted = _fit(chosen, learned, held, seed, on_log, progress)
    policy = _save(out, fitted, card | {"metrics": counts | fitted.metrics})
    if progress is not None:
        progress.remove()
    return policy


def _save(out: Path, fitted: Fitted, card: Mapping[str, Any]) -> LearnedPolicy:
    policy = save_checkpoint(out, fitted.network, PolicyCard(**card, network=fitted.network.spec))
    write_policy_page(out)
    return policy


def _matching(recipe: Recipe, algorithm: str, backend: Backend) -> Recipe:
    kind = recipe_class(algorithm, backend)
    if type(recipe) is not kind or getattr(recipe, "algorithm", algorithm) != algorithm:
        raise SpecError(f"recipe {type(recipe).__name__} for {algorithm}\n  expected: {kind.__name__}")
    return recipe


def _identity(card: Mapping[str, Any]) -> str:
    """Whose progress it is: all that the trained weights depend on."""
    names = ["algorithm", "recipe", "rewards", "dataset_digest", "training_seed"]
    names += ["split"] if card["split"] else []
    return hex_digest([{name: card[name] for name in names}, package_version("esper"), ENGINE_VERSION])


def _stored(out: Path, card: Mapping[str, Any]) -> LearnedPolicy | None:
    """The policy in a checkpoint folder, where the folder is whole and what training would write into it again."""
    try:
        _, found = load_checkpoint(out)
    except CheckpointError:
        return None
    learned = {"network": found.network, "metrics": found.metrics, "weights_sha256": found.weights_sha256}
    rewards = {key: card["rewards"].get(key, {}) for key in found.rewards}
    wanted = PolicyCard(**{**card, **learned, "rewards": rewards, "code_version": package_version("esper")})
    if found != wanted:
        return None
    write_policy_page(out)
    return LearnedPolicy(name=found.name, path=str(out), digest=found.weights_sha256)


def _load(version: Version, recipe: Recipe, rewards: Mapping[str, RewardSpec]) -> Transitions:
    if isinstance(recipe, ImitateRecipe):
        return load_demonstrations(version, recipe, rewards)
    if not isinstance(recipe, LearnerSpec):
        return load_tensors(version, recipe.view, rewards)  # d3rlpy wants arrays
    return load_tensors(version, recipe.network.view, rewards, budget_bytes=memory_budget())


def _fit(
    recipe: Recipe,
    train_rows: Transitions,
    held_out: Transitions,
    seed: int,
    on_log: OnLog,
    progress: Progress | None,
) -> Fitted:
    if isinstance(recipe, BcRecipe):
        return fit_bc(train_rows, held_out, recipe, seed=seed, on_log=on_log, progress=progress)
    if isinstance(recipe, IqlRecipe):
        return fit_iql(train_rows, held_out, recipe, seed=seed, on_log=on_log, progress=progress)
    if isinstance(recipe, CqlRecipe):
        return fit_cql(train_rows, held_out, recipe, seed=seed, on_log=on_log, progress=progress)
    if isinstance(recipe, ImitateRecipe):
        return fit_imitation(train_rows, held_out, recipe, seed=seed, on_log=on_log, progress=progress)
    return fit_d3rlpy(train_rows, held_out, recipe, seed=seed, on_log=on_log, progress=progress)


def admit(version: Version, use: Use, reason: str | None, *, by: str) -> tuple[Level | None, Override | None]:
    """Return a version's level for a use, and the override if the verdict stood against it.

    An override is stored beside the verdict. A reason that turns out not to be needed is not.

    Args:
        version: The data.
        use: What they are used for.
        reason: Why to use them without a verdict, or against it; None refuses.
        by: What uses them.

    Raises:
        HealthError: Blocked or never checked, and there is no reason.
        SpecError: The reason says nothing, or the version holds made-up episodes.
    """
    refuse_skeleton(version)
    verdict = version.verdict()
    level = None if verdict is None else verdict.level(use)
    if level is not None and level is not Level.BLOCK:
        return level, None
    if reason is not None:
        return level, record_override(version, use, level, reason, by)
    hint = "or pass --override-health REASON, which every later report prints"
    if verdict is None:
        raise HealthError(f"{version.ref} was never checked\n  run `esper health {version.ref}`, {hint}")
    reasons = "\n".join(f"  {check.environment}: {check.message}" for check in _blocking(verdict, use))
    remedy = f"`esper health {version.ref} --suggest` proposes a remedy"
    raise HealthError(f"{version.ref} is blocked for {use.value}\n{reasons}\n  {remedy}, {hint}")


def _blocking(verdict: Verdict, use: Use) -> list[CheckResult]:
    return [check for check in verdict.checks if check.level is Level.BLOCK and use in check.uses]
