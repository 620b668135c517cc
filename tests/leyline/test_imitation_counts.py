"""What is counted of the imitation policy: by hand, and against scikit-learn."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from esper.leyline.actions import TREE_WIDTH, Op
from esper.leyline.errors import SpecError
from esper.leyline.imitation import ActionClass, Confusion, class_mask, classes_of

WAIT, GERMINATE, ADVANCE, PRUNE = ActionClass


def test_ten_decisions_counted_by_hand():
    right = np.array([WAIT, WAIT, WAIT, WAIT, WAIT, WAIT, GERMINATE, GERMINATE, ADVANCE, ADVANCE])
    predicted = np.array([WAIT, WAIT, WAIT, WAIT, GERMINATE, PRUNE, GERMINATE, WAIT, ADVANCE, ADVANCE])
    found = Confusion.of(right, predicted)
    assert found.counts == ((4, 1, 0, 1), (1, 1, 0, 0), (0, 0, 2, 0), (0, 0, 0, 0))
    assert (found.total, found.num_wrong, found.accuracy) == (10, 3, 0.7)
    assert found.recall(WAIT) == pytest.approx(4 / 6)
    assert (found.recall(GERMINATE), found.recall(ADVANCE)) == (0.5, 1.0)
    assert (found.precision(WAIT), found.precision(GERMINATE), found.precision(PRUNE)) == (0.8, 0.5, 0.0)
    assert math.isnan(found.recall(PRUNE))
    assert found.balanced_accuracy == pytest.approx((4 / 6 + 0.5 + 1.0) / 3)
    assert [found.num_wrong_of(code) for code in ActionClass] == [2, 1, 0, 0]


@pytest.mark.parametrize("classes", [(0, 1, 2, 3), (0, 2)])
def test_counts_and_scores_are_those_of_scikit_learn(classes):
    rng = np.random.default_rng(len(classes))
    right, predicted = rng.choice(classes, 300), rng.integers(4, size=300)
    found = Confusion.of(right, predicted)
    np.testing.assert_array_equal(found.counts, confusion_matrix(right, predicted, labels=range(4)))
    assert found.accuracy == pytest.approx(accuracy_score(right, predicted))
    with pytest.warns(UserWarning, match="y_pred contains classes") if len(classes) < 4 else nullcontext():
        assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(right, predicted))
    precision, recall, _, _ = precision_recall_fscore_support(right, predicted, labels=range(4), zero_division=np.nan)
    np.testing.assert_allclose([found.precision(code) for code in ActionClass], precision)
    np.testing.assert_allclose([found.recall(code) for code in ActionClass], recall)


def test_counts_go_through_a_policys_metrics_and_come_back():
    found = Confusion(counts=((90, 2, 0, 1), (0, 5, 0, 0), (1, 0, 7, 0), (0, 0, 0, 0)))
    metrics = found.metrics("held_out")
    assert metrics["held_out_wait_as_germinate"] == 2
    assert metrics["held_out_accuracy"] == pytest.approx(102 / 106)
    assert all(math.isfinite(value) for value in metrics.values())
    assert Confusion.from_metrics(metrics, "held_out") == found
    assert Confusion().metrics("held_out") == {"held_out_decisions": 0.0}
    assert Confusion.from_metrics({}, "held_out") == Confusion()


def test_counts_that_are_not_four_by_four_are_refused():
    with pytest.raises(SpecError, match="4 rows"):
        Confusion.parse({"counts": ((1, 2), (3, 4))})


def test_fossilize_is_of_the_class_of_advance():
    actions = np.array([[op, *[0] * 7] for op in Op], dtype=np.int8)
    assert classes_of(actions).tolist() == [WAIT, GERMINATE, ADVANCE, ADVANCE, PRUNE]
    mask = np.zeros((3, TREE_WIDTH), dtype=bool)
    mask[:, Op.WAIT] = mask[1, Op.ADVANCE] = mask[2, Op.FOSSILIZE] = mask[2, Op.PRUNE] = True
    np.testing.assert_array_equal(class_mask(mask), [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])
