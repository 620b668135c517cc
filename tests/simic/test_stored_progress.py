"""Progress of a training loop on disk: the same bytes after a stop, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.keys import numpy_generator
from esper.simic.resume import Notes, Progress, TorchRandom
from esper.tamiyo.networks import seeded


class Draws:
    """A keyed numpy generator, as Replay holds one."""

    def __init__(self) -> None:
        self.generator = numpy_generator("resume test", 0)

    def state_dict(self):
        return {"generator": self.generator.bit_generator.state}

    def load_state_dict(self, state_dict, /) -> None:
        self.generator.bit_generator.state = state_dict["generator"]


class Killed(Exception):
    pass


def train(progress: Progress | None, *, steps: int, killed_after: int | None = None):
    """A loop with dropout, Adam and sampled rows; returns its weights and its notes."""
    with seeded(7):
        net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
        adam = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
        draws, notes = Draws(), Notes(best=float("inf"), state={}, sums=(0.0, 1))
        parts = {"net": net, "adam": adam, "draws": draws, "random": TorchRandom(), "notes": notes}
        first = 0 if progress is None else progress.restore("policy", parts)
        for step in range(first + 1, steps + 1):
            rows = torch.from_numpy(draws.generator.normal(size=(16, 6))).float()
            loss = (net(rows) - rows.sum(1, keepdim=True)).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            notes["sums"] = (notes["sums"][0] + loss.item(), step)
            if loss.item() < notes["best"]:
                notes["best"] = loss.item()
                notes["state"] = {name: value.clone() for name, value in net.state_dict().items()}
            if progress is not None:
                progress.save("policy", step, parts, last=step == steps)
            if step == killed_after:
                raise Killed
        return {name: value.clone() for name, value in net.state_dict().items()}, dict(notes)


def same(left, right) -> bool:
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("killed_after", [4, 5, 11, 12])
def test_a_loop_stopped_anywhere_ends_with_the_same_bits(tmp_path: Path, killed_after: int) -> None:
    whole = train(None, steps=12)
    progress = Progress(tmp_path / "p", every_steps=5, identity="a")
    with pytest.raises(Killed):
        train(progress, steps=12, killed_after=killed_after)
    assert progress.finished("policy") is (killed_after == 12)
    resumed = train(Progress(tmp_path / "p", every_steps=5, identity="a"), steps=12)
    assert same(whole[0], resumed[0])
    assert same(whole[1], resumed[1])
    assert progress.finished("policy")
    assert not progress.finished("values")


def test_one_whole_file_per_phase_and_nothing_left_after_the_end(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress" / "p", every_steps=1)
    for phase in ("values", "policy"):
        for step in (1, 2):
            progress.save(phase, step, {"notes": Notes(step=step)})
    assert sorted(path.name for path in (tmp_path / "progress" / "p").iterdir()) == [
        "policy.safetensors",
        "values.safetensors",
    ]
    progress.remove()
    assert list(tmp_path.iterdir()) == []
    assert progress.restore("policy", {"notes": Notes()}) == 0


def test_values_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "p", every_steps=1)
    values = {
        "int": 2**100,
        "float": 0.1,
        "inf": float("-inf"),
        "none": None,
        "text": "ä",
        "flag": True,
        "list": [1, [2.5]],
        "pair": (1, "b"),
        "by_id": {0: {"a": 1}},
    }
    arrays = {"u64": np.array([2**64 - 1], dtype=np.uint64), "f64": np.array([[0.1, np.nan]])}
    progress.save("x", 1, {"notes": Notes(values | arrays)})
    back = Notes()
    assert progress.restore("x", {"notes": back}) == 1
    assert {key: back[key] for key in values} == values
    for name, array in arrays.items():
        assert back[name].tobytes() == array.tobytes()
        assert back[name].dtype == array.dtype


def test_progress_of_another_run_or_of_other_parts_is_refused_and_damage_is_named(tmp_path: Path) -> None:
    Progress(tmp_path / "p", every_steps=1, identity="a").save("policy", 3, {"notes": Notes(x=torch.ones(3))})
    with pytest.raises(SpecError, match="another training run"):
        Progress(tmp_path / "p", every_steps=1, identity="b").restore("policy", {"notes": Notes()})
    mine = Progress(tmp_path / "p", every_steps=1, identity="a")
    with pytest.raises(SpecError, match="holds the parts"):
        mine.restore("policy", {"other": Notes()})
    path = tmp_path / "p" / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not what was written"):
        mine.restore("policy", {"notes": Notes()})
    path.write_bytes(content[:100])
    with pytest.raises(IntegrityError, match="is damaged"):
        mine.finished("policy")
    with pytest.raises(SpecError, match="every 0 steps"):
        Progress(tmp_path / "p", every_steps=0)
