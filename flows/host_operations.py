"""How many operations training a host takes, counted from its specification alone: for estimates, without torch.

`esper.tolaria.cost` counts what a host really does; a test holds the two together.
"""

from __future__ import annotations

from esper.leyline.host_specs import CnnHost, ResNetHost, TransformerHost
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.task_specs import DigitsTask, TaskSpec, TinyStoriesTask

IMAGE_CLASSES = 10
"""Of the embedded image tasks; with images of the user's own the last layer is a little larger, or smaller."""


def batch_operations(spec: EnvironmentSpec) -> float:
    """Return the operations of one training batch of a bare host: twice the multiply-adds, forward and backward.

    The backward pass costs a forward pass for the weights and one for the inputs, which the first layer does without.
    """
    forward, first = _forward(spec)
    return spec.batch_size * (3 * forward - first)


def num_layers(spec: EnvironmentSpec) -> int:
    """Return how many layers a host has that multiply matrices: each is a handful of calls, however small it is."""
    host = spec.host
    if isinstance(host, CnnHost):
        return len(host.channels) + 1
    if isinstance(host, ResNetHost):
        return host.layers + 3
    return 6 * host.layers + 1


def validation_operations(spec: EnvironmentSpec) -> float:
    """Return the operations of one pass over the validation rows that are read every epoch."""
    task = spec.task
    if isinstance(task, DigitsTask):
        return task.sources[1] * task.copies[1] * _forward(spec)[0]
    return (task.val_rows_per_epoch or task.rows[1]) * _forward(spec)[0]


def _forward(spec: EnvironmentSpec) -> tuple[float, float]:
    """Operations of a forward pass per row, and of the first layer alone."""
    host = spec.host
    if isinstance(host, TransformerHost):
        return _transformer(host, spec.task), 0.0
    resolution, channels = _image(spec.task)
    if isinstance(host, CnnHost):
        return _cnn(host, resolution, channels)
    return _resnet(host, resolution, channels)


def _image(task: TaskSpec) -> tuple[int, int]:
    """Height and channels of a task's images."""
    if isinstance(task, DigitsTask):
        return task.canvas, 1
    return (0, 0) if isinstance(task, TinyStoriesTask) else (task.resolution, 3)


def _conv(resolution: int, inputs: int, outputs: int, kernel: int) -> float:
    return 2.0 * resolution**2 * inputs * outputs * kernel**2


def _cnn(host: CnnHost, resolution: int, channels: int) -> tuple[float, float]:
    layers = []
    for outputs, kernel, pool in zip(host.block_channels, host.kernels, host.pools, strict=True):
        layers.append(_conv(resolution, channels, outputs, kernel))
        resolution, channels = resolution // pool, outputs
    return sum(layers) + 2.0 * channels * IMAGE_CLASSES, layers[0]


def _resnet(host: ResNetHost, resolution: int, channels: int) -> tuple[float, float]:
    total = first = _conv(resolution, channels, host.stage_channels[0], 3)
    channels = host.stage_channels[0]
    for stage, (blocks, outputs) in enumerate(zip(host.stage_blocks, host.stage_channels, strict=True)):
        if stage:
            resolution = -(-resolution // 2)
            total += _conv(resolution, channels, outputs, 1)
        for _ in range(blocks):
            total += _conv(resolution, channels, outputs, 3) + _conv(resolution, outputs, outputs, 3)
            channels = outputs
    return total + 2.0 * channels * IMAGE_CLASSES, first


def _transformer(host: TransformerHost, task: TaskSpec) -> float:
    if not isinstance(task, TinyStoriesTask):
        return 0.0
    tokens, width = task.context, host.embed_width
    block = 24.0 * width**2 + 4.0 * tokens * width
    return tokens * (host.layers * block + 2.0 * width * task.vocabulary)
