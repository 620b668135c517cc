"""Every kind of task says whose data its hosts learn from."""

from typing import get_args

from esper.leyline.task_specs import DigitsTask, TaskSpec, TinyStoriesTask
from flows.provenance import HOST_DATA, host_data


def test_every_kind_of_task_has_a_source_and_a_licence():
    kinds = {task.model_fields["kind"].default for task in get_args(get_args(TaskSpec)[0])}
    assert set(HOST_DATA) == {*kinds, "tinystories-embedded"}
    assert all(set(entry) == {"name", "source", "licence", "changes"} for entry in HOST_DATA.values())


def test_generated_stories_are_not_passed_off_as_tinystories():
    generated, real = TinyStoriesTask(source="embedded"), TinyStoriesTask(source="download")
    (said,) = host_data([generated, generated])
    assert "not TinyStories" in said["name"]
    assert "Eldan" not in said["source"]
    assert [entry["name"] for entry in host_data([real, DigitsTask(), real])][1].startswith("TinyStories")
