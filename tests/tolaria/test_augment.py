from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esper.tolaria.augment import augment
from esper.tolaria.runtime import torch_generator


@pytest.mark.parametrize("size", [8, 16, 32])
def test_it_equals_a_loop_over_the_images(size):
    images = torch.randn(20, 3, size, size, generator=torch_generator("x"))
    ours = augment(images.contiguous(memory_format=torch.channels_last), torch_generator("a", size))
    twin, margin = torch_generator("a", size), size // 8
    shifts = torch.randint(0, 2 * margin + 1, (2, 20), generator=twin)
    mirrored = torch.randint(0, 2, (20,), generator=twin)
    for index, image in enumerate(images):
        down, right = shifts[0, index], shifts[1, index]
        expected = F.pad(image, (margin,) * 4)[:, down : down + size, right : right + size]
        expected = expected.flip(2) if mirrored[index] else expected
        assert torch.equal(ours[index], expected)
    assert len(set(mirrored.tolist())) == 2
    assert len(set(shifts.flatten().tolist())) > 1


def test_the_result_is_channels_last_and_the_input_is_left_alone():
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    ours = augment(images, torch_generator("a"))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_the_same_key_gives_the_same_images_and_another_key_others():
    images = torch.randn(16, 3, 16, 16)
    assert torch.equal(augment(images, torch_generator("a", 1)), augment(images, torch_generator("a", 1)))
    assert not torch.equal(augment(images, torch_generator("a", 1)), augment(images, torch_generator("a", 2)))
