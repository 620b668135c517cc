"""The model card: every section from `policy.json` alone, the same bytes each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from esper.karn.policy_card import policy_page, write_policy_page
from esper.leyline.errors import CheckpointError

CARD = {
    "name": "iql-s3",
    "algorithm": "iql",
    "network": {"kind": "tree", "view": "v4", "hidden": 64},
    "recipe": {"expectile": 0.7, "network": {"hidden": 64}, "patience": None, "betas": [1, 2]},
    "rewards": {"digits-gap": {"mode": "gain", "rent_points": 3.0}},
    "dataset": "demo@2",
    "dataset_digest": "d" * 64,
    "verdict": "warn",
    "unchecked": False,
    "override_reason": None,
    "start_digest": None,
    "training_seed": 3,
    "metrics": {"held_out_policy_loss": 1.23456789, "policy_loss": 1.0, "chosen_step": 300.0},
    "code_version": "0.2.0",
    "engine_version": "4",
    "weights_sha256": "a" * 64,
}


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_it_says_what_from_what_how_measured_for_what_and_what_not():
    page = policy_page(CARD)
    assert page.startswith("# Policy `iql-s3`\n")
    assert "implicit Q-learning" in section(page, "What it is")
    assert "`" + "a" * 64 + "`" in section(page, "What it is")
    assert "training seed 3" in section(page, "What it is")
    data = section(page, "Data")
    assert f"`demo@2`, digest `{'d' * 64}`, verdict: warn." in data
    assert "| `digits-gap.rent_points` | 3 |" in data
    assert "against the verdict" not in data
    recipe = section(page, "Recipe")
    assert "| `expectile` | 0.7 |" in recipe
    assert "| `network.hidden` | 64 |" in recipe
    assert "| `patience` | null |" in recipe
    held, rest = section(page, "Measured in training").split("The rest:")
    assert "| `held_out_policy_loss` | 1.23457 |" in held
    assert "chosen on them" in held
    assert "| `policy_loss` | 1 |" in rest
    assert "`digits-gap`" in section(page, "Intended use")
    assert "esper evaluate demo --policy FOLDER" in section(page, "How to evaluate it")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unchecked": True, "override_reason": "to see", "verdict": None}, "Reason: to see"),
        ({"network": {"kind": "flat", "num_actions": 9}}, "no action that its data do not hold"),
        ({"network": {"kind": "imitation"}, "algorithm": "imitate"}, "At best it is as good as the rule"),
        ({"algorithm": "bc"}, "not expected to exceed the best behaviour"),
        ({"algorithm": "ppo", "start_digest": "b" * 64}, "It began from the weights `" + "b" * 64 + "`"),
        ({"dataset": None, "dataset_digest": None}, "Live episodes alone"),
        ({"metrics": {"policy_loss": 1.0}}, "No environment seed was held out"),
        ({"recipe": {"note": "a | b\nc"}}, "| `note` | a \\| b c |"),
        ({"network": {"view": "v1"}}, "Esper's action tree"),
    ],
)
def test_what_is_special_about_a_policy_is_said(changes, said):
    assert said in policy_page(CARD | changes)
    assert said not in policy_page(CARD) or "network" in changes


def test_the_page_is_written_beside_the_card_and_is_the_same_each_time(tmp_path: Path):
    (tmp_path / "policy.json").write_text(json.dumps(CARD))
    first = write_policy_page(tmp_path).read_bytes()
    (tmp_path / "policy.json").write_text(json.dumps(dict(reversed(CARD.items())), indent=3))
    assert write_policy_page(tmp_path).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "policy.json"]
    with pytest.raises(CheckpointError, match="No such file"):
        write_policy_page(tmp_path / "gone")


def test_it_needs_no_torch():
    code = "import sys, esper.karn.policy_card; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
