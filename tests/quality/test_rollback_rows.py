from __future__ import annotations

import pyarrow.compute as pc
import pytest
from factories import Tables, select_episodes, synthetic_tables
from health_cases import RULES, blocked, levels_of, measured
from health_faults import edit, rows_where

from esper.leyline.observations import slot_column
from esper.leyline.stages import Stage

STAGE = slot_column(0, "stage")


@pytest.fixture(scope="module")
def good() -> Tables:
    return synthetic_tables(num_env_seeds=2, horizon=12, behaviours=RULES)


def rolled_back_at(tables: Tables, row: int) -> Tables:
    """One episode, which says from `row` on that it was rolled back."""
    episode = tables["steps"]["episode_id"][row].as_py()
    out = edit(tables, "steps", "num_rollbacks", lambda old: [0] * row + [1] * (len(old) - row))
    out = edit(out, "steps", "num_rollbacks", lambda old: _of(out, episode, old))
    return edit(out, "episodes", "outcome", lambda old: _outcomes(out, episode, old))


def _of(tables: Tables, episode: str, values: list[object]) -> list[object]:
    ids = tables["steps"]["episode_id"].to_pylist()
    return [value if name == episode else 0 for name, value in zip(ids, values)]


def _outcomes(tables: Tables, episode: str, values: list[object]) -> list[object]:
    ids = tables["episodes"]["episode_id"].to_pylist()
    return ["rolled_back" if name == episode else value for name, value in zip(ids, values)]


def test_a_live_seed_after_a_rollback_is_a_contradiction_and_an_empty_host_is_none(good):
    living = rows_where(good, (pc.field(STAGE) == int(Stage.TRAINING)) & ~pc.field("is_last"))[2]
    empty = rows_where(good, (pc.field("actor") == "never-act") & (pc.field("step") == 4))[0]
    measures = {name: measured(rolled_back_at(good, row)) for name, row in (("living", living), ("empty", empty))}
    levels = levels_of(measures)
    assert "interventions_have_effect" in blocked(levels["living"])
    assert "interventions_have_effect" not in blocked(levels["empty"])
    told = {measure.check: measure.message for measure in measures["living"]}
    assert "outlived a rollback" in told["interventions_have_effect"]


def test_a_lineage_that_changes_without_action_or_rollback_is_still_a_contradiction_in_a_rolled_back_episode(good):
    row = rows_where(good, (pc.field("actor") == "never-act") & (pc.field("step") == 4))[0]
    episode = good["steps"]["episode_id"][row].as_py()
    alone = select_episodes(rolled_back_at(good, row), [episode])
    moved = edit(alone, "steps", "host_key", lambda old: [*old[:8], *["f" * 24] * (len(old) - 8)])
    levels = levels_of({"moved": measured(moved)})
    assert "interventions_have_effect" in blocked(levels["moved"])
