"""A selection of environments in a matrix whose cell is a whole family."""

import pytest

from esper.leyline.errors import UnknownNameError
from flows.planning import Selection, plan_matrix

MATRIX = """
name = "mix"
[[cells]]
environment = "digits-mix"
reward = "digits-mix"
behaviours = ["baseline"]
epsilons = [0.0]
replicates = 2
"""


@pytest.fixture
def matrix(tmp_path):
    path = tmp_path / "mix.toml"
    path.write_text(MATRIX)
    return str(path)


def planned(matrix, *names):
    return sorted({plan.environment.name for plan in plan_matrix(matrix, Selection(environments=names or None))[1]})


def test_a_family_is_one_row_of_cohorts_for_each_member(matrix):
    _, plans = plan_matrix(matrix)
    assert len(plans) == 8 * 2
    assert len({plan.env_seed for plan in plans}) == 2


def test_a_selection_takes_members_of_a_family_with_hyphens_or_underscores(matrix):
    chosen = planned(matrix, "digits-mix-k311-pool211", "digits_mix_k311_pool222")
    assert chosen == ["digits-mix-k311-pool211", "digits-mix-k311-pool222"]


def test_the_whole_family_outweighs_its_members_in_a_selection(matrix):
    assert len(planned(matrix, "digits-mix", "digits-mix-k311-pool211")) == 8


def test_a_member_that_does_not_exist_names_the_nearest(matrix):
    with pytest.raises(UnknownNameError, match=r"did you mean .digits-mix-k311-pool211.\?"):
        planned(matrix, "digits-mix-k311-pool2111")
