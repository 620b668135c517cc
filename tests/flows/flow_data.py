"""A tiny sealed dataset with checkpoints of random policies, made by the real engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tiny

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.identity import EVALUATION_START, Role
from esper.leyline.library import load, load_environment
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.rewards import RewardSpec
from esper.tamiyo.checkpoints import PolicyCard, save_checkpoint
from esper.tamiyo.networks import NetworkSpec, TreeNet, seeded
from esper.tolaria.workers import cohort_engine
from flows.context import Context
from flows.planning import plan_matrix


@dataclass(frozen=True)
class Prepared:
    folder: Path
    version: Version
    policies: dict[str, LearnedPolicy]

    def moved(self, folder: Path) -> Prepared:
        """The same in a copy of the folder."""
        policies = {
            name: policy.model_copy(update={"path": str(folder / "policies" / name)})
            for name, policy in self.policies.items()
        }
        return Prepared(folder, open_store(folder / "store").resolve(self.version.ref), policies)

    def evaluate(self, context: Context) -> None:
        """Live episodes of every policy on two evaluation seeds."""
        episodes = tuple(PlannedEpisode(controller=p, role=Role.EVALUATION) for p in self.policies.values())
        context.run_plans("live", [_plan(EVALUATION_START + i, episodes) for i in range(2)])


def _plan(replicate: int, episodes: tuple[PlannedEpisode, ...]) -> CohortPlan:
    environment, reward = load_environment("tiny"), load("rewards", "tiny", RewardSpec)
    return CohortPlan(environment=environment, reward=reward, replicate=replicate, episodes=episodes)


def prepare(folder: Path, names: tuple[str, ...]) -> Prepared:
    """Run the matrix `tiny` of the working directory, seal it, and write checkpoints of random networks."""
    _, plans = plan_matrix("tiny")
    with tiny.context(folder, cohort_engine) as context:
        for plan in plans:
            context.commit(cohort_engine(plan))
        environment, reward = plans[0].environment, plans[0].reward
        version = context.dataset.seal(
            matrix_id="tiny",
            provenance={
                "environments": {environment.name: environment.model_dump(mode="json")},
                "rewards": {environment.name: reward.model_dump(mode="json")},
            },
        )
    policies = {}
    for number, name in enumerate(names):
        with seeded(number):
            network = TreeNet(NetworkSpec(hidden=8, slot_hidden=4))
        card = PolicyCard(name=name, algorithm="bc", network=network.spec, recipe={}, rewards={}, training_seed=number)
        policies[name] = save_checkpoint(folder / "policies" / name, network, card)
    return Prepared(folder, version, policies)
