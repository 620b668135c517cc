"""Views, position by position, on columns made by hand."""

import numpy as np
import pytest

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.errors import UnknownNameError
from esper.leyline.observations import FEATURE_BY_NAME, FEATURE_COLUMNS, FEATURES, slot_column
from esper.leyline.stages import Stage
from esper.leyline.views import HIDDEN_COLUMNS, NUM_GLOBAL_V4, NUM_SLOT_V4, V1, V3, V4, V4_HIDDEN, get_view, symlog

NAN = float("nan")
STEP = np.array([4])


def columns(**changes) -> dict[str, np.ndarray]:
    """Three slots: 0 is held, 1 trains, 2 is free; `changes` by column name."""
    row = dict.fromkeys(FEATURE_COLUMNS, NAN)
    row |= {"horizon": 20, "train_loss": 1.5, "train_accuracy": 0.4, "val_loss": 1.0, "val_accuracy": 0.5}
    row |= {"val_loss_lag1": 1.25, "val_loss_lag2": 1.5, "val_accuracy_lag1": 0.45, "val_accuracy_lag2": 0.3}
    row |= {"best_val_loss": 0.9, "best_val_accuracy": 0.55, "plateau_epochs": 2, "learning_rate": 0.1}
    row |= {"base_learning_rate": 0.1, "optimiser": 0, "batch_size": 128, "batches_per_epoch": 15}
    row |= {"host_params": 1000, "host_depth": 4, "seed_params": 1000, "num_slots": 3, "max_seeds": 3}
    row |= {"max_fossils": 2, "last_op": 2, "last_executed": 1}
    for slot in range(MAX_SLOTS):
        row[slot_column(slot, "present")] = float(slot < 3)
        for lever in ("blueprint", "blend", "tempo", "dwell", "isolation", "seed_lr"):
            row[slot_column(slot, lever)] = -1
    row |= {"s0_stage": Stage.HOLDING, "s1_stage": Stage.TRAINING, "s2_stage": Stage.DORMANT}
    row |= {"s0_epochs_in_stage": 2, "s1_epochs_in_stage": 3, "s2_epochs_in_stage": 1}
    row |= {"s0_alpha": 1.0, "s1_alpha": 0.0, "s2_alpha": 0.0, "s0_age": 10, "s1_age": 3}
    row |= {"s0_blueprint": 6, "s0_blend": 2, "s0_tempo": 1, "s0_dwell": 2, "s0_isolation": 1, "s0_seed_lr": 2}
    row |= {"s1_blueprint": 1, "s1_blend": 0, "s1_tempo": 3, "s1_dwell": 0, "s1_isolation": 0, "s1_seed_lr": 1}
    row |= {"s0_removal_cost": 4.0, "s0_removal_cost_velocity": -2.0, "s0_removal_age": 2, "s1_seed_improvement": 1.5}
    row |= {"s1_gradient_norm": 0.5, "s1_gradient_health": 0.75, "s1_gradient_vanishing": 0.5}
    row |= changes
    return {name: np.array([value], dtype=np.float32) for name, value in row.items()}


def encode(view, **changes):
    encoded = view.encode(columns(**changes), STEP)
    assert encoded.dtype == np.float32
    assert np.isfinite(encoded).all()
    return encoded[0]


def named(view, **changes):
    return dict(zip(view.names, encode(view, **changes).tolist(), strict=True))


def test_widths_are_the_published_ones():
    assert V1.width == 27
    assert V3.width == 116 + 3
    assert V3.num_blueprint_indices == 3
    assert V4.width == NUM_GLOBAL_V4 + MAX_SLOTS * NUM_SLOT_V4
    for view in (V1, V3, V4):
        assert len(set(view.names)) == view.width


def test_v1_has_the_27_numbers_in_the_published_order():
    expected = [4, 60, 1.5, 1.0, 0.25, 40, 50, 5, 2, 55, 0.9]
    expected += [0, 0, 1.5, 1.25, 1.0, 0, 0, 30, 45, 50]
    expected += [1, Stage.HOLDING, 2, 1.0, 0, 1]
    np.testing.assert_allclose(encode(V1), expected, rtol=1e-5)


def test_v1_reads_the_seed_furthest_in_its_life():
    found = named(V1, s0_stage=Stage.FOSSILIZED)
    assert (found["seed_stage"], found["seed_epochs_in_stage"], found["seed_improvement"]) == (Stage.TRAINING, 3, 1.5)
    found = named(V1, s0_stage=Stage.TRAINING, s0_epochs_in_stage=1)
    assert found["seed_epochs_in_stage"] == 3


def test_v1_without_a_live_seed_is_zero_there():
    found = named(V1, s0_stage=Stage.DORMANT, s1_stage=Stage.PRUNED)
    assert [found[name] for name in V1.names[21:]] == [0, 0, 0, 0, 0, 2]


def test_v1_has_ten_for_losses_and_zero_for_changes_that_are_unknown():
    found = named(V1, train_loss=NAN, val_loss=float("inf"), best_val_loss=NAN, val_accuracy_lag1=NAN)
    assert (found["train_loss"], found["val_loss"], found["best_val_loss"]) == (10, 10, 10)
    assert (found["loss_delta"], found["accuracy_delta"]) == (0, 0)
    assert named(V1, val_loss=500.0)["val_loss"] == 100


def test_v3_begins_with_the_23_numbers_of_the_host():
    def scaled(loss):
        return float(np.log1p(loss) / 7)

    expected = [4 / 20, scaled(1.0), 0.5]
    expected += [-1, -1, scaled(1.5), scaled(1.25), scaled(1.0), -1, -1, 0.3, 0.45, 0.5]
    expected += [1 / 3, 0, 1 / 3, 1, 0, 0, 1, 0, 0, 0]
    np.testing.assert_allclose(encode(V3)[:23], expected, rtol=1e-5)


def test_v3_marks_that_no_op_came_before():
    np.testing.assert_array_equal(encode(V3, last_op=-1)[17:23], [0, 0, 0, 0, 0, 1])


def test_v3_has_31_numbers_per_slot_for_a_held_seed():
    one_hot = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    expected = [1, *one_hot, 1.0, 0.4, -0.2, 5 / 12, 1, 0, 5 / 20, 5 / 20, 0, 0, 0.5, 0]
    expected += [0, 0, 0, 0, -1, 2 / 20, 0.995**2, 10 / 20]
    np.testing.assert_allclose(encode(V3)[23:54], expected, rtol=1e-5)


def test_v3_has_31_numbers_per_slot_for_a_training_seed_that_was_never_probed():
    one_hot = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    expected = [1, *one_hot, 0, 0, 0, 12 / 12, 0, 0, 0, 0, 0, 0, 0, 0]
    expected += [np.log1p(0.5) / 7, 0.75, 1, 0, -1, 3 / 20, -1, 3 / 20]
    np.testing.assert_allclose(encode(V3)[54:85], expected, rtol=1e-5)


def test_v3_is_zero_for_an_empty_slot_and_ends_with_the_blueprints():
    np.testing.assert_array_equal(encode(V3)[85:116], 0)
    assert encode(V3)[116:].tolist() == [6, 1, -1]


def test_v3_shows_a_blend_on_its_way():
    found = named(V3, s1_stage=Stage.BLENDING, s1_blending_velocity=0.25)
    assert found["s1_alpha_mode"] == 0.5
    assert found["s1_steps_total"] == pytest.approx(12 / 20)
    assert found["s1_steps_done"] == pytest.approx(3 / 20)
    assert found["s1_time_to_target"] == pytest.approx(9 / 20)
    assert found["s1_alpha_velocity"] == 0.25
    assert found["share_blending"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("value", "shown"), [(NAN, 0.0), (50.0, 1.0), (-50.0, -1.0)])
def test_v3_clips_the_counterfactual_and_hides_a_missing_one(value, shown):
    assert named(V3, s0_removal_cost=value)["s0_counterfactual"] == shown


@pytest.mark.parametrize(("value", "shown"), [(NAN, 0.0), (4.0, 0.4), (50.0, 1.0), (-50.0, -1.0)])
def test_v3_shows_the_interactions_that_were_measured(value, shown):
    assert named(V3, s0_interaction_sum=value)["s0_interaction_sum"] == pytest.approx(shown)


def test_v3_has_no_time_left_for_a_full_blend_that_waits_at_its_gate():
    found = named(V3, s1_stage=Stage.BLENDING, s1_epochs_in_stage=14)
    assert (found["s1_steps_done"], found["s1_time_to_target"]) == (pytest.approx(12 / 20), 0)


LATER_SLOT = {
    "contribution_25": (5.0, 0.5),
    "contribution_50": (-5.0, -0.5),
    "contribution_75": (100.0, 3.0),
    "contribution_100": (2.0, 0.2),
    "gradient_ratio": (2.5, 0.25),
    "gradient_variation": (9.0, 1.0),
    "stable_share": (0.75, 0.75),
    "gradient_through_seed": (np.e - 1, 1 / 7),
}


@pytest.mark.parametrize("name", LATER_SLOT)
def test_v4_shows_what_the_levers_are_judged_by_and_whether_it_was_measured(name):
    value, shown = LATER_SLOT[name]
    found, unknown = named(V4, **{f"s0_{name}": value}), named(V4)
    assert (found[f"s0_{name}"], found[f"s0_{name}_known"]) == (pytest.approx(shown), 1)
    assert (unknown[f"s0_{name}"], unknown[f"s0_{name}_known"]) == (0, 0)


def test_v4_shows_the_host_s_own_change_all_seeds_off_interactions_and_rollbacks():
    unknown = named(V4)
    found = named(V4, host_weight_change=0.25, removal_cost_all=-5.0, num_rollbacks=2, s0_interaction_sum=3.0)
    assert (found["global_host_weight_change"], found["global_host_weight_change_known"]) == (0.25, 1)
    assert (found["global_removal_cost_all"], found["global_removal_cost_all_known"]) == (-0.5, 1)
    assert found["global_rollbacks"] == pytest.approx(2 / 3)
    assert (found["s0_interaction_sum"], found["s0_interaction_known"]) == (pytest.approx(0.3), 1)
    for name in ("global_host_weight_change_known", "global_removal_cost_all_known", "s0_interaction_known"):
        assert unknown[name] == 0


def test_v1_and_v3_do_not_see_what_came_with_schema_2_but_for_interactions():
    later = [c for f in FEATURES if f.since > 1 and f.name != "interaction_sum" for c in f.columns]
    assert len(later) == 3 + 8 * MAX_SLOTS
    for view in (V1, V3):
        np.testing.assert_array_equal(encode(view), encode(view, **dict.fromkeys(later, 1.0)))


def test_v4_tells_unmeasured_from_zero():
    unknown, zero = named(V4, s1_seed_improvement=NAN), named(V4, s1_seed_improvement=0.0)
    assert unknown["s1_seed_improvement"] == zero["s1_seed_improvement"] == 0
    assert (unknown["s1_seed_improvement_known"], zero["s1_seed_improvement_known"]) == (0, 1)
    for name in ("train_loss_drop", "val_loss_drop", "removal_cost", "improvement_since_stage", "weight_norm"):
        column = f"s1_{name}"
        assert named(V4, **{column: NAN})[f"{column}_known"] == 0
        assert named(V4, **{column: 0.1})[f"{column}_known"] == 1


def test_v4_shows_an_absent_slot_as_zeros():
    found = encode(V4)
    absent = found[NUM_GLOBAL_V4 + 3 * NUM_SLOT_V4 :]
    np.testing.assert_array_equal(absent, 0)
    assert found[NUM_GLOBAL_V4] == 1
    assert V4.names[NUM_GLOBAL_V4] == "s0_present"


def test_v4_shows_caps_and_budget():
    found = named(V4)
    assert found["global_seeds_left"] == pytest.approx(1 / 6)
    assert found["global_fossils_left"] == pytest.approx(2 / 6)
    assert (found["global_budget_known"], found["global_budget_left"]) == (0, 0)
    rich = named(V4, param_budget=3000)
    assert (rich["global_budget_known"], rich["global_budget_left"]) == (1, pytest.approx(0.2))
    assert found["global_growth"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("view", [V1, V3, V4], ids=lambda view: view.name)
@pytest.mark.parametrize("value", [NAN, float("inf"), 0.0])
def test_only_finite_numbers_leave_a_view(view, value):
    odd = {name: np.full(2, value, dtype=np.float32) for name in FEATURE_COLUMNS}
    with np.errstate(all="ignore"):
        assert np.isfinite(view.encode(odd, np.array([0, 3]))).all()


@pytest.mark.parametrize("view", [V1, V3, V4], ids=lambda view: view.name)
def test_every_single_unmeasured_column_leaves_a_view_finite(view):
    for name in FEATURE_COLUMNS:
        encode(view, **{name: NAN})


def test_rows_are_encoded_alone():
    one, two = columns(), columns(val_accuracy=0.1, s1_stage=Stage.BLENDING)
    both = {name: np.concatenate([one[name], two[name]]) for name in one}
    for view in (V1, V3, V4):
        stacked = view.encode(both, np.array([4, 4]))
        np.testing.assert_array_equal(stacked, np.concatenate([view.encode(one, STEP), view.encode(two, STEP)]))


def test_an_unknown_view_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="observation view"):
        get_view("v5")
    assert get_view("v4") is V4


def test_symlog_is_odd_and_logarithmic():
    np.testing.assert_allclose(symlog(np.array([-1.0, 0.0, 1.0])), [-np.log(2), 0, np.log(2)])


def test_the_registry_names_every_column_once():
    assert len(set(FEATURE_COLUMNS)) == len(FEATURE_COLUMNS)
    assert len(FEATURE_BY_NAME) == len(FEATURES), "a global and a slot feature share a name"


HOST = ("host_params", "host_depth")
HOST_BY_SLOT = ("resolution", "channels", "kernel", "pool", "narrowed", "frozen")
HOST_COLUMNS = {*HOST, *(slot_column(slot, name) for slot in range(MAX_SLOTS) for name in HOST_BY_SLOT)}


def varied(names):
    """The columns of the example, with some of them changed."""
    base = columns(param_budget=5000.0, s0_params=400.0, s0_resolution=12.0, s0_channels=4.0, s0_kernel=3.0)
    return base | {name: base[name] * 2 + 1 if np.isfinite(base[name]).all() else np.float32([3.0]) for name in names}


def test_two_hosts_that_differ_in_their_descriptors_alone_look_the_same_when_hidden():
    one, other = varied(()), varied(HOST_COLUMNS)
    assert (V4.encode(one, STEP) != V4.encode(other, STEP)).any()
    np.testing.assert_array_equal(V4_HIDDEN.encode(one, STEP), V4_HIDDEN.encode(other, STEP))


def test_hidden_is_v4_in_every_other_column():
    assert V4_HIDDEN.names == V4.names
    assert V4_HIDDEN.names == get_view("v4-hidden").names
    hidden = np.isin(V4.names, sorted(HIDDEN_COLUMNS))
    assert hidden.sum() == len(HIDDEN_COLUMNS) == 4 + 7 * MAX_SLOTS
    shown, seen = V4_HIDDEN.encode(varied(()), STEP)[0], V4.encode(varied(()), STEP)[0]
    np.testing.assert_array_equal(shown[~hidden], seen[~hidden])
    np.testing.assert_array_equal(shown[hidden], 0.0)
    assert np.count_nonzero(seen[hidden]) >= 8


def test_only_what_tells_the_host_is_hidden():
    """What v4 shows of a single column and hidden does not: descriptors, and sizes that are read against the host's."""
    codes = ("stage", "blueprint", "blend", "tempo", "dwell", "isolation", "seed_lr")
    coded = {slot_column(slot, name) for slot in range(MAX_SLOTS) for name in codes}
    names = sorted({*FEATURE_COLUMNS} - coded)
    changed = {name: np.repeat(values, 1 + len(names)) for name, values in varied(()).items()}
    for row, name in enumerate(names, start=1):
        changed[name][row] = varied((name,))[name][0]
    seen = {}
    for view in (V4, V4_HIDDEN):
        encoded = view.encode(changed, np.repeat(STEP, 1 + len(names)))
        seen[view.name] = {name for name, row in zip(names, encoded[1:]) if (row != encoded[0]).any()}
    assert not seen["v4-hidden"] & HOST_COLUMNS
    sizes = {"seed_params", "param_budget", *(slot_column(slot, "params") for slot in range(3))}
    of_this_host = {name for name in HOST_COLUMNS if not name.startswith(("s3", "s4", "s5"))}
    assert seen["v4"] - seen["v4-hidden"] == of_this_host | sizes
