"""What a trained imitation policy is worth: held-out environment seeds, then live beside the heuristic."""

from __future__ import annotations

import json
import time
from pathlib import Path

from esper.karn.versions import Version
from esper.leyline.controller_specs import HEURISTIC, Heuristic, LearnedPolicy, behaviour
from esper.leyline.errors import SpecError, StoreError
from esper.leyline.events import EventKind
from esper.leyline.imitation import Confusion, ImitationResult, LiveComparison
from flows.context import Context
from flows.versions import environments_of, rewards_of

RESULT = "imitation.json"


def rules_named(name: str) -> Heuristic:
    """Return the reference heuristic or a behaviour that is a rule.

    Raises:
        UnknownNameError: There is none of that name.
        SpecError: The behaviour draws at random.
    """
    if name == HEURISTIC.name:
        return HEURISTIC
    found = behaviour(name)
    if not isinstance(found, Heuristic):
        raise SpecError(f"behaviour {name!r} has no rules to stand beside\n  expected: 'heuristic' or a rule's name")
    return found


def judge_imitation(
    context: Context, version: Version, policy: LearnedPolicy, live_env_seeds: int = 0, heuristic: str | None = None
) -> ImitationResult:
    """Return what a policy gets right and how it does live; write it to `imitation.json` in the run's folder.

    The live episodes join the dataset with role `selection`.

    Args:
        context: The run.
        version: What it learned from.
        policy: The policy.
        live_env_seeds: Selection environment seeds of each environment; 0 for no live comparison.
        heuristic: The rule beside it, see `rules_named`; None: the one whose levers the policy uses.

    Raises:
        UnknownNameError: No rule has that name.
        SpecError: The checkpoint is of another kind, or there is one live environment seed.
        ControlError: Fewer than two environment seeds of an environment can be compared.
    """
    from esper.simic.imitation import ALL_DECISIONS, CHOICES
    from esper.tamiyo.checkpoints import read_card
    from esper.tamiyo.imitation import ImitationSpec

    card = read_card(Path(policy.path))
    if not isinstance(card.network, ImitationSpec):
        raise SpecError(f"checkpoint {policy.path} is a {card.network.kind} policy\n  expected: an imitation policy")
    rules = card.network.rules if heuristic is None else rules_named(heuristic)
    result = ImitationResult(
        dataset=version.ref,
        policy=policy,
        heuristic=rules.name,
        choices=Confusion.from_metrics(card.metrics, CHOICES),
        all_decisions=Confusion.from_metrics(card.metrics, ALL_DECISIONS),
        live=_live(context, version, policy, rules, live_env_seeds) if live_env_seeds else (),
    )
    path = context.folder / RESULT
    try:
        path.write_text(json.dumps(result.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
    return result


def _live(
    context: Context, version: Version, policy: LearnedPolicy, rules: Heuristic, num_env_seeds: int
) -> tuple[LiveComparison, ...]:
    """Run both on every environment of the version; all cohorts in one go, so that workers stay busy."""
    from esper.simic.imitation_live import compare_beside, plan_beside

    started = time.monotonic()
    rewards = rewards_of(version)
    meetings = [
        plan_beside(environment, rewards[name], rules=rules, policy=policy, num_env_seeds=num_env_seeds)
        for name, environment in environments_of(version).items()
    ]
    plans = [plan for meeting in meetings for plan in meeting.plans]
    context.progress.begin("live", len(plans))
    tables = iter(context.run_plans("live", plans, counted=True))
    found = tuple(compare_beside(meeting, [next(tables) for _ in meeting.plans]) for meeting in meetings)
    context.events.emit(EventKind.EVALUATED, {"arms": 2 * len(found), "wall_s": time.monotonic() - started})
    return found
