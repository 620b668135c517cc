"""Every saved query against the same figures computed by polars from the tables that went in."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import polars as pl
import pytest
from factories import concat_tables, synthetic_tables

from esper.karn.catalogue import query
from esper.karn.saved import description, read_query, saved_queries
from esper.karn.store import open_store
from esper.leyline.actions import CNN_BLUEPRINTS
from esper.leyline.errors import UnknownNameError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.stages import LIVE_STAGES, Stage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    behaviours = ("baseline", "random", "anti-kasmina", "schedule-sampler")
    tables = concat_tables(
        synthetic_tables(horizon=10, num_env_seeds=3, behaviours=behaviours, refusal_rate=0.3),
        synthetic_tables(environment="digits-baseline", num_env_seeds=1, behaviours=("never-act", "baseline")),
    )
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    dataset.commit(tables)
    return dataset.seal(matrix_id="m", provenance={}), tables


@pytest.fixture(scope="module")
def run(made):
    return lambda name: pl.from_arrow(query(made[0], read_query(name))).to_dicts()


@pytest.fixture(scope="module")
def steps(made):
    return pl.from_arrow(made[1]["steps"]).sort("episode_id", "step").to_dicts()


@pytest.fixture(scope="module")
def episodes(made):
    rows = pl.from_arrow(made[1]["episodes"]).to_dicts()
    for row in rows:
        row["gain"] = 100 * (row["final_val_accuracy"] - row["control_final_val_accuracy"])
        row["uncommitted"] = 100 * (row["uncommitted_val_accuracy"] - row["control_final_val_accuracy"])
    return {row["episode_id"]: row for row in rows}


def decisions(steps):
    return [row for row in steps if not row["is_last"]]


def by(rows, *keys):
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def test_there_are_at_least_eight_and_each_says_what_it_answers(made):
    queries = saved_queries()
    assert len(queries) >= 8
    for name, text in queries.items():
        assert len(text) > 20, name
        assert query(made[0], read_query(name)).num_rows > 0 or name == "failures", name


def test_an_unknown_query_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'refusals'"):
        read_query("refusal")
    assert description("SELECT 1") == description("") == ""


def test_return_by_behaviour(run, episodes):
    groups = by(episodes.values(), "environment", "controller", "epsilon")
    rows = run("return-by-behaviour")
    assert len(rows) == len(groups)
    for row in rows:
        members = groups[row["environment"], row["controller"], row["epsilon"]]
        gains = [member["gain"] for member in members]
        assert row["episodes"] == len(members)
        assert row["env_seeds"] == len({member["env_seed"] for member in members})
        assert row["mean_gain_points"] == pytest.approx(np.mean(gains))
        if len(gains) > 1:
            assert row["sd_gain_points"] == pytest.approx(np.std(gains, ddof=1), abs=1e-9)
        growth = [math.log2(1 + member["final_seed_params"] / member["host_params"]) for member in members]
        assert row["mean_growth_log2"] == pytest.approx(np.mean(growth))
    for environment in ("digits-gap", "digits-baseline"):
        means = [row["mean_gain_points"] for row in rows if row["environment"] == environment]
        assert means == sorted(means, reverse=True)


def test_action_shares_by_stage(run, steps):
    counted, totals = Counter(), Counter()
    for row in decisions(steps):
        if row["forced"]:
            continue
        live = [row[f"s{slot}_stage"] for slot in range(6) if row[f"s{slot}_stage"] in LIVE_STAGES]
        stage = Stage(max(live)).name if live else "NO LIVE SEED"
        counted[row["environment"], stage, row["op"]] += 1
        totals[row["environment"], stage] += 1
    rows = run("action-shares-by-stage")
    found = {(row["environment"], row["live_stage"], row["op"]): row["decisions"] for row in rows}
    assert found == dict(counted)
    for row in rows:
        assert row["share"] == pytest.approx(row["decisions"] / totals[row["environment"], row["live_stage"]])


def test_gain_by_blueprint_and_slot(run, steps, episodes):
    commits = by([r for r in decisions(steps) if r["op"] == "FOSSILIZE" and r["executed"]], "episode_id")
    groups = defaultdict(list)
    for (episode_id,), rows in commits.items():
        if len(rows) == 1:
            slot = rows[0]["action_slot"]
            blueprint = CNN_BLUEPRINTS[rows[0][f"s{slot}_blueprint"]]
            groups[rows[0]["environment"], blueprint, slot].append(episodes[episode_id]["gain"])
    rows = run("gain-by-blueprint-and-slot")
    found = {(row["environment"], row["blueprint"], row["slot"]): row for row in rows}
    assert groups
    assert found.keys() == groups.keys()
    for key, gains in groups.items():
        assert found[key]["episodes"] == len(gains)
        assert found[key]["mean_gain_points"] == pytest.approx(np.mean(gains))


def test_best_and_worst_episodes(run, episodes):
    rows = run("best-and-worst-episodes")
    for (environment,), members in by(episodes.values(), "environment").items():
        gains = sorted((member["gain"] for member in members), reverse=True)
        expected = gains if len(gains) <= 20 else gains[:10] + gains[-10:]
        found = [row["gain_points"] for row in rows if row["environment"] == environment]
        assert found == pytest.approx(expected)
        best = [row for row in rows if row["environment"] == environment and row["which"] == "best"]
        assert len(best) == min(10, len(gains))


def test_returns_by_reward_ranks_the_behaviours_under_each(run, steps, episodes):
    spec = load("rewards", "cifar16-gap", RewardSpec)
    sums = defaultdict(float)
    for row in decisions(steps):
        sums[row["episode_id"]] += row["reward_accuracy_points"] - spec.rent_points * row["reward_growth_log2"]
    rows = [row for row in run("returns-by-reward") if row["reward"] == "cifar16-gap"]
    groups = by(episodes.values(), "environment", "controller", "epsilon")
    assert len(rows) == len(groups)
    for row in rows:
        members = groups[row["environment"], row["controller"], row["epsilon"]]
        returns = [sums[member["episode_id"]] / spec.scale_points for member in members]
        assert row["episodes"] == len(members)
        assert row["mean_return"] == pytest.approx(np.mean(returns), abs=1e-12)
    for (_,), group in by(rows, "environment").items():
        ordered = sorted(group, key=lambda row: -row["mean_return"])
        assert [row["place"] for row in ordered] == sorted(row["place"] for row in group)


def test_costs_per_environment(run, made):
    costs = pl.from_arrow(made[1]["costs"])
    rows = run("costs-per-environment")
    assert {row["environment"] for row in rows} == {"digits-gap", "digits-baseline"}
    for row in rows:
        mine = costs.filter(pl.col("environment") == row["environment"])
        assert row["alone_hours"] == pytest.approx(mine["cpu_s_alone"].sum() / 3600)
        assert row["shared_hours"] == pytest.approx(mine["cpu_s_shared"].sum() / 3600)
        assert row["episodes"] == mine["episode_id"].n_unique()


def test_progress_counts_what_is_done(run, episodes):
    rows = run("progress")
    assert sum(row["done"] for row in rows) == len(episodes)
    assert {row["failed"] for row in rows} == {0}


def test_refusals(run, steps):
    counted = Counter(
        (row["environment"], row["op"], row["refused_by"] or "(carried out)")
        for row in decisions(steps)
        if row["op"] != "WAIT"
    )
    rows = run("refusals")
    assert {(row["environment"], row["op"], row["gate"]): row["decisions"] for row in rows} == dict(counted)
    assert {row["gate"] for row in rows} == {"(carried out)", "G2", "G5"}
    for (_, _), group in by(rows, "environment", "op").items():
        assert sum(row["share"] for row in group) == pytest.approx(1)


def test_op_entropy_over_time(run, steps):
    groups = by([row for row in decisions(steps) if not row["forced"]], "environment", "step")
    rows = run("op-entropy-over-time")
    assert len(rows) == len(groups)
    for row in rows:
        ops = Counter(member["op"] for member in groups[row["environment"], row["step"]])
        shares = np.array(list(ops.values())) / ops.total()
        assert row["decisions"] == ops.total()
        assert row["distinct_ops"] == len(ops)
        assert row["entropy_nats"] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-12)


def test_cost_alone_and_shared(run, made):
    costs = pl.from_arrow(made[1]["costs"])
    for row in run("cost-alone-and-shared"):
        mine = costs.filter(pl.col("environment") == row["environment"])
        count = mine["episode_id"].n_unique()
        assert row["episodes"] == count
        assert row["mean_alone_s"] == pytest.approx(mine["cpu_s_alone"].sum() / count)
        assert row["mean_shared_s"] == pytest.approx(mine["cpu_s_shared"].sum() / count)
        assert row["times_cheaper"] == pytest.approx(mine["cpu_s_alone"].sum() / mine["cpu_s_shared"].sum())


def test_distinct_histories(run, episodes):
    rows = {row["environment"]: row for row in run("distinct-histories")}
    for (environment,), members in by(episodes.values(), "environment").items():
        counts = Counter((member["env_seed"], member["history_id"]) for member in members)
        row = rows[environment]
        assert row["episodes"] == len(members)
        assert row["distinct_histories"] == len(counts)
        assert row["max_multiplicity"] == max(counts.values())
        assert row["repeated_share"] == pytest.approx(1 - len(counts) / len(members))


def test_seed_fates(run, steps):
    counted = defaultdict(Counter)
    for row in decisions(steps):
        if row["op"] == "WAIT" or not row["executed"]:
            continue
        slot = row["action_slot"]
        code = row["action_blueprint"] if row["op"] == "GERMINATE" else row[f"s{slot}_blueprint"]
        counted[row["environment"], CNN_BLUEPRINTS[code]][row["op"]] += 1
    rows = run("seed-fates")
    assert {(row["environment"], row["blueprint"]) for row in rows} == set(counted)
    for row in rows:
        ops = counted[row["environment"], row["blueprint"]]
        assert (row["germinated"], row["blended"]) == (ops["GERMINATE"], ops["ADVANCE"])
        assert (row["fossilized"], row["pruned"]) == (ops["FOSSILIZE"], ops["PRUNE"])
        assert row["unfinished"] == ops["GERMINATE"] - ops["FOSSILIZE"] - ops["PRUNE"] >= 0
        assert row["fossilized_share"] == pytest.approx(ops["FOSSILIZE"] / ops["GERMINATE"])


def test_probe_against_gain(run, steps, episodes):
    advanced = by([r for r in decisions(steps) if r["op"] == "ADVANCE" and r["executed"]], "episode_id")
    pairs = defaultdict(list)
    for (episode_id,), rows in advanced.items():
        if len(rows) == 1:
            row, slot = rows[0], rows[0]["action_slot"]
            probes = (row[f"s{slot}_val_loss_drop"], row[f"s{slot}_seed_improvement"])
            pairs[row["environment"]].append((*probes, episodes[episode_id]["uncommitted"]))
    rows = {row["environment"]: row for row in run("probe-against-gain")}
    assert rows.keys() == pairs.keys()
    for environment, values in pairs.items():
        drops, improvements, gains = np.array(values).T
        row = rows[environment]
        assert row["episodes"] == len(values)
        assert row["mean_loss_drop_nats"] == pytest.approx(drops.mean())
        assert row["mean_improvement_points"] == pytest.approx(improvements.mean())
        assert row["mean_gain_points"] == pytest.approx(gains.mean())
        if len(values) > 2:
            assert row["corr_loss_drop"] == pytest.approx(np.corrcoef(drops, gains)[0, 1], nan_ok=True)
            assert row["corr_improvement"] == pytest.approx(np.corrcoef(improvements, gains)[0, 1], nan_ok=True)
    assert max(len(values) for values in pairs.values()) > 2
