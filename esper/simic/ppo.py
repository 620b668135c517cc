"""PPO from an offline checkpoint: who runs where, critic warm-up with a frozen policy, updates, regression gate.

Of every update's cohorts the environments take turns; replicates count up from FIRST_REPLICATE, so that no environment
seed is met twice and none of them is for data, selection or evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa

from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError
from esper.leyline.identity import Role
from esper.leyline.keys import derive_seed
from esper.leyline.library import load
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.pipelines import PpoSettings
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec
from esper.simic.batches import STEP_COLUMNS, Transitions, from_steps
from esper.simic.gate import Gate
from esper.simic.learning import OnLog, Stepper, TrainingError
from esper.simic.replay import unforced
from esper.simic.surrogate import Critic, PolicyUpdate, PpoRecipe, fit_critic
from esper.tamiyo.checkpoints import PolicyCard, load_checkpoint, save_checkpoint
from esper.tamiyo.networks import TreeNet, ValueNet, seeded, single_thread

__all__ = ["PpoRecipe", "fine_tune"]

Runner = Callable[[Sequence[CohortPlan]], list[dict[str, pa.Table]]]
"""Carries out cohorts; results in plan order."""

OnTables = Callable[[dict[str, pa.Table]], None]
Environments = Sequence[tuple[EnvironmentSpec, RewardSpec]]

FIRST_REPLICATE = 50_000
KL_LIMITS = (0.005, 5.0)


def fine_tune(
    start: LearnedPolicy,
    *,
    settings: PpoSettings,
    recipe: PpoRecipe | None = None,
    environments: Environments,
    run: Runner,
    out: Path,
    seed: int,
    on_log: OnLog,
    on_tables: OnTables,
    name: str = "ppo",
) -> LearnedPolicy:
    """Fine-tune a policy and write its checkpoint; the policies on the way go to `<out>.updates/<number>`.

    Args:
        start: The offline policy.
        settings: How many updates, episodes and environment seeds an update.
        recipe: The algorithm's specification; the recipe `ppo` unless given.
        environments: The mix, with the reward of each.
        run: Carries out cohorts.
        out: The checkpoint folder.
        seed: Training seed.
        on_log: Receives the numbers of each update.
        on_tables: Receives the tables of each cohort, for the store.
        name: The policy's name.

    Returns:
        The policy's specification (acting by its most probable choices).

    Raises:
        CheckpointError: The start is missing, damaged or another policy.
        SpecError: No environment, two of one name, fewer episodes than environment seeds, or a start that is no tree.
        TrainingError: A loss is not finite, or live episodes do not match the policy.
    """
    chosen = load("recipes", "ppo", PpoRecipe) if recipe is None else recipe
    _check(settings, environments)
    network, first = load_checkpoint(Path(start.path), start.digest)
    if not isinstance(network, TreeNet):
        raise SpecError(f"{first.name} is no tree network\n  expected: a policy that bc, rwbc, iql or cql trained")
    if network.spec.trunk != "mlp" or network.spec.form != "additive":
        raise SpecError(
            f"{first.name} has trunk {network.spec.trunk} and form {network.spec.form}\n  expected: mlp and additive; "
            "live episodes are learned from row by row, on the tree"
        )
    tuner = _Tuner(network, chosen, settings, environments, seed)
    card = _card(first, name, chosen, settings, environments, seed)
    metrics: dict[str, float] = {}
    for update in range(settings.updates):
        folder = out.with_name(f"{out.name}.updates") / f"{update:03d}"
        live = save_checkpoint(folder, tuner.policy, card.model_copy(update={"metrics": metrics}), sampled=True)
        plans = cohort_plans(live, update, settings, environments, chosen.explore)
        tables = run(plans)
        for table in tables:
            on_tables(table)
        with single_thread():
            metrics = tuner.update(_steps(tables), update)
        on_log(metrics)
    return save_checkpoint(out, tuner.policy, card.model_copy(update={"metrics": metrics}))


def _card(
    start: PolicyCard, name: str, recipe: PpoRecipe, settings: PpoSettings, environments: Environments, seed: int
) -> PolicyCard:
    """The card of a policy that goes on from another one's: the same network, data and verdict."""
    return PolicyCard(
        name=name,
        algorithm="ppo",
        network=start.network,
        recipe={"settings": settings.model_dump(mode="json"), **recipe.model_dump(mode="json")},
        rewards={env.name: reward.model_dump(mode="json") for env, reward in environments},
        dataset=start.dataset,
        dataset_digest=start.dataset_digest,
        verdict=start.verdict,
        unchecked=start.unchecked,
        override_reason=start.override_reason,
        start_digest=start.weights_sha256,
        training_seed=seed,
    )


def _check(settings: PpoSettings, environments: Environments) -> None:
    names = [environment.name for environment, _ in environments]
    if not names or len(set(names)) != len(names):
        raise SpecError(f"environments to fine-tune on: {names}\n  expected: at least one, each named once")
    if settings.episodes_per_update < settings.env_seeds_per_update:
        raise SpecError(
            f"{settings.episodes_per_update} episodes on {settings.env_seeds_per_update} environment seeds an update\n"
            "  expected: at least one episode on each"
        )


def cohort_plans(
    policy: LearnedPolicy, update: int, settings: PpoSettings, environments: Environments, explore: float
) -> list[CohortPlan]:
    """Return the cohorts of one update: environments in turn, episodes spread evenly over environment seeds."""
    plans = []
    for place in range(settings.env_seeds_per_update):
        index = update * settings.env_seeds_per_update + place
        environment, reward = environments[index % len(environments)]
        more = place < settings.episodes_per_update % settings.env_seeds_per_update
        episodes = tuple(
            PlannedEpisode(controller=policy, epsilon=explore, repetition=repetition, role=Role.ONLINE)
            for repetition in range(settings.episodes_per_update // settings.env_seeds_per_update + more)
        )
        replicate = FIRST_REPLICATE + index
        plans.append(CohortPlan(environment=environment, reward=reward, replicate=replicate, episodes=episodes))
    return plans


def _steps(tables: Sequence[Mapping[str, pa.Table]]) -> pa.Table:
    """The rows to learn from; a failed episode or one without a valid control has none."""
    kept = []
    for table in tables:
        episodes = table["episodes"]
        usable = pa.compute.and_(episodes["control_valid"], pa.compute.not_equal(episodes["outcome"], "failed"))
        ids = episodes.filter(usable)["episode_id"].combine_chunks()
        kept.append(table["steps"].select(STEP_COLUMNS).filter(pa.compute.is_in(table["steps"]["episode_id"], ids)))
    return pa.concat_tables(kept)


class _Tuner:
    """The state of a fine-tuning run."""

    def __init__(
        self, network: TreeNet, recipe: PpoRecipe, settings: PpoSettings, environments: Environments, seed: int
    ) -> None:
        self.policy = deepcopy(network).eval()
        self.start = network.eval()
        self.good = deepcopy(network.state_dict())
        self.recipe = recipe
        self.rewards = {environment.name: reward for environment, reward in environments}
        with seeded(derive_seed("critic", seed)):
            value = ValueNet(network.spec).eval()
        value.encoder.normaliser.load_state_dict(network.encoder.normaliser.state_dict())
        self.critic = Critic(value, recipe, (seed,))
        self.stepper = self._new_stepper(recipe.learning_rate)
        self.seed = seed
        self.beta = recipe.kl_coefficient
        self.warm = recipe.warmup_updates == 0
        self.gate = Gate(recipe.gate_updates)

    def _new_stepper(self, rate: float) -> Stepper:
        return Stepper(self.policy.parameters(), learning_rate=rate, clip=self.recipe.gradient_clip)

    def update(self, steps: pa.Table, number: int) -> dict[str, float]:
        """Learn from one update's episodes; return what was measured."""
        if not len(steps):
            raise TrainingError(
                f"no usable live episode in update {number}\n  see `error` and `control_valid` of `episodes`"
            )
        live = from_steps(steps, self.start.spec.view, self.rewards)
        returns = _returns(live)
        metrics = {"update": float(number), **_summary(returns)}
        if not self.warm:
            return metrics | self._warm_up(live, number, returns)
        if not self.gate.passes(returns):
            return metrics | self._step_back(live)
        self.good = deepcopy(self.policy.state_dict())
        return metrics | self._improve(live, number)

    def _warm_up(self, live: Transitions, number: int, returns: Mapping[str, list[float]]) -> dict[str, float]:
        self.gate.note_start(returns)
        explained = fit_critic(live, self.critic, self.recipe)[1]
        self.warm = number + 1 >= self.recipe.warmup_updates or explained > self.recipe.warmup_explained_variance
        return _finite({"frozen": 1.0, "explained_variance": explained})

    def _improve(self, live: Transitions, number: int) -> dict[str, float]:
        advantage, explained = fit_critic(live, self.critic, self.recipe)
        choices = unforced(live)
        if len(choices) < 2:
            raise TrainingError(f"update {number} met no decision with a choice\n  see the masks of the live episodes")
        update = PolicyUpdate(self.policy, self.start, self.stepper, self.recipe, (self.seed, number))
        measured = update.run(choices, advantage[~live.forced_N], self.beta)
        metrics = {"frozen": 0.0, "explained_variance": explained, "kl_coefficient": self.beta, **measured}
        if measured["kl_to_start"] > self.recipe.kl_high:
            self.beta = min(self.beta * self.recipe.kl_factor, KL_LIMITS[1])
        elif measured["kl_to_start"] < self.recipe.kl_low:
            self.beta = max(self.beta / self.recipe.kl_factor, KL_LIMITS[0])
        return _finite(metrics)

    def _step_back(self, live: Transitions) -> dict[str, float]:
        """Put the last good policy back, halve the rate, double the leash; the critic still learns."""
        self.policy.load_state_dict(self.good)
        self.stepper = self._new_stepper(self.stepper.base_rate / 2)
        self.beta = min(2 * self.beta, KL_LIMITS[1])
        self.gate.restart()
        explained = fit_critic(live, self.critic, self.recipe)[1]
        return _finite({"stepped_back": 1.0, "explained_variance": explained, "kl_coefficient": self.beta})


def _returns(live: Transitions) -> dict[str, list[float]]:
    """The return of each episode, by environment."""
    _, first = np.unique(live.episode_N, return_index=True)
    found: dict[str, list[float]] = {}
    for row in first:
        found.setdefault(live.environments[live.environment_N[row]], []).append(float(live.return_N[row]))
    return found


def _summary(returns: Mapping[str, list[float]]) -> dict[str, float]:
    every = [value for values in returns.values() for value in values]
    by_environment = {f"return_{name}": float(np.mean(values)) for name, values in returns.items()}
    return {"episodes": float(len(every)), "return": float(np.mean(every)), **by_environment}


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if np.isfinite(value)}
