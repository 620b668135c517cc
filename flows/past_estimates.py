"""Past estimates and past live episodes of the same policies: how well the one ranked the other."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from esper.karn import delta
from esper.karn.store import Dataset
from esper.karn.tables import attempt_keys, last_attempts
from esper.karn.versions import Version
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import IntegrityError
from esper.leyline.identity import Role
from esper.leyline.ope import ALL, OpeResult, RankingQuality
from flows.versions import rewards_of

RESULT = "ope.json"
"""The file of an off-policy evaluation in its run's folder."""


def past_ranking(dataset: Dataset, version: Version, newest: OpeResult) -> list[RankingQuality]:
    """Return how well estimates of the dataset's runs, the newest included, ranked the policies that met live episodes.

    An estimate and a live return belong together by the digest of the weights; the newest estimate of a policy counts.
    Live episodes are those of role evaluation, by the most probable choices, so sampled estimates are left out.
    """
    from esper.simic.ope.ranking import ranking_quality

    predicted: dict[str, dict[str, tuple[str, float]]] = {}
    reference: dict[str, float] = {}
    for result in [*stored_results(dataset), newest]:
        for item in result.policies:
            if not item.sampled:
                predicted.setdefault(item.environment, {})[item.digest] = (item.policy, item.fqe.mean)
                reference[item.environment] = item.data_return
    live = live_returns(dataset, version)
    environments = [name for name in predicted if name != ALL]
    everywhere = [d for d in live if all(name in live[d] for name in environments)] if environments else []
    found = []
    for name in predicted if len(environments) > 1 else environments:
        if name == ALL:
            met = {digest: sum(live[digest][e] for e in environments) / len(environments) for digest in everywhere}
        else:
            met = {digest: values[name] for digest, values in live.items() if name in values}
        labels = {digest: f"{policy} {digest[:6]}" for digest, (policy, _) in predicted[name].items()}
        quality = ranking_quality(
            name,
            {labels[digest]: value for digest, (_, value) in predicted[name].items()},
            {labels[digest]: value for digest, value in met.items() if digest in labels},
            reference[name],
        )
        if quality is not None:
            found.append(quality)
    return found


def stored_results(dataset: Dataset) -> list[OpeResult]:
    """Return the off-policy evaluations of a dataset's runs, the oldest first.

    Raises:
        IntegrityError: One is damaged.
    """
    found = []
    for path in sorted((dataset.path / "runs").glob(f"*/{RESULT}")):
        try:
            found.append(OpeResult.model_validate_json(path.read_text(encoding="utf-8")))
        except (OSError, ValidationError) as error:
            raise IntegrityError(f"{path} is damaged: {str(error).splitlines()[0]}\n  move it away") from None
    return sorted(found, key=lambda result: result.created_at)


def live_returns(dataset: Dataset, version: Version) -> dict[str, dict[str, float]]:
    """Return the mean return of each learned policy's evaluation episodes, by digest and environment."""
    from esper.simic.ope.calibration import CONTROLLER
    from esper.simic.ope.live import episode_returns

    columns = ["episode_id", "attempt", "commit_id", "environment_spec", "role", "controller_spec", "outcome"]
    episodes = last_attempts(
        delta.read_current(dataset.place.child("episodes"), "episodes", [*columns, "control_valid"])
    )
    good = pc.and_(pc.equal(episodes["role"], Role.EVALUATION.value), episodes["control_valid"])
    episodes = episodes.filter(pc.and_(good, pc.not_equal(episodes["outcome"], "failed")))
    specs = {text: CONTROLLER.validate_json(text) for text in set(episodes["controller_spec"].to_pylist())}
    digests = {t: s.digest for t, s in specs.items() if isinstance(s, LearnedPolicy) and not s.sampled}
    episodes = episodes.filter(pc.is_in(episodes["controller_spec"], pa.array(sorted(digests), pa.string())))
    if not len(episodes):
        return {}
    names = ["attempt", "commit_id", "episode_id", "is_last", "reward_accuracy_points", "reward_growth_log2"]
    steps = delta.read_current(dataset.place.child("steps"), "steps", names)
    steps = steps.filter(pc.is_in(attempt_keys(steps), attempt_keys(episodes)))
    rewards = rewards_of(version)
    names_of = {text: json.loads(text)["name"] for text in set(episodes["environment_spec"].to_pylist())}
    rows = episodes.select(["episode_id", "environment_spec", "controller_spec"]).to_pylist()
    places = {row["episode_id"]: names_of[row["environment_spec"]] for row in rows}
    returns = episode_returns(steps, {e: rewards[place] for e, place in places.items() if place in rewards})
    sums: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        name = row["episode_id"]
        if name in returns:
            by_environment = sums.setdefault(digests[row["controller_spec"]], {})
            by_environment.setdefault(places[name], []).append(returns[name])
    return {d: {name: sum(v) / len(v) for name, v in of.items()} for d, of in sums.items()}
