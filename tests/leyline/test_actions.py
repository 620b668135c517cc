"""The flat layout of the action tree, canonical spelling, checks of masks."""

import numpy as np
import pytest

from esper.leyline.actions import (
    CNN_BLUEPRINTS,
    LEVER_SIZES,
    LEVERS,
    MAX_SLOTS,
    NUM_OPS,
    TREE_WIDTH,
    WAIT_ROW,
    Action,
    Blend,
    Isolation,
    Op,
    action_from_row,
    canonicalise,
    check_mask,
    entries_of,
    is_canonical,
    is_forced,
    is_valid,
    lever_slice,
    pack_mask,
    slot_slice,
    unpack_mask,
)
from esper.leyline.errors import MaskError, UnknownNameError
from esper.leyline.tree import groups


def full_mask(num: int = 1):
    return np.ones((num, TREE_WIDTH), dtype=bool)


def wait_mask(num: int = 1):
    mask = np.zeros((num, TREE_WIDTH), dtype=bool)
    mask[:, Op.WAIT] = True
    return mask


def test_the_tree_has_185_entries_and_its_choices_tile_them():
    assert TREE_WIDTH == 5 + 4 * 6 + 6 * 26 == 185
    covered = np.concatenate([np.arange(group.start, group.stop) for group in groups()])
    np.testing.assert_array_equal(covered, np.arange(TREE_WIDTH))


def test_the_slices_lie_where_the_layout_says():
    assert slot_slice(Op.GERMINATE) == slice(5, 11)
    assert slot_slice(Op.PRUNE) == slice(23, 29)
    assert lever_slice(0, 0) == slice(29, 37)
    assert lever_slice(5, 5) == slice(182, 185)
    assert len(CNN_BLUEPRINTS) == LEVER_SIZES[LEVERS.index("blueprint")] == 8


def test_an_action_in_words_and_its_row_are_each_others_inverse():
    action = Action(
        op=Op.GERMINATE,
        slot=2,
        blueprint=7,
        blend=Blend.SIGMOID,
        tempo_epochs=8,
        dwell_epochs=5,
        isolation=Isolation.ISOLATED,
        seed_lr_factor=2.0,
    )
    assert action.to_row().tolist() == [1, 2, 7, 2, 2, 3, 0, 2]
    assert action_from_row(action.to_row()) == action


def test_what_an_op_does_not_read_is_spelled_zero():
    wide = {"slot": 3, "blueprint": 5, "tempo_epochs": 12, "blend": Blend.SIGMOID}
    assert Action(op=Op.WAIT, **wide).to_row().tolist() == WAIT_ROW.tolist() == [0] * 8
    for op in (Op.ADVANCE, Op.FOSSILIZE, Op.PRUNE):
        assert Action(op=op, **wide).to_row().tolist() == [op, 3, 0, 0, 0, 0, 0, 0]
    loose = np.array([[0, 2, 1, 1, 1, 1, 1, 1], [2, 4, 7, 4, 3, 3, 1, 2], [1, 4, 7, 4, 3, 3, 1, 2]])
    assert canonicalise(loose).tolist() == [[0] * 8, [2, 4, 0, 0, 0, 0, 0, 0], [1, 4, 7, 4, 3, 3, 1, 2]]
    assert is_canonical(loose).tolist() == [False, False, True]


def test_numbers_out_of_range_are_not_canonical():
    rows = np.zeros((4, 8), dtype=np.int64)
    rows[0, 0], rows[1, 0], rows[2] = 5, -1, [2, 6, 0, 0, 0, 0, 0, 0]
    assert is_canonical(rows).tolist() == [False, False, False, True]


def test_a_value_that_a_lever_lacks_is_named_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="tempo value '4'") as caught:
        Action(op=Op.GERMINATE, tempo_epochs=4).to_row()
    assert "12" in str(caught.value)


def test_entries_name_the_path_of_an_action():
    entries, read = entries_of(np.array([[1, 2, 7, 4, 3, 3, 1, 2], [4, 5, 0, 0, 0, 0, 0, 0], [0] * 8]))
    start = 29 + 2 * 26
    assert entries[0].tolist() == [1, 7, start + 7, start + 12, start + 16, start + 20, start + 22, start + 25]
    assert entries[1, :2].tolist() == [4, 28]
    assert read.sum(axis=1).tolist() == [8, 2, 1]


def test_an_action_is_valid_only_if_every_choice_on_its_path_is():
    row = np.array([[1, 2, 7, 4, 3, 3, 1, 2]])
    assert is_valid(row, full_mask()).all()
    entries, _ = entries_of(row)
    for entry in entries[0]:
        mask = full_mask()
        mask[0, entry] = False
        assert not is_valid(row, mask).any()
    assert not is_valid(np.array([[0, 1, 0, 0, 0, 0, 0, 0]]), full_mask()).any(), "not canonical"


def test_a_consistent_mask_passes():
    check_mask(full_mask(3))
    check_mask(wait_mask(3))


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        (Op.WAIT, False, "does not allow WAIT"),
        (Op.ADVANCE, True, "ADVANCE is valid but its slots are"),
        (slot_slice(Op.PRUNE).start + 1, True, "PRUNE is masked but its slots are"),
    ],
)
def test_an_inconsistent_mask_is_an_error_that_names_the_row_and_the_op(entry, value, words):
    mask = wait_mask(2)
    mask[1, entry] = value
    with pytest.raises(MaskError, match=words) as caught:
        check_mask(mask)
    assert "row 1" in str(caught.value)


def test_a_germinate_without_a_value_of_some_lever_is_an_error():
    mask = full_mask()
    mask[0, lever_slice(4, LEVERS.index("dwell"))] = False
    with pytest.raises(MaskError, match="slot 4 is valid but no value of dwell"):
        check_mask(mask)


def test_a_mask_of_the_wrong_width_is_an_error():
    with pytest.raises(MaskError, match="185"):
        check_mask(np.ones((1, 7), dtype=bool))


def test_a_step_is_forced_when_only_wait_is_valid():
    assert is_forced(wait_mask()).all()
    assert not is_forced(full_mask()).any()


def test_packed_masks_come_back_whole():
    mask = np.random.default_rng(0).random((5, TREE_WIDTH)) < 0.5
    assert pack_mask(mask).shape == (5, 24)
    np.testing.assert_array_equal(unpack_mask(pack_mask(mask)), mask)


def test_sizes_match():
    assert NUM_OPS == 5
    assert MAX_SLOTS == 6
