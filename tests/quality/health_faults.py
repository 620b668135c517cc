"""Faults to plant: each turns a good set of tables into one with a single thing wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from factories import Tables, select_episodes

from esper.leyline.actions import MAX_SLOTS, Op, pack_mask, slot_slice, unpack_mask
from esper.leyline.observations import slot_column
from esper.leyline.schema import ACTION_FIELDS
from esper.leyline.tree import log_softmax, uniform_logits

Values = list[object]


def edit(tables: Mapping[str, pa.Table], name: str, column: str, change: Callable[[Values], Values]) -> Tables:
    """Return the tables with one column changed."""
    table = tables[name]
    field = table.schema.field(column)
    values = pa.array(change(table[column].to_pylist()), field.type)
    return {**tables, name: table.set_column(table.schema.get_field_index(column), field, values)}


def put(tables: Mapping[str, pa.Table], row: int, **values: object) -> Tables:
    """Return the tables with some cells of one row of `steps` changed."""
    out = dict(tables)
    for column, value in values.items():
        out = edit(out, "steps", column, lambda old, value=value: [*old[:row], value, *old[row + 1 :]])
    return out


def rows_where(tables: Mapping[str, pa.Table], expression: pc.Expression) -> list[int]:
    """Return the indices of the rows of `steps` that match."""
    steps = tables["steps"].append_column("index", pa.array(range(tables["steps"].num_rows)))
    return steps.filter(expression)["index"].to_pylist()


def keep(tables: Mapping[str, pa.Table], name: str, rows: list[int]) -> Tables:
    """Return the tables with only some rows of one of them."""
    return {**tables, name: tables[name].take(rows)}


def _row(tables: Mapping[str, pa.Table], expression: pc.Expression) -> int:
    return rows_where(tables, expression)[0]


def _trunk_row(tables: Mapping[str, pa.Table]) -> int:
    return _row(tables, (pc.field("actor") == "never-act") & (pc.field("step") == 3))


def action_not_executed(tables: Tables) -> Tables:
    born = tables["steps"].slice(_row(tables, pc.field("op") == "GERMINATE"), 1).to_pylist()[0]
    action = {name: value for name, value in born.items() if name.startswith("action_") or name == "op"}
    return put(tables, _trunk_row(tables), **action, op_probs=[0.0, 1.0, 0.0, 0.0, 0.0])


def executed_but_denied(tables: Tables) -> Tables:
    return put(tables, _row(tables, pc.field("op") == "GERMINATE"), executed=False)


def other_blueprint_grew(tables: Tables) -> Tables:
    row = _row(tables, (pc.field("op") == "GERMINATE") & (pc.field("action_blueprint") < 7))
    return put(tables, row, action_blueprint=7)


def lineage_never_forks(tables: Tables) -> Tables:
    seeds = tables["steps"]["env_seed"].to_pylist()
    return edit(tables, "steps", "host_key", lambda old: [f"{seed:024d}"[-24:] for seed in seeds])


def seed_not_in_forward_pass(tables: Tables) -> Tables:
    control = tables["steps"]["control_val_loss"].to_pylist()
    return edit(tables, "steps", "val_loss", lambda old: control)


def control_of_another_run(tables: Tables) -> Tables:
    return put(tables, _trunk_row(tables), control_val_loss=9.0)


def rewards_shifted(tables: Tables) -> Tables:
    last = tables["steps"]["is_last"].to_pylist()

    def shift(old: Values) -> Values:
        out: Values = list(old)
        start = 0
        for end in (index for index, flag in enumerate(last) if flag):
            out[start:end] = [old[end - 1], *old[start : end - 1]]
            start = end + 1
        return out

    return edit(tables, "steps", "reward_accuracy_points", shift)


def removal_cost_as_reward(tables: Tables) -> Tables:
    cost, last = (tables["steps"][name].to_pylist() for name in ("s0_removal_cost", "is_last"))
    paid = [None if end else float(value or 0.0) for value, end in zip(cost, last)]
    return edit(tables, "steps", "reward_accuracy_points", lambda old: paid)


def outcome_of_another_run(tables: Tables) -> Tables:
    return edit(tables, "episodes", "final_val_accuracy", lambda old: [old[0] + 0.01, *old[1:]])


def softmax_logged_argmax_ran(tables: Tables) -> Tables:
    epsilon, ops = (tables["steps"][name].to_pylist() for name in ("epsilon", "op"))
    return edit(
        tables,
        "steps",
        "behaviour_logp",
        lambda old: [float(np.log(0.6)) if e == 0 and o == "WAIT" else v for v, e, o in zip(old, epsilon, ops)],
    )


def exploration_logged_greedy_ran(tables: Tables) -> Tables:
    """Every propensity is possible by itself; together they are not: what claims epsilon 0.2 never explored."""
    rows = rows_where(
        tables, (pc.field("epsilon") == 0) & pc.field("behaviour_logp").is_valid() & (pc.field("op") == "WAIT")
    )
    packed = b"".join(tables["steps"]["tree_mask"].take(rows).to_pylist())
    mask = unpack_mask(np.frombuffer(packed, dtype=np.uint8).reshape(len(rows), -1))
    wait = np.exp(log_softmax(uniform_logits(len(rows)), mask)[:, Op.WAIT])
    logp = dict(zip(rows, np.log(0.2 * wait + 0.8).tolist()))
    mixed = set(rows_where(tables, pc.field("epsilon") == 0.2))
    told = [logp.get(i, None if i in mixed else v) for i, v in enumerate(tables["steps"]["behaviour_logp"].to_pylist())]
    out = edit(tables, "steps", "behaviour_logp", lambda old: told)
    out = edit(out, "steps", "epsilon", lambda old: [0.2 if i in logp else v for i, v in enumerate(old)])
    return edit(out, "steps", "op_probs", lambda old: [None if i in logp else v for i, v in enumerate(old)])


def op_marginals_do_not_sum(tables: Tables) -> Tables:
    row = _row(tables, (pc.field("actor") == "random") & (pc.field("step") == 2))
    return put(tables, row, op_probs=[0.5, 0.5, 0.5, 0.0, 0.0])


def unmasked_invalid_action(tables: Tables) -> Tables:
    return put(tables, _trunk_row(tables), op="FOSSILIZE", executed=False, refused_by="G5")


def second_spelling_of_wait(tables: Tables) -> Tables:
    return put(tables, _trunk_row(tables), action_blueprint=3)


def mask_of_another_state(tables: Tables) -> Tables:
    row = _trunk_row(tables)
    mask = unpack_mask(np.frombuffer(tables["steps"]["tree_mask"][row].as_py(), dtype=np.uint8)[None])
    mask[0, [Op.PRUNE, slot_slice(Op.PRUNE).start]] = True
    return put(tables, row, tree_mask=pack_mask(mask)[0].tobytes())


def bitmap_disagrees(tables: Tables) -> Tables:
    return put(tables, _trunk_row(tables), valid_ops=31)


def illegal_transition(tables: Tables) -> Tables:
    row = _row(tables, (pc.field("actor") == "never-act") & pc.field("is_last"))
    return put(tables, row, s2_stage=10)


def nan_feature(tables: Tables) -> Tables:
    return put(tables, 5, s1_gradient_norm=float("nan"))


def missing_action(tables: Tables) -> Tables:
    return put(tables, _trunk_row(tables), op=None)


def missing_final_observation(tables: Tables) -> Tables:
    last = rows_where(tables, pc.field("is_last"))[0]
    return keep(tables, "steps", [i for i in range(tables["steps"].num_rows) if i != last])


def missing_step(tables: Tables) -> Tables:
    gap = rows_where(tables, pc.field("step") == 4)[0]
    return keep(tables, "steps", [i for i in range(tables["steps"].num_rows) if i != gap])


def steps_without_episode(tables: Tables) -> Tables:
    return keep(tables, "episodes", list(range(1, tables["episodes"].num_rows)))


def doubled_episode(tables: Tables) -> Tables:
    copy = select_episodes(tables, [tables["episodes"]["episode_id"][0].as_py()])
    return {name: pa.concat_tables([table, copy[name]]) for name, table in tables.items()}


def leaked_env_seed(tables: Tables) -> Tables:
    return edit(tables, "episodes", "role", lambda old: ["evaluation", *old[1:]])


def training_on_evaluation_replicates(tables: Tables) -> Tables:
    return edit(tables, "episodes", "replicate", lambda old: [200_000 + value for value in old])


def identical_behaviours(tables: Tables) -> Tables:
    return edit(tables, "episodes", "history_id", lambda old: ["0" * 24] * len(old))


def always_the_same_lever(tables: Tables) -> Tables:
    """A feature that was never measured: constant in every slot."""
    out = tables
    for slot in range(MAX_SLOTS):
        out = edit(out, "steps", slot_column(slot, "weight_norm"), lambda old: [None] * len(old))
    return out


def alpha_above_one(tables: Tables) -> Tables:
    return put(tables, _row(tables, pc.field("s0_alpha") == 1), s0_alpha=1.5)


def held_seed_half_heard(tables: Tables) -> Tables:
    return put(tables, _row(tables, pc.field("s0_stage") == 6), s0_alpha=0.5)


def accuracy_in_percent(tables: Tables) -> Tables:
    return edit(tables, "steps", "train_accuracy", lambda old: [None if v is None else 100 * float(v) for v in old])


def stale_schema(tables: Tables) -> Tables:
    return {**tables, "steps": tables["steps"].drop_columns(["s0_val_loss_drop"])}


def column_of_another_type(tables: Tables) -> Tables:
    steps = tables["steps"]
    index = steps.schema.get_field_index("executed")
    return {**tables, "steps": steps.set_column(index, "executed", steps["executed"].cast(pa.string()))}


def truncated_episode(tables: Tables) -> Tables:
    """The run was killed: the rows of one episode stop."""
    episode = tables["steps"]["episode_id"][0].as_py()
    lost = set(rows_where(tables, (pc.field("episode_id") == episode) & (pc.field("step") > 7)))
    return keep(tables, "steps", [i for i in range(tables["steps"].num_rows) if i not in lost])


def short_episode_called_completed(tables: Tables) -> Tables:
    """A never-act episode that stops at half its horizon, as if that were its end."""
    episode = tables["steps"]["episode_id"][_trunk_row(tables)].as_py()
    end = _row(tables, (pc.field("episode_id") == episode) & (pc.field("step") == 6))
    final = _row(tables, (pc.field("episode_id") == episode) & pc.field("is_last"))
    last = tables["steps"].slice(final, 1).to_pylist()[0]
    names = ("op", *ACTION_FIELDS, "executed", "behaviour_logp", "op_probs", "is_last", "final_val_accuracy")
    names += ("control_final_val_accuracy", "final_seed_params", "reward_accuracy_points", "reward_growth_log2")
    out = put(tables, end, **{name: last[name] for name in names})
    out = put(out, end - 1, terminated=True)
    out = keep(out, "steps", [i for i in range(tables["steps"].num_rows) if not end < i <= final])
    ids = tables["episodes"]["episode_id"].to_pylist()
    return edit(out, "episodes", "num_steps", lambda old: [6 if i == episode else v for i, v in zip(ids, old)])


def end_marked_early(tables: Tables) -> Tables:
    return put(tables, _trunk_row(tables), terminated=True)


def no_seed_gets_gradient(tables: Tables) -> Tables:
    """The graph was cut: the norms that were measured are zero."""
    out = tables
    for slot in range(MAX_SLOTS):
        zeros = slot_column(slot, "gradient_norm")
        out = edit(out, "steps", zeros, lambda old: [None if value is None else 0.0 for value in old])
    return out


def germinations_grow_nothing(tables: Tables) -> Tables:
    """More than half of all germinations are logged as executed and leave every slot as it was."""
    steps = tables["steps"]
    mask = unpack_mask(np.frombuffer(b"".join(steps["tree_mask"].to_pylist()), dtype=np.uint8).reshape(len(steps), -1))
    waits = [i for i in rows_where(tables, pc.field("op") == "WAIT") if mask[i, Op.GERMINATE]]
    born = len(rows_where(tables, pc.field("op") == "GERMINATE"))
    chosen = dict.fromkeys(waits[: born + 20])
    slots = mask[:, slot_slice(Op.GERMINATE)].argmax(axis=1)
    out = tables
    for name, value in (("op", "GERMINATE"), ("behaviour_logp", None), ("op_probs", None)):
        out = edit(
            out, "steps", name, lambda old, value=value: [value if i in chosen else v for i, v in enumerate(old)]
        )
    return edit(
        out, "steps", "action_slot", lambda old: [int(slots[i]) if i in chosen else v for i, v in enumerate(old)]
    )


def refusal_without_a_gate(tables: Tables) -> Tables:
    return put(tables, _row(tables, pc.field("refused_by") == "G2"), refused_by=None)


def uncommitted_outcome(tables: Tables) -> Tables:
    """The outcome is that of the network with its uncommitted seeds."""
    values = dict(zip(*(tables["episodes"][name].to_pylist() for name in ("episode_id", "uncommitted_val_accuracy"))))
    out = edit(tables, "episodes", "final_val_accuracy", lambda old: list(values.values()))
    ids = tables["steps"]["episode_id"].to_pylist()
    return edit(
        out,
        "steps",
        "final_val_accuracy",
        lambda old: [None if value is None else values[i] for i, value in zip(ids, old)],
    )


def control_missing_from_the_reward(tables: Tables) -> Tables:
    """The reward is the change of the host's own accuracy: it pays for epochs that pass."""
    accuracy = tables["steps"]["val_accuracy"].to_pylist()
    last = tables["steps"]["is_last"].to_pylist()
    paid = [None if end else 100 * (after - now) for now, after, end in zip(accuracy, [*accuracy[1:], 0.0], last)]
    return edit(tables, "steps", "reward_accuracy_points", lambda old: paid)


def softmax_marginals_though_argmax_ran(tables: Tables) -> Tables:
    """Every row of a greedy rule claims a softmax that could have drawn it, and none of them ever drew another op."""
    greedy = (pc.field("epsilon") == 0) & pc.field("behaviour_logp").is_valid() & ~pc.field("forced")
    rows = [i for i in rows_where(tables, greedy) if tables["steps"]["valid_ops"][i].as_py().bit_count() > 1]
    ops, valid = tables["steps"]["op"].to_pylist(), tables["steps"]["valid_ops"].to_pylist()
    probs = {}
    for row in rows:
        others = [op for op in Op if valid[row] & (1 << op) and op.name != ops[row]]
        probs[row] = [0.2 if op.name == ops[row] else 0.8 / len(others) if op in others else 0.0 for op in Op]
    out = edit(tables, "steps", "op_probs", lambda old: [probs.get(i, v) for i, v in enumerate(old)])
    told = float(np.log(0.15))
    out = edit(out, "steps", "behaviour_logp", lambda old: [told if i in probs else v for i, v in enumerate(old)])
    return edit(out, "steps", "temperature", lambda old: [1.0 if i in probs else v for i, v in enumerate(old)])


def _of_controllers(tables: Tables, *names: str) -> Tables:
    chosen = tables["episodes"].filter(pc.is_in(tables["episodes"]["controller"], pa.array(names)))
    return select_episodes(tables, chosen["episode_id"].to_pylist())


def nobody_ever_acts(tables: Tables) -> Tables:
    return _of_controllers(tables, "never-act")


def nobody_prunes(tables: Tables) -> Tables:
    chosen = tables["episodes"].filter(pc.equal(tables["episodes"]["num_prune"], 0))
    return select_episodes(tables, chosen["episode_id"].to_pylist())


def three_behaviours(tables: Tables) -> Tables:
    return _of_controllers(tables, "random", "baseline", "anti-kasmina")


def rows_written_twice(tables: Tables) -> Tables:
    episode = tables["episodes"]["episode_id"][0].as_py()
    return {**tables, "steps": pa.concat_tables([tables["steps"], select_episodes(tables, [episode])["steps"]])}


def infinite_loss(tables: Tables) -> Tables:
    return put(tables, _row(tables, pc.field("step") == 3), train_loss=float("inf"))


def action_after_the_end(tables: Tables) -> Tables:
    return put(tables, _row(tables, pc.field("is_last")), op="WAIT")


def wait_masked(tables: Tables) -> Tables:
    row = _trunk_row(tables)
    mask = unpack_mask(np.frombuffer(tables["steps"]["tree_mask"][row].as_py(), dtype=np.uint8)[None])
    mask[0, Op.WAIT] = False
    return put(tables, row, tree_mask=pack_mask(mask)[0].tobytes())
