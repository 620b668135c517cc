"""Grids of recipes: every combination once, with a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.leyline.errors import SpecError
from esper.leyline.grid import GridSpec, merged


def grid(text: str, tmp_path: Path) -> GridSpec:
    path = tmp_path / "grid.toml"
    path.write_text('name = "g"\n' + text)
    return GridSpec.from_toml(path)


def test_all_combinations_named_by_what_varies_the_last_field_fastest(tmp_path: Path) -> None:
    spec = grid(
        '[[learners]]\nalgorithm = "bc"\n'
        '[[learners]]\nalgorithm = "iql"\n[learners.fields]\n'
        "expectile = [0.5, 0.7]\nsteps = [9]\nnetwork.hidden = [64, 128]\n"
        '[[learners]]\nalgorithm = "cql"\nbackend = "d3rlpy"\nfields.hidden = [[64, 32], [8]]\n',
        tmp_path,
    )
    points = spec.points()
    assert [point.name for point in points] == [
        "bc",
        "iql-expectile-0.5-hidden-64",
        "iql-expectile-0.5-hidden-128",
        "iql-expectile-0.7-hidden-64",
        "iql-expectile-0.7-hidden-128",
        "d3rlpy-cql-hidden-64x32",
        "d3rlpy-cql-hidden-8",
    ]
    assert points[0].changes == {}
    assert points[2].changes == {"expectile": 0.5, "steps": 9, "network": {"hidden": 128}}
    assert (points[5].backend, points[5].changes) == ("d3rlpy", {"hidden": [64, 32]})
    assert [point.name for point in spec.points("bc")] == ["bc"]
    with pytest.raises(SpecError, match=r"no learner rwbc\n  it has: bc, iql, cql"):
        spec.points("rwbc")


def test_two_fields_of_one_last_name_are_told_apart(tmp_path: Path) -> None:
    text = '[[learners]]\nalgorithm = "iql"\nname = "i"\n[learners.fields]\na.width = [1, 2]\nb.width = [3, 4]\n'
    assert grid(text, tmp_path).points()[1].name == "i-a.width-1-b.width-4"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('[[learners]]\nalgorithm = "iql"\nfields.expectile = 0.5\n', r"expectile = 0.5 is not a list"),
        ('[[learners]]\nalgorithm = "iql"\nfields.expectile = []\n', r"expectile = \[\] is not a list"),
        ('[[learners]]\nalgorithm = "bc"\n[[learners]]\nalgorithm = "bc"\n', "two policies are called bc"),
        ('[[learners]]\nalgorithm = "iqll"\n', "'bc', 'rwbc', 'iql'"),
        ('[[learners]]\nalgoritm = "iql"\n', "did you mean 'algorithm'"),
        ('[[learners]]\nalgorithm = "iql"\nname = "../up"\n', "pattern"),
        ("learners = []\n", "at least 1 item"),
        ('[[learners]]\nalgorithm = "bc"\nfields.a = [' + ",".join(map(str, range(1001))) + "]\n", "1001 combinations"),
        ('[[learners]]\nalgorithm = "bc"\nfields.a = ["' + "x" * 90 + '", "y"]\n', "too long"),
    ],
)
def test_a_wrong_grid_says_what_is_wrong(text: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=hint):
        grid(text, tmp_path)


def test_changes_replace_single_values_of_nested_tables() -> None:
    base = {"steps": 5, "network": {"hidden": 1, "view": "v4"}}
    assert merged(base, {"network": {"hidden": 2}, "alpha": 0.5}) == {
        "steps": 5,
        "network": {"hidden": 2, "view": "v4"},
        "alpha": 0.5,
    }
    assert base["network"] == {"hidden": 1, "view": "v4"}
