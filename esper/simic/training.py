"""From a sealed version to a checkpoint: verdict, hold-out, learner, card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from esper.karn.overrides import record_override
from esper.karn.versions import Version
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import HealthError, SpecError, unknown_name
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.verdict import CheckResult, Level, Override, Use, Verdict
from esper.simic.batches import Transitions, load_transitions
from esper.simic.bc import BcRecipe, fit_bc
from esper.simic.cql import CqlRecipe, fit_cql
from esper.simic.iql import IqlRecipe, fit_iql
from esper.simic.learning import Fitted, OnLog
from esper.simic.splits import held_out_rows
from esper.tamiyo.checkpoints import PolicyCard, save_checkpoint
from esper.tamiyo.networks import single_thread

Algorithm = Literal["bc", "iql", "cql"]
Recipe = BcRecipe | IqlRecipe | CqlRecipe

RECIPES: dict[str, type[Recipe]] = {"bc": BcRecipe, "iql": IqlRecipe, "cql": CqlRecipe}
USES: dict[str, Use] = {"bc": Use.IMITATION, "iql": Use.OFFLINE_RL, "cql": Use.OFFLINE_RL}


def train(
    algorithm: Algorithm,
    version: Version,
    *,
    rewards: Mapping[str, RewardSpec],
    out: Path,
    seed: int,
    name: str | None = None,
    override_health: str | None = None,
    recipe: Recipe | None = None,
    on_log: OnLog,
) -> LearnedPolicy:
    """Train a policy on a sealed version and write its checkpoint; the same inputs give the same bytes.

    Args:
        algorithm: bc, iql or cql.
        version: The data; its verdict for the learner's use must not be block.
        rewards: The reward of each environment by its name.
        out: The checkpoint folder.
        seed: Training seed.
        name: The policy's name; the algorithm's unless given.
        override_health: Why to go ahead without a verdict, or against it; stored beside the verdict and in the
            checkpoint.
        recipe: The learner's specification; the recipe of the algorithm's name unless given.
        on_log: Receives the losses.

    Returns:
        The policy's specification (acting by its most probable choices).

    Raises:
        HealthError: The version is blocked or was never checked.
        SpecError: The recipe is of another algorithm, the data has nothing to learn from, or the reason says nothing.
        TrainingError: A loss is not finite.
    """
    chosen = _recipe(algorithm, recipe)
    level, override = admit(version, USES[algorithm], override_health, by=name or algorithm)
    transitions = load_transitions(version, chosen.network.view, rewards)
    held = held_out_rows(transitions)
    with single_thread():
        fitted = _fit(chosen, transitions.select(~held), transitions.select(held), seed, on_log)
    counts = {"training_rows": float((~held).sum()), "held_out_rows": float(held.sum())}
    counts["episodes_left_out"] = float(transitions.num_left_out)
    card = PolicyCard(
        name=name or algorithm,
        algorithm=algorithm,
        network=fitted.network.spec,
        recipe=chosen.model_dump(mode="json"),
        rewards={key: rewards[key].model_dump(mode="json") for key in transitions.environments},
        dataset=version.ref,
        dataset_digest=version.manifest.digest,
        verdict=level,
        unchecked=override is not None,
        override_reason=None if override is None else override.reason,
        training_seed=seed,
        metrics=counts | fitted.metrics,
    )
    return save_checkpoint(out, fitted.network, card)


def _recipe(algorithm: Algorithm, given: Recipe | None) -> Recipe:
    if algorithm not in RECIPES:
        raise unknown_name("algorithm", algorithm, RECIPES)
    chosen = load("recipes", algorithm, RECIPES[algorithm]) if given is None else given
    if type(chosen) is not RECIPES[algorithm]:
        raise SpecError(f"recipe {type(chosen).__name__} for {algorithm}\n  expected: {RECIPES[algorithm].__name__}")
    return chosen


def _fit(recipe: Recipe, train_rows: Transitions, held_out: Transitions, seed: int, on_log: OnLog) -> Fitted:
    if isinstance(recipe, BcRecipe):
        return fit_bc(train_rows, held_out, recipe, seed=seed, on_log=on_log)
    if isinstance(recipe, IqlRecipe):
        return fit_iql(train_rows, held_out, recipe, seed=seed, on_log=on_log)
    return fit_cql(train_rows, held_out, recipe, seed=seed, on_log=on_log)


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
        SpecError: The reason says nothing.
    """
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
