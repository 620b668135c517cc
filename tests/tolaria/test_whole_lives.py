"""Every blueprint with every blend and isolation goes through a whole life: born, trained, blended, held, committed.

The lives of one topology are the episodes of one cohort, so they share the epochs before they blend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from engine_specs import tiny_environment

from esper.kasmina.blueprints import build_blueprint
from esper.kasmina.gating import gate_params
from esper.leyline.actions import BLENDS, ISOLATIONS, WAIT_ROW, Action, Blend, Isolation, Op
from esper.leyline.host_specs import BLUEPRINTS, Topology
from esper.leyline.specs import EnvironmentSpec, TinyStoriesTask, TransformerHost
from esper.leyline.stages import Stage
from esper.tolaria.cohort import Cohort
from esper.tolaria.episode import Rider

TEMPO = 3
SLOT = 1
STAGES = [Stage.TRAINING, Stage.BLENDING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED, Stage.FOSSILIZED]
"""After each epoch, with a tempo of three."""
EPOCHS = len(STAGES)

Life = tuple[int, Blend, Isolation]
ALL: list[Life] = list(product(range(8), BLENDS, ISOLATIONS))
SAMPLE: list[Life] = [(i % 8, BLENDS[i % 5], ISOLATIONS[i % 2]) for i in range(10)]
"""Every blueprint, and every pair of a blend and an isolation."""


def environment(topology: Topology) -> EnvironmentSpec:
    if topology == "cnn":
        return tiny_environment(horizon=EPOCHS)
    return EnvironmentSpec(
        name="tiny-stories",
        task=TinyStoriesTask(context=12, vocabulary=64, rows=(96, 32, 32)),
        host=TransformerHost(layers=3, heads=2, embed=16, slots=3),
        learning_rate=0.1,
        batch_size=16,
        batches_per_epoch=4,
        horizon=EPOCHS,
    )


def actions(life: Life) -> list[np.ndarray]:
    blueprint, blend, isolation = life
    birth = Action(
        op=Op.GERMINATE, slot=SLOT, blueprint=blueprint, blend=blend, tempo_epochs=TEMPO, isolation=isolation
    )
    advance, fossilize = (Action(op=op, slot=SLOT) for op in (Op.ADVANCE, Op.FOSSILIZE))
    return [birth.to_row(), advance.to_row(), *[WAIT_ROW] * (TEMPO - 1), fossilize.to_row()]


def expected_alpha(blend: Blend, epoch: int) -> float:
    """The textbook curve at blending epoch `epoch` of TEMPO; a gate scales a linear one."""
    share = epoch / TEMPO
    if blend in (Blend.LINEAR, Blend.GATED):
        return share
    steepness = 12 * float(blend.value.removeprefix("sigmoid-"))

    def logistic(at: float) -> float:
        return 1 / (1 + math.exp(-steepness * (at - 0.5)))

    return (logistic(share) - logistic(0)) / (logistic(1) - logistic(0))


def live(topology: Topology, lives: Sequence[Life]) -> Cohort:
    """Run the lives; check stages, alphas and what the gradient of a blended seed reaches on the way."""
    cohort = Cohort(environment(topology), 5, ["host"] * (len(lives) + 1))  # the last one never acts
    observation = cohort.reset()
    for step in range(EPOCHS):
        rows = [[*actions(life), WAIT_ROW][step] for life in lives]
        observation, applied = cohort.step(np.stack([*rows, WAIT_ROW]), observation)
        assert applied.executed_K.all(), applied.refused_by
        if step == 0:
            assert all(rider.lineage is cohort.trunk for rider in cohort.riders)
        for life, rider in zip(lives, cohort.riders):
            assert rider.slots[SLOT].stage is STAGES[step]
            if step > 0:
                check_blended(step, life, rider)
    return cohort


def check_blended(step: int, life: Life, rider: Rider) -> None:
    _, blend, isolation = life
    graft = rider.lineage.network.grafts[SLOT]
    assert graft.alpha == pytest.approx(expected_alpha(blend, min(step, TEMPO)))
    assert (graft.gate is not None) == (blend is Blend.GATED)
    if step < TEMPO:
        reached = rider.lineage.seeds[SLOT].measures.gradient_through_seed
        assert (reached > 0) == (isolation is Isolation.COADAPT)


def check_end(topology: Topology, life: Life, rider: Rider) -> None:
    blueprint, blend, _ = life
    graft = rider.lineage.network.grafts[SLOT]
    channels = rider.lineage.network.host.places[SLOT].channels
    module = build_blueprint(topology, BLUEPRINTS[topology][blueprint], channels)
    params = sum(p.numel() for p in module.parameters())
    assert rider.slots[SLOT].stage is Stage.FOSSILIZED
    assert graft.fossil
    assert rider.outcome.num_fossils == 1
    assert rider.outcome.seed_params == params + (gate_params(channels) if blend is Blend.GATED else 0)
    assert 0 <= rider.outcome.final_val_accuracy <= 1
    with torch.no_grad():
        shape = (2, channels, 6, 6) if topology == "cnn" else (2, 12, channels)
        h = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(graft.apply(h), h)


def host_bytes(rider: Rider) -> bytes:
    return b"".join(value.numpy().tobytes() for value in rider.lineage.network.host.state_dict().values())


def check_lives(topology: Topology, lives: Sequence[Life]) -> None:
    cohort = live(topology, lives)
    for life, rider in zip(lives, cohort.riders):
        check_end(topology, life, rider)
    bystander = cohort.riders[-1]
    assert bystander.lineage is cohort.trunk
    assert len({rider.lineage.host_key for rider in cohort.riders}) == len(lives) + 1
    assert all(math.isfinite(rider.lineage.history[-1].val_loss) for rider in cohort.riders)
    hosts = {host_bytes(rider) for rider in cohort.riders}
    assert len(hosts) == len(cohort.riders), "two different lives left the same host"


@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_every_blueprint_and_every_pair_of_blend_and_isolation_goes_through_a_whole_life(topology):
    check_lives(topology, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_all_blueprints_blends_and_isolations_go_through_a_whole_life(topology):
    check_lives(topology, ALL)
