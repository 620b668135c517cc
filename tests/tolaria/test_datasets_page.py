"""`datasets/README.md`: what it lists is there, its example environment is one, its code does what it says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from engine_specs import tiny_environment
from image_files import encoded, noise

from esper.leyline import library
from esper.leyline.library import KINDS
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.tasks import load_task

PAGE = (Path(__file__).parents[2] / "datasets" / "README.md").read_text(encoding="utf-8")


def block(language: str, holding: str) -> str:
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL) if holding in text]
    return found


def test_every_kind_of_file_that_ships_is_listed():
    assert set(re.findall(r"^\| `(\w+)/\*", PAGE, flags=re.MULTILINE)) == set(KINDS)


def test_the_example_environment_reads_a_folder_per_class_below_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_DATA", str(tmp_path))
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index, pixels in enumerate(noise(20, size=40)):
            (tmp_path / "photos" / label / f"{index}.png").write_bytes(encoded(pixels))
    environment = EnvironmentSpec.parse(tomllib.loads(block("toml", "photos")))
    data = load_task(environment.task.model_copy(update={"rows": (24, 8, 8)}))
    assert (len(data.train), data.shape.num_classes, data.shape.resolution) == (24, 2, 32)
    assert data.source == "images 'photos' (PNG folders)"


def test_the_code_for_the_co_adaptation_delta_prints_one(capsys, monkeypatch):
    asked: list[str] = []

    def smaller(name: str) -> EnvironmentSpec:
        asked.append(name)
        return tiny_environment(horizon=9)

    monkeypatch.setattr(library, "load_environment", smaller)
    exec(block("python", "coadaptation_delta"), {})
    assert asked == ["digits-gap"]
    printed = capsys.readouterr().out
    assert re.fullmatch(r"co-adapting minus isolated: [+-]\d+\.\d points of final validation accuracy\n", printed)
