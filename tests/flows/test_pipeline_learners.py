"""Which learners a pipeline trains, from which seeds, and in which order."""

from types import SimpleNamespace

import pytest

from esper.leyline.pipelines import PipelineSpec
from flows import pipeline

EVALUATION = [{"environment": "digits-gap", "reward": "digits-gap", "env_seeds": 2, "selection_seeds": 2}]


@pytest.fixture
def trained(monkeypatch):
    """Train nothing; return (order of the jobs, policies by name) of a pipeline."""

    def make_job(context, version, algorithm, seed, name, **options):
        return SimpleNamespace(name=name, told=(algorithm, seed, options["backend"], options["changes"]))

    monkeypatch.setattr(pipeline, "make_job", make_job)
    monkeypatch.setattr(pipeline, "train_all", lambda context, jobs: [job.told for job in jobs])

    def train(**fields):
        spec = PipelineSpec.parse({"name": "p", "matrix": "demo", "evaluation": EVALUATION, **fields})
        return pipeline._train(None, spec, None)

    return train


def test_the_demo_trains_its_three_learners_once_by_their_own_names(trained):
    found = trained()
    assert list(found) == ["bc", "iql", "cql"]
    assert found["iql"] == ("iql", 0, "esper", {})


def test_several_controller_seeds_have_names_of_their_own(trained):
    found = trained(algorithms=["rwbc", "iql"], controller_seeds=3, training_seed=5)
    assert list(found) == ["rwbc-s5", "rwbc-s6", "rwbc-s7", "iql-s5", "iql-s6", "iql-s7"]
    assert [told[1] for told in found.values()] == [5, 6, 7] * 2


def test_a_grid_brings_backends_and_changed_fields(trained):
    found = trained(grid="offline-hidden", controller_seeds=2, ppo=False)
    assert len(found) == 14
    assert found["iql-hidden-s1"] == ("iql", 1, "esper", {"network": {"view": "v4-hidden"}})
    assert found["d3rlpy-cql-hidden-s0"] == ("cql", 0, "d3rlpy", {"view": "v4-hidden"})
