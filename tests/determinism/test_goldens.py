"""Values that must never change by accident: a commit that changes one says so, and raises ENGINE_VERSION.

They cover what is the same on every machine: identities, keyed draws, task data, initial weights, data order. What
arithmetic on top of them gives is compared with itself (`test_same_spec_same_bytes`), not with another processor.
"""

from __future__ import annotations

import hashlib

import torch

from esper.leyline.controller_specs import HEURISTIC, ScheduleSampler, behaviour
from esper.leyline.identity import ENGINE_VERSION, env_seed
from esper.leyline.keys import derive_seed, hex_digest, numpy_generator
from esper.leyline.library import load, load_environments
from esper.leyline.matrix import MatrixSpec
from esper.leyline.plans import expand
from esper.leyline.specs import EnvironmentSpec, ResNetHost, TinyStoriesTask, TransformerHost
from esper.tamiyo.plans import pool_plans
from esper.tolaria.augment import augment
from esper.tolaria.executor import batch_order
from esper.tolaria.lineage import Lineage, SeedKey, new_network, new_seed
from esper.tolaria.runtime import torch_generator
from esper.tolaria.tasks import load_task

GAP = load("environments", "digits-gap", EnvironmentSpec)
BASELINE = load("environments", "digits-baseline", EnvironmentSpec)


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def test_identities_are_what_stored_datasets_were_made_with():
    found = {
        "engine": ENGINE_VERSION,
        "environments": [GAP.spec_id, BASELINE.spec_id],
        "env_seeds": [env_seed(GAP.task.task_id, replicate) for replicate in (0, 100_000, 200_000)],
        "controllers": [HEURISTIC.spec_id, behaviour("random").spec_id, behaviour("periodic").spec_id],
        "demo": hex_digest([plan.episode_ids() for plan in expand(load("matrices", "demo", MatrixSpec))], 16),
    }
    assert found == IDENTITIES


def test_keyed_draws_are_what_they_were():
    plans = pool_plans(ScheduleSampler(pool="demo", num_plans=24, num_slots=3, max_birth_epoch=10), GAP)
    found = {
        "seed": derive_seed("golden", 1, 0.5, None, ["a", True]),
        "uniforms": numpy_generator("golden").random(3).tolist(),
        "plans": hex_digest([plan.model_dump(mode="json") for plan in plans], 16),
    }
    assert found == DRAWS


def test_task_data_initial_weights_and_data_order_are_what_they_were():
    gap, baseline = load_task(GAP.task), load_task(BASELINE.task)
    network = new_network(GAP, 7, gap)
    lineage = Lineage("key", GAP, network)
    found = {
        "gap": digest(gap.train.inputs > 0, gap.val.labels, gap.test.labels),
        "baseline": digest(baseline.train.inputs > 0, baseline.test.labels),
        "weights": digest(*network.parameters()),
        "seed": digest(*new_seed(GAP, SeedKey(1, 7, 1, 3, "own_pass", 3), 7, 8).parameters()),
        "order": digest(batch_order(lineage, gap, 7, "order", 2)),
    }
    assert found == DATA


def test_text_and_the_weights_of_other_hosts_are_what_they_were():
    text = EnvironmentSpec(name="text", task=TEXT, host=DECODER, learning_rate=0.1, batch_size=8, **CLOCK)
    deep = EnvironmentSpec(name="deep", task=GAP.task, host=RESNET, learning_rate=0.1, batch_size=8, **CLOCK)
    stories = load_task(TEXT)
    found = {
        "stories": digest(stories.train.inputs, stories.test.labels),
        "decoder": digest(*new_network(text, 7, stories).parameters()),
        "decoder_seed": digest(*new_seed(text, SeedKey(1, 5, 1, 3, "own_pass", 3), 7, 12).parameters()),
        "resnet": digest(*new_network(deep, 7, load_task(GAP.task)).parameters()),
    }
    assert found == OTHERS


def test_families_and_augmentation_are_what_they_were():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    found = {
        "mix": hex_digest([spec.spec_id for spec in load_environments("digits-mix")], 16),
        "random": hex_digest([spec.spec_id for spec in load_environments("digits-random")], 16),
        "augmented": digest(augment(images, torch_generator(7, "augment", 0, 0))),
    }
    assert found == FAMILIES


CLOCK = {"batches_per_epoch": 2, "horizon": 4}
TEXT = TinyStoriesTask(context=8, vocabulary=64, rows=(32, 8, 8))
DECODER = TransformerHost(layers=2, heads=2, embed=12, slots=2)
RESNET = ResNetHost(layers=18, width_factor=0.0625)


IDENTITIES = {
    "engine": "3",
    "environments": ["5d728af47b79e847", "57bc4d000dc0d3b3"],
    "env_seeds": [2519336023906644183, 4532193403949142660, 8904131760514181878],
    "controllers": ["6e6bc23cd42c0961", "3cd170b16d31cc2d", "72d3ea33dbf0df86"],
    "demo": "da53311f83ad3d5e",
}
DRAWS = {
    "seed": 7587757920484449520,
    "uniforms": [0.816400647323184, 0.2349663898165405, 0.2824770533547065],
    "plans": "55f00683797a8d89",
}
DATA = {
    "gap": "0e9c6f87074f39d0",
    "baseline": "27520bb9d7f0c0a9",
    "weights": "eb7978fd00b46eb0",
    "seed": "f7c8cead3c5e3ec2",
    "order": "16626d1221fe1fb0",
}
OTHERS = {
    "stories": "eb88ffd53bb2e3bf",
    "decoder": "1f839d76bc4e44d8",
    "decoder_seed": "77a07d92c6409f3b",
    "resnet": "0dcea88bb7eeb133",
}
FAMILIES = {
    "mix": "4837d8dd780c5110",
    "random": "c703f8a9c71c79fe",
    "augmented": "b4a261868b4c5778",
}
