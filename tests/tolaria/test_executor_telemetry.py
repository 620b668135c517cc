"""What the executor measures of gradients and weights, against the same quantities written out; and co-adaptation."""

from __future__ import annotations

import copy
import math
import statistics

import numpy as np
import pytest
import torch
from engine_specs import tiny_environment
from oracles.small_tasks import ENV_SEED, IMAGE, TEXT, blend, environment, incubate, random_data, small_lineage
from oracles.textbook import TextbookSeed, forward, mean_loss, own_pass_gradients

from esper.leyline.actions import WAIT_ROW, Action, Isolation, Op
from esper.leyline.errors import LifecycleError, SpecError
from esper.tolaria import executor
from esper.tolaria.coadaptation import coadaptation_delta
from esper.tolaria.cohort import Cohort
from esper.tolaria.executor import SerialExecutor, batch_order, train_epoch
from esper.tolaria.gradients import HostGradient, record_gradients
from esper.tolaria.lineage import SeedMeasures

HEAVY = 7


def one_batch(kind, build):
    """Run an epoch of one batch; return the lineage, a copy from before it, and the batch."""
    spec = environment(kind, batches_per_epoch=1)
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    build(lineage)
    lineage.begin_epoch(0)
    before = copy.deepcopy(lineage)
    index = batch_order(lineage, data, ENV_SEED, "order", 0)[0]
    train_epoch(lineage, data, ENV_SEED, 0)
    return lineage, before, data.train.inputs[index], data.train.labels[index]


def norm_of(gradients) -> float:
    return math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))


@pytest.mark.parametrize("kind", [IMAGE, TEXT], ids=["image", "text"])
def test_the_gradient_through_a_co_adapting_seed_is_what_its_input_gets(kind):
    """The seed's input cut off from the activation: its gradient alone is what came through the seed."""
    lineage, before, x, y = one_batch(kind, lambda lineage: blend(lineage, 0, HEAVY, "coadapt", "gated"))
    host, graft = before.network.host.train(), before.network.grafts[0]
    h = host.segment(0, x)
    cut = h.detach().clone().requires_grad_()
    out = h + graft.alpha * graft.gate(cut) * graft.module(cut)
    loss = mean_loss(host.classify(host.segment(1, out)), y)
    (expected,) = torch.autograd.grad(loss, cut)
    assert lineage.seeds[0].measures.gradient_through_seed == pytest.approx(norm_of([expected]), rel=1e-3)
    assert norm_of([expected]) > 0


def test_no_gradient_goes_through_an_isolated_seed_and_none_is_measured_of_an_incubating_one():
    def build(lineage):
        blend(lineage, 0, HEAVY, "isolated")
        incubate(lineage, 1, HEAVY)

    lineage, *_ = one_batch(IMAGE, build)
    assert lineage.seeds[0].measures.gradient_through_seed == 0
    assert math.isnan(next(iter(lineage.incubations.values())).measures.gradient_through_seed)


def test_the_gradient_ratio_compares_unclipped_root_mean_squares_of_seed_and_host():
    def build(lineage):
        blend(lineage, 0, HEAVY, "coadapt")
        incubate(lineage, 1, HEAVY)

    lineage, before, x, y = one_batch(IMAGE, build)
    host, graft = before.network.host.train(), before.network.grafts[0]
    its = next(iter(before.incubations.values()))
    seeds = [TextbookSeed(0, graft.module, alpha=graft.alpha)]
    logits, arrived = forward(host, seeds, x)
    own, mixed = list(host.parameters()), list(graft.module.parameters())
    gradients = torch.autograd.grad(mean_loss(logits, y), [*own, *mixed], retain_graph=True)
    _, alone = own_pass_gradients(host, seeds, TextbookSeed(1, its.module, incubation="own_pass"), arrived[1], y)

    def root_mean_square(some):
        return norm_of(some) / math.sqrt(sum(gradient.numel() for gradient in some))

    host_part, mixed_part = gradients[: len(own)], gradients[len(own) :]
    blended, incubating = lineage.seeds[0].measures, next(iter(lineage.incubations.values())).measures
    for measures, its_gradients in ((blended, mixed_part), (incubating, alone)):
        assert measures.gradient_norm == pytest.approx(norm_of(its_gradients), rel=1e-4)
        expected = root_mean_square(its_gradients) / root_mean_square(host_part)
        assert measures.gradient_ratio == pytest.approx(expected, rel=1e-4)


def test_the_ratio_is_at_most_ten_and_unmeasured_where_nothing_moves():
    weights = [torch.zeros(4)]
    cases = [(1.0, 0.0, 10.0), (100.0, 1.0, 10.0), (0.0, 1.0, 0.0), (0.0, 0.0, None), (math.nan, 1.0, None)]
    for seed, host, expected in cases:
        measures = SeedMeasures()
        record_gradients(measures, [seed], weights, HostGradient(norm=host, num_params=4))
        assert measures.gradient_ratio == (pytest.approx(math.nan, nan_ok=True) if expected is None else expected)


def test_variation_and_stable_share_are_those_of_a_seeds_epochs_so_far():
    measures, weights, host = SeedMeasures(), [torch.ones(2), torch.ones(3)], HostGradient(norm=1.0, num_params=9)
    seen = []
    for norms in ([3.0, 4.0], [11.0, 0.0], [0.0, 2.0]):
        record_gradients(measures, norms, weights, host)
        seen.append((measures.gradient_variation, measures.stable_share, measures.gradient_exploding))
    assert math.isnan(seen[0][0])
    assert seen[1][0] == pytest.approx(3 / 8)
    assert seen[2][0] == pytest.approx(statistics.pstdev([5, 11, 2]) / 6)
    assert [share for _, share, _ in seen] == [1, 1 / 2, 2 / 3]
    assert [exploding for *_, exploding in seen] == [0, 1 / 2, 0]


def test_a_seeds_history_of_gradients_goes_on_when_it_is_blended_in():
    spec = environment(IMAGE)
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    its = incubate(lineage, 0, HEAVY)
    train_epoch(lineage, data, ENV_SEED, 0)
    first = its.measures.gradient_norm
    blend(lineage, 0, HEAVY, "coadapt")
    lineage.begin_epoch(1)
    train_epoch(lineage, data, ENV_SEED, 1)
    measures = lineage.seeds[0].measures
    assert measures.gradient_norms == [first, measures.gradient_norm]
    assert measures.gradient_variation > 0


def test_the_weight_change_is_that_of_the_hosts_own_weights_and_zero_while_they_are_held_still():
    spec = environment(IMAGE, host_frozen_epochs=(1, 2))
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    blend(lineage, 0, HEAVY, "coadapt")
    assert math.isnan(lineage.host_weight_change)
    before = torch.cat([p.detach().reshape(-1).clone() for p in lineage.network.host.parameters()]).double()
    SerialExecutor().run_epoch([lineage], data, ENV_SEED, 0)
    after = torch.cat([p.detach().reshape(-1) for p in lineage.network.host.parameters()]).double()
    assert lineage.host_weight_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    SerialExecutor().run_epoch([lineage], data, ENV_SEED, 1)
    assert lineage.host_weight_change == 0


class Blind(executor.GradientWatch):
    """Measures nothing."""

    def run(self, inputs, taps):
        return self.lineage.network.run(inputs, taps)

    def after_backward(self):
        pass

    def incubating(self, incubation):
        pass

    def record(self):
        pass


def test_measuring_changes_no_bit_of_what_is_learnt(monkeypatch):
    spec = environment(IMAGE)
    data = random_data(spec)

    def learnt():
        lineage = small_lineage(spec, data)
        blend(lineage, 0, 0, "coadapt", "gated")
        its = incubate(lineage, 1, HEAVY)
        for epoch in range(2):
            lineage.begin_epoch(epoch)
            train_epoch(lineage, data, ENV_SEED, epoch)
        return [*lineage.network.parameters(), *lineage.network.grafts[0].parameters(), *its.module.parameters()]

    measured = learnt()
    monkeypatch.setattr(executor, "GradientWatch", Blind)
    assert all(torch.equal(a, b) for a, b in zip(measured, learnt()))


def grown(isolation: Isolation, **changes) -> Cohort:
    cohort = Cohort(tiny_environment(horizon=10, **changes), 11, ["host"], keep_snapshots=True)
    birth = Action(op=Op.GERMINATE, blueprint=HEAVY, isolation=isolation, dwell_epochs=1, tempo_epochs=3).to_row()
    advance, fossilize = (Action(op=op).to_row() for op in (Op.ADVANCE, Op.FOSSILIZE))
    rows = [WAIT_ROW, birth, WAIT_ROW, advance, *[WAIT_ROW] * 4, fossilize, WAIT_ROW]
    observation = cohort.reset()
    for row in rows:
        observation, applied = cohort.step(row[None], observation)
        assert applied.executed_K.all()
    return cohort


def test_the_co_adaptation_delta_is_the_difference_of_the_two_lives_run_afresh():
    isolated, coadapting = grown(Isolation.ISOLATED), grown(Isolation.COADAPT)
    delta = coadaptation_delta(isolated, 0, 1)
    for cohort, accuracies in ((isolated, delta.isolated_accuracies), (coadapting, delta.coadapting_accuracies)):
        assert accuracies == tuple(m.val_accuracy for m in cohort.riders[0].lineage.history[2:])
    ours, theirs = coadapting.riders[0].outcome, isolated.riders[0].outcome
    assert ours.num_fossils == theirs.num_fossils == 1
    assert delta.points == 100 * (ours.final_val_accuracy - theirs.final_val_accuracy)
    assert delta.coadapting_accuracies != delta.isolated_accuracies
    assert delta.same_actions
    assert delta == coadaptation_delta(coadapting, 0, 1)


def test_a_co_adaptation_delta_needs_a_germination_and_both_isolations():
    cohort = grown(Isolation.COADAPT)
    with pytest.raises(LifecycleError, match=r"germinated at: \[1\]"):
        coadaptation_delta(cohort, 0, 2)
    only = grown(Isolation.COADAPT, isolations=["coadapt"])
    with pytest.raises(SpecError, match="isolations"):
        coadaptation_delta(only, 0, 1)
    assert np.array_equal(only.riders[0].executed_rows[0], WAIT_ROW)
