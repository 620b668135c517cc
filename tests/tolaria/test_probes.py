"""Probes against brute force: grafts taken out of the network, whole forward passes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from engine_specs import plan_of, tiny_environment

from esper.kasmina.hosts import DataShape, build_host
from esper.kasmina.network import Network
from esper.leyline.actions import WAIT_ROW, Action, Blend, Op
from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant
from esper.leyline.host_specs import TransformerHost
from esper.leyline.matrix import PlannedEpisode
from esper.leyline.observations import CONTRIBUTION_PERCENTS
from esper.leyline.stages import Stage
from esper.tolaria.cohort import Cohort
from esper.tolaria.interactions import shapley_values, subset_accuracies
from esper.tolaria.lineage import EpochMetrics, Lineage
from esper.tolaria.observe import as_columns
from esper.tolaria.probes import CHUNK_ANSWERS, Tally, batch_loss, chunks, score, switched_off, validate
from esper.tolaria.rollout import CohortRun
from esper.tolaria.tasks import Split

LIGHT = 6


def born(slot: int, **levers: object) -> np.ndarray:
    return Action(op=Op.GERMINATE, slot=slot, blueprint=LIGHT, **levers).to_row()


def act(op: Op, slot: int) -> np.ndarray:
    return Action(op=op, slot=slot).to_row()


def cohort_after(script: list[np.ndarray], epochs: int, **changes: object) -> tuple[Cohort, list[dict]]:
    """One episode; returns the cohort and what was observed after every epoch."""
    cohort = Cohort(tiny_environment(**{"blends": ("linear",), "horizon": 12, **changes}), 3, ["host"])
    observation = cohort.reset()
    seen = [as_columns(observation.matrix)]
    for step in range(epochs):
        row = script[step] if step < len(script) else WAIT_ROW
        observation, applied = cohort.step(row[None], observation)
        assert applied.executed_K.all(), applied.refused_by
        seen.append(as_columns(observation.matrix))
    return cohort, seen


def blended(num_seeds: int, **changes: object) -> Cohort:
    """A cohort whose one lineage has blended seeds with weights that matter."""
    script = [born(slot) for slot in range(num_seeds)]
    script += [WAIT_ROW] * 3 + [act(Op.ADVANCE, slot) for slot in range(num_seeds)]
    cohort, _ = cohort_after(script, len(script) + 1, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for graft in lineage_of(cohort).network.grafts.values():
            for parameter in graft.module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return cohort


def lineage_of(cohort: Cohort) -> Lineage:
    return cohort.riders[0].lineage


def brute(lineage: Lineage, split: Split, heard: tuple[int, ...]) -> float:
    """Accuracy of a whole pass over all rows at once, with these grafts alone."""
    network = lineage.network
    network.train_mode(False)
    grafts = network.grafts
    network.grafts = {slot: grafts[slot] for slot in heard}
    with torch.no_grad():
        answers = network.run(split.inputs)[0].argmax(1)
    network.grafts = grafts
    return int((answers == split.labels).sum()) / len(split)


@pytest.fixture(scope="module")
def three() -> Cohort:
    cohort = blended(3, probe_pairs=True, probe_shapley=True)
    validate(lineage_of(cohort), cohort.data, EpochMetrics())
    return cohort


def test_removal_costs_equal_whole_passes_without_the_seeds(three):
    lineage, rows = lineage_of(three), three.data.val_epoch
    now = brute(lineage, rows, (0, 1, 2))
    alone = [100 * (now - brute(lineage, rows, tuple({0, 1, 2} - {slot}))) for slot in range(3)]
    assert [lineage.seeds[slot].measures.removal_cost for slot in range(3)] == pytest.approx(alone)
    assert lineage.removal_cost_all == pytest.approx(100 * (now - brute(lineage, rows, ())))
    assert len({*alone, lineage.removal_cost_all}) >= 3, "the seeds must matter for this to say anything"


def test_interactions_equal_the_definition_with_the_other_seeds_as_they_are(three):
    lineage, rows = lineage_of(three), three.data.val_epoch

    def interaction(one: int, other: int) -> float:
        (third,) = {0, 1, 2} - {one, other}
        on = [brute(lineage, rows, (*pair, third)) for pair in ((one, other), (one,), (other,), ())]
        return 100 * (on[0] - on[1] - on[2] + on[3])

    for slot in range(3):
        expected = sum(interaction(slot, other) for other in range(3) if other != slot)
        assert lineage.seeds[slot].measures.interaction_sum == pytest.approx(expected)
    assert any(lineage.seeds[slot].measures.interaction_sum for slot in range(3))


def test_probing_leaves_the_network_as_it_was(three):
    lineage = lineage_of(three)
    before = {name: value.clone() for name, value in lineage.network.host.state_dict().items()}
    grafts = dict(lineage.network.grafts)
    validate(lineage, three.data, EpochMetrics())
    assert lineage.network.grafts == grafts
    assert all(torch.equal(value, before[name]) for name, value in lineage.network.host.state_dict().items())


def test_pairs_are_unmeasured_where_nobody_asks_or_there_is_one_seed():
    for cohort in (blended(2), blended(1, probe_pairs=True)):
        lineage = lineage_of(cohort)
        validate(lineage, cohort.data, EpochMetrics())
        assert all(math.isnan(seed.measures.interaction_sum) for seed in lineage.seeds.values())
        assert math.isfinite(lineage.removal_cost_all)
    assert lineage.removal_cost_all == lineage.seeds[0].measures.removal_cost
    assert math.isnan(cohort.trunk.removal_cost_all)


def test_the_contribution_at_each_milestone_is_the_removal_cost_of_the_first_epoch_that_reaches_it():
    script = [born(0, tempo_epochs=5), WAIT_ROW, WAIT_ROW, WAIT_ROW, act(Op.ADVANCE, 0)]
    _, seen = cohort_after(script, 11, learning_rate=0.3)
    alphas = [float(columns["s0_alpha"][0]) for columns in seen]
    costs = [float(columns["s0_removal_cost"][0]) for columns in seen]
    assert [round(alpha, 1) for alpha in alphas[4:11]] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    for percent, first in zip(CONTRIBUTION_PERCENTS, (6, 7, 8, 9)):
        kept = np.array([float(columns[f"s0_contribution_{percent}"][0]) for columns in seen])
        assert np.isnan(kept[:first]).all()
        assert (kept[first:] == costs[first]).all()


def test_a_seed_that_was_committed_keeps_its_contributions_and_loses_what_is_no_longer_measured():
    script = [born(0), WAIT_ROW, WAIT_ROW, act(Op.ADVANCE, 0), *[WAIT_ROW] * 5, act(Op.FOSSILIZE, 0)]
    _, seen = cohort_after(script, 10, probe_pairs=True)
    last = {name: float(values[0]) for name, values in seen[-1].items()}
    assert last["s0_stage"] == Stage.FOSSILIZED
    assert np.isfinite([last[f"s0_contribution_{percent}"] for percent in CONTRIBUTION_PERCENTS]).all()
    assert np.isnan([last["s0_removal_cost"], last["s0_interaction_sum"], last["removal_cost_all"]]).all()


def test_the_blending_velocity_of_a_sigmoid_is_the_rise_of_its_alpha():
    script = [born(0, blend=Blend.SIGMOID, tempo_epochs=5), WAIT_ROW, WAIT_ROW, act(Op.ADVANCE, 0)]
    _, seen = cohort_after(script, 10, blends=("linear", "sigmoid-1"))
    alpha, velocity = (np.array([c[f"s0_{name}"][0] for c in seen]) for name in ("alpha", "blending_velocity"))
    assert velocity[5:8] == pytest.approx(np.diff(alpha)[4:7], abs=1e-6)
    assert len({*velocity[5:8].round(3)}) > 1


def test_what_a_lever_does_is_told_while_it_does_it_and_is_null_elsewhere():
    script = [born(0, dwell_epochs=2, tempo_epochs=5), WAIT_ROW, WAIT_ROW, act(Op.ADVANCE, 0)]
    cohort, seen = cohort_after(script, 10)

    def told(name: str) -> list[float]:
        return [float(columns[f"s0_{name}"][0]) for columns in seen]

    nothing = [math.nan]
    assert told("g2_headroom") == pytest.approx([*nothing, -1, 0, 1, *nothing * 7], nan_ok=True)
    assert told("blending_velocity") == pytest.approx([*nothing * 4, *[0.2] * 4, 0, 0, 0], nan_ok=True)
    weights = torch.cat([p.detach().flatten() for p in lineage_of(cohort).network.grafts[0].module.parameters()])
    assert told("weight_norm")[-1] == pytest.approx(float(weights.double().norm()), rel=1e-5)
    assert math.isnan(told("weight_norm")[0])
    assert len({*told("weight_norm")[1:]}) == 10, "the weights must move for this to say anything"


def test_a_seed_that_waits_at_its_first_gate_is_not_probed():
    cohort, seen = cohort_after([born(0, dwell_epochs=2)], 2, ask_at_every_gate=True)
    assert cohort.riders[0].slots[0].stage is Stage.GERMINATED
    last = {name: float(values[0]) for name, values in seen[-1].items()}
    assert np.isnan([last["s0_seed_improvement"], last["s0_val_loss_drop"], last["s0_train_loss_drop"]]).all()
    assert last["s0_g2_headroom"] == -2
    assert cohort.step_costs.flops_K[0] == cohort_after([], 1)[0].step_costs.flops_K[0]


def test_subsets_equal_whole_passes_and_shapley_values_the_mean_over_all_orders(three):
    lineage, rows = lineage_of(three), three.data.val
    worth = subset_accuracies(lineage.network, rows)
    everyone = [frozenset(c) for size in range(4) for c in itertools.combinations(range(3), size)]
    assert worth == pytest.approx({subset: brute(lineage, rows, tuple(subset)) for subset in everyone})
    orders = list(itertools.permutations(range(3)))
    expected = dict.fromkeys(range(3), 0.0)
    for order in orders:
        for position, slot in enumerate(order):
            before = frozenset(order[:position])
            expected[slot] += (worth[before | {slot}] - worth[before]) / len(orders)
    values = shapley_values(worth)
    assert values == pytest.approx(expected)
    assert sum(values.values()) == pytest.approx(worth[frozenset(range(3))] - worth[frozenset()])


def test_shapley_values_of_a_game_that_is_known():
    worth = {frozenset(c): 0.0 for size in range(4) for c in itertools.combinations("LRX", size)}
    worth |= {frozenset("LR"): 1.0, frozenset("LRX"): 1.0}  # a pair of gloves; X adds nothing
    assert shapley_values(worth) == pytest.approx({"L": 0.5, "R": 0.5, "X": 0.0})


def schedule(num_slots: int) -> PlannedEpisode:
    levers = {"dwell_epochs": 1, "tempo_epochs": 3}
    plants = tuple(Plant(slot=slot, blueprint="conv_light", **levers) for slot in range(num_slots))
    return PlannedEpisode(controller=FixedSchedule(name="all", plants=plants))


def rows_of(episodes: list[PlannedEpisode], **changes: object) -> tuple[CohortRun, dict[str, list[dict]]]:
    run = CohortRun.of(plan_of(episodes, tiny_environment(**{"horizon": 10, **changes})))
    tables = run.recorder.tables("test")
    return run, {name: table.to_pylist() for name, table in tables.items()}


def test_the_row_of_an_episode_has_its_shapley_values_fossils_included():
    run, rows = rows_of([schedule(3), PlannedEpisode(controller=NeverAct())], probe_shapley=True, probe_pairs=True)
    grown = next(row for row in rows["episodes"] if row["controller"] == "all")
    bare = next(row for row in rows["episodes"] if row["controller"] == "never-act")
    lineage = run.cohort.riders[0].lineage
    assert grown["num_fossils"] == 3
    assert [value is None for value in grown["shapley"]] == [False] * 3 + [True] * 3
    whole = 100 * (brute(lineage, run.cohort.data.val, (0, 1, 2)) - brute(lineage, run.cohort.data.val, ()))
    assert sum(value or 0.0 for value in grown["shapley"]) == pytest.approx(whole)
    assert bare["shapley"] is None
    assert {row["data_digest"] for row in rows["episodes"]} == {run.cohort.data.digest}
    assert {row["num_rollbacks"] for row in rows["episodes"]} == {0}
    assert any(row["s0_interaction_sum"] is not None for row in rows["steps"])


@pytest.mark.parametrize(("num_slots", "asked"), [(5, True), (3, False)])
def test_shapley_values_of_more_than_four_seeds_or_unasked_are_null(num_slots, asked):
    host = {"kind": "cnn", "channels": (4,) * num_slots, "kernels": (1,) * num_slots, "pools": (1,) * num_slots}
    _, rows = rows_of([schedule(num_slots)], host=host, probe_shapley=asked, horizon=12)
    (row,) = rows["episodes"]
    assert row["num_fossils"] + row["num_advance"] >= num_slots
    assert row["shapley"] is None


def test_an_episode_whose_host_was_rolled_back_says_so_and_a_trunk_that_was_is_no_control():
    run, rows = rows_of([schedule(1), PlannedEpisode(controller=NeverAct())])
    assert {(row["outcome"], row["control_valid"]) for row in rows["episodes"]} == {("completed", True)}
    run.cohort.trunk.num_rollbacks = 1
    rows = run.recorder.tables("test")["episodes"].to_pylist()
    found = {row["controller"]: (row["outcome"], row["num_rollbacks"], row["control_valid"]) for row in rows}
    assert found == {"all": ("completed", 0, False), "never-act": ("rolled_back", 1, False)}
    run.cohort.riders[1].diverged = True
    outcomes = {row["controller"]: row["outcome"] for row in run.recorder.tables("test")["episodes"].to_pylist()}
    assert outcomes == {"all": "completed", "never-act": "diverged"}


def test_a_last_chunk_of_one_row_is_probed_where_images_have_shrunk_to_one_pixel():
    task = {"kind": "digits", "sources": (60, CHUNK_ANSWERS + 1, 20)}
    host = {"kind": "cnn", "channels": (4, 4, 4, 4), "kernels": (3, 1, 1, 1), "pools": (2, 2, 2, 1)}
    _, (_, row) = cohort_after([born(0)], 1, task=task, host=host, horizon=2, batches_per_epoch=1)
    assert np.isfinite(row["s0_val_loss_drop"]).all()
    assert row["s3_resolution"].tolist() == [1]


def test_a_loss_that_is_not_finite_leaves_every_probe_unmeasured():
    cohort = blended(2, probe_pairs=True)
    lineage = lineage_of(cohort)
    with torch.no_grad():
        next(lineage.network.host.parameters()).fill_(math.inf)
    metrics = EpochMetrics()
    validate(lineage, cohort.data, metrics)
    assert lineage.non_finite
    assert math.isnan(metrics.val_loss)
    assert math.isfinite(metrics.val_accuracy)
    costs = [seed.measures.removal_cost for seed in lineage.seeds.values()]
    assert np.isnan([*costs, lineage.removal_cost_all]).all()


def test_text_counts_tokens_and_its_loss_is_the_mean_over_them():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (3, 4), generator=generator)
    losses, right = [], 0
    for row in range(3):
        for token in range(4):
            scores = logits[row, token]
            losses.append(float(torch.log(scores.exp().sum()) - scores[labels[row, token]]))
            right += int(scores.argmax()) == int(labels[row, token])
    assert float(batch_loss(logits, labels)) == pytest.approx(sum(losses) / 12)
    tally = Tally()
    tally.add(logits[:2], labels[:2])
    tally.add(logits[2:], labels[2:])
    assert (tally.count, tally.mean_loss()) == (12, pytest.approx(sum(losses) / 12))
    assert tally.accuracy() == right / 12


def test_the_loss_of_images_is_the_plain_cross_entropy_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(64, 10, generator=generator), torch.randint(10, (64,), generator=generator)
    assert torch.equal(batch_loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels))


def test_chunks_have_a_fixed_number_of_rows_and_text_fewer():
    images = Split(inputs=torch.zeros(1030, 1, 2, 2), labels=torch.zeros(1030, dtype=torch.int64))
    assert [len(y) for _, y in chunks(images)] == [512, 512, 6]
    tokens = torch.zeros(70, 64, dtype=torch.int64)
    assert [len(y) for _, y in chunks(Split(inputs=tokens, labels=tokens))] == [32, 32, 6]


def test_a_decoder_is_scored_by_its_next_tokens():
    torch.manual_seed(0)
    shape = DataShape(kind="text", channels=1, resolution=8, num_classes=11)
    network = Network(build_host(TransformerHost(layers=2, heads=2, embed=8, slots=2, dropout=0.5), shape))
    tokens = torch.randint(11, (300, 9))
    split = Split(inputs=tokens[:, :-1], labels=tokens[:, 1:])
    network.train_mode(False)
    answers = network.run(split.inputs)[0].argmax(-1)
    expected = float((answers == split.labels).double().mean())
    assert score(lambda x: network.run(x)[0], split) == pytest.approx(expected)


def test_grafts_come_back_although_a_pass_fails(three):
    network = lineage_of(three).network
    grafts = network.grafts

    def failing_pass() -> None:
        with switched_off(network, (0,)):
            assert set(network.grafts) == {1, 2}
            network.suffix(0, torch.zeros(0))

    with pytest.raises(RuntimeError):
        failing_pass()
    assert network.grafts is grafts
