"""Faults to plant: each turns a good set of tables into one with a single thing wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from factories import Tables, select_episodes

from esper.leyline.actions import MAX_SLOTS, Op, pack_mask, slot_slice, unpack_mask
from esper.leyline.observations import slot_column
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
