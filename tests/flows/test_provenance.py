"""Every kind of task says whose data its hosts learn from."""

from typing import get_args

from esper.leyline.task_specs import TaskSpec
from flows.provenance import HOST_DATA


def test_every_kind_of_task_has_a_source_and_a_licence():
    kinds = {task.model_fields["kind"].default for task in get_args(get_args(TaskSpec)[0])}
    assert set(HOST_DATA) == kinds
    assert all(set(entry) == {"name", "source", "licence", "changes"} for entry in HOST_DATA.values())
