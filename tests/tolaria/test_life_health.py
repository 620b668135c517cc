"""Data made under the options of life passes the checks of health; data in which those options were broken does not."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from engine_specs import plan_of, tiny_environment

from esper.kasmina import gates
from esper.leyline.actions import Op, pack_mask, slot_slice, unpack_mask
from esper.leyline.controller_specs import FixedSchedule, Plant, behaviour
from esper.leyline.matrix import PlannedEpisode
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import Stage
from esper.tolaria.rollout import run_cohort
from quality import dynamics
from quality.checking import measure_all
from quality.measures import environments
from quality.tree_audit import run_audit
from quality.working import prepare

Tables = dict[str, pa.Table]

EVERYTHING = {
    "ask_at_every_gate": True,
    "holding_patience": 2,
    "max_seeds": 1,
    "max_fossils": 1,
    "param_budget": 500,
}
CHECKS = (
    *("legal_transitions", "interventions_have_effect", "executed_flags", "alpha_range", "masks_recompute"),
    *("valid_actions", "propensity_consistent", "required_values", "feature_ranges", "germinations_make_seeds"),
)


def dataset(**options: object) -> Tables:
    small = {"horizon": 10, "batches_per_epoch": 1, "batch_size": 16, "tempos": (3,), "dwells": (1,)}
    spec = tiny_environment(**{**small, **options})
    slot = int(np.flatnonzero(spec.enabled_slots)[0])
    blend = "gated" if "gated" in [str(b) for b in spec.blends] else "linear"
    plant = Plant(slot=slot, blueprint="norm", birth_epoch=0, blend=blend, tempo_epochs=3, dwell_epochs=1)
    random = [PlannedEpisode(controller=behaviour("random"), epsilon=1.0, repetition=r) for r in range(8)]
    return run_cohort(plan_of([PlannedEpisode(controller=FixedSchedule(name="whole", plants=(plant,))), *random], spec))


def connected(tables: Tables) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"threads": 1})
    for name, table in tables.items():
        connection.register(f"arrow_{name}", table)
        connection.execute(f"CREATE TABLE {name} AS FROM arrow_{name}")
    return connection


def offences(tables: Tables) -> set[str]:
    """The checks of lives and masks that the tables fail."""
    with connected(tables) as connection:
        prepare(connection)
        failed = {m.check for m in dynamics.measure(connection, environments(connection)) if m.value}
        audit = run_audit(connection)
    tallies = {"masks_recompute": audit.masks, "valid_actions": audit.actions, "propensity": audit.propensities}
    return failed | {name for name, tally in tallies.items() if tally.counts}


def stages_of(tables: Tables) -> set[int]:
    return {value for slot in range(3) for value in tables["steps"][f"s{slot}_stage"].to_pylist()}


def put(tables: Tables, where: pc.Expression, **values: object) -> Tables:
    """The first row of `steps` that matches, changed."""
    steps = tables["steps"]
    row = steps.append_column("at", pa.array(range(len(steps)))).filter(where)["at"][0].as_py()
    for name, value in values.items():
        field = steps.schema.field(name)
        changed = steps[name].to_pylist()
        changed[row] = value(changed[row]) if callable(value) else value
        steps = steps.set_column(steps.schema.get_field_index(name), field, pa.array(changed, field.type))
    return {**tables, "steps": steps}


def respecify(tables: Tables, **options: object) -> Tables:
    """The same rows, said to come from an environment with other options."""
    episodes = tables["episodes"]
    spec = EnvironmentSpec.model_validate_json(episodes["environment_spec"][0].as_py()).model_copy(update=options)
    column = pa.array([spec.model_dump_json()] * len(episodes), episodes["environment_spec"].type)
    index = episodes.schema.get_field_index("environment_spec")
    return {**tables, "episodes": episodes.set_column(index, episodes.schema.field(index), column)}


@pytest.fixture(scope="module")
def asked() -> Tables:
    return dataset(ask_at_every_gate=True)


@pytest.fixture(scope="module")
def plain() -> Tables:
    return dataset()


@pytest.mark.parametrize(
    "options",
    [
        {"ask_at_every_gate": True, "gates": "strict", "slots": ("mid",)},
        {**EVERYTHING, "blends": ("gated",)},
        {"holding_patience": 1, "blends": ("gated", "linear"), "param_budget": 300},
    ],
)
def test_data_made_under_any_options_is_sound(options):
    tables = dataset(**options)
    with connected(tables) as connection:
        found = {m.check: m.value for m in measure_all(connection) if m.check in CHECKS}
    assert found == dict.fromkeys(CHECKS, 0.0)
    if options.get("ask_at_every_gate"):
        assert int(Stage.GERMINATED) in stages_of(tables)


def test_lives_in_which_every_gate_was_asked_are_whole_and_no_others(asked):
    assert {int(stage) for stage in (Stage.GERMINATED, Stage.BLENDING, Stage.FOSSILIZED)} <= stages_of(asked)
    assert offences(asked) == set()
    others = offences(respecify(asked, ask_at_every_gate=False))
    assert {"legal_transitions", "interventions_have_effect", "masks_recompute"} <= others


def test_lives_in_which_gates_opened_by_themselves_are_not_those_of_an_environment_that_asks(plain):
    others = offences(respecify(plain, ask_at_every_gate=True))
    assert {"legal_transitions", "interventions_have_effect"} <= others


def test_a_stage_that_lasts_too_long_is_no_legal_life(plain):
    assert offences(plain) == set()
    blending = pc.field("s0_stage") == int(Stage.BLENDING)
    assert offences(put(plain, blending, s0_epochs_in_stage=3)) == {"legal_transitions"}
    embargoed = pc.field("s0_stage") == int(Stage.EMBARGOED)
    assert offences(put(plain, embargoed, s0_epochs_in_stage=5)) == {"legal_transitions"}


def test_a_seed_that_was_held_without_an_advance_is_found(asked):
    full = (pc.field("s0_stage") == int(Stage.HOLDING)) & (pc.field("op") == "FOSSILIZE")
    steps = asked["steps"]
    episode = steps.filter(full)["episode_id"][0].as_py()
    advance = (pc.field("episode_id") == episode) & (pc.field("s0_stage") == int(Stage.BLENDING))
    tampered = put(asked, advance & (pc.field("op") == "ADVANCE"), op="WAIT", action_slot=0)
    assert "interventions_have_effect" in offences(tampered)


def test_a_slot_that_is_not_in_use_is_no_place_to_germinate(plain):
    tables = dataset(slots=("early",))
    assert offences(tables) == set()

    def allow(packed: bytes) -> bytes:
        mask = unpack_mask(np.frombuffer(packed, dtype=np.uint8)[None]).copy()
        mask[0, slot_slice(Op.GERMINATE)][1] = True
        mask[0, slot_slice(Op.GERMINATE).start + 1] = True
        return pack_mask(mask)[0].tobytes()

    free = (pc.field("step") == 0) & ~pc.field("is_last")
    assert "masks_recompute" in offences(put(tables, free, tree_mask=allow))
    assert "masks_recompute" in offences(respecify(plain, slots=("early",)))


def test_a_strict_gate_that_let_a_seed_through_below_its_threshold_is_found(monkeypatch):
    for name in ("G2_MIN_IMPROVEMENT_POINTS", "G2_MIN_GRADIENT_RATIO", "G5_MIN_REMOVAL_COST_POINTS"):
        monkeypatch.setattr(gates, name, -float("inf"))
    monkeypatch.setattr(gates, "G2_VANISHED_SHARE", float("inf"))
    assert offences(dataset(gates="strict")) == {"executed_flags"}


def test_a_permissive_gate_that_refused_by_a_measure_is_found():
    strict = dataset(gates="strict")
    assert offences(strict) == set()
    assert "G2:seed_improvement" in ",".join(filter(None, strict["steps"]["refused_by"].to_pylist()))
    assert offences(respecify(strict, gates="permissive")) == {"executed_flags"}
