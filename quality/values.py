"""Coverage of every value of every choice: ops, slots, blueprints and levers where they could have been chosen.

A slot counts among the unforced decisions in which it was valid under its op, a lever value among the GERMINATEs (where
alone it is read). What was never valid is not held against the data. Env_seeds are counted beside rows, because the
rows of one env_seed share their host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from esper.leyline.actions import (
    BLENDS,
    DWELL_EPOCHS,
    ISOLATIONS,
    LEVERS,
    SEED_LR_FACTORS,
    TEMPO_EPOCHS,
    Op,
)
from esper.leyline.specs import EnvironmentSpec
from quality.coverage import decisions, environment_specs, possible_ops
from quality.measures import WHOLE, Measure, rows

_LEVER_NAMES: dict[str, tuple[str, ...]] = {
    "blend": tuple(blend.value for blend in BLENDS),
    "tempo": tuple(f"{epochs} epochs" for epochs in TEMPO_EPOCHS),
    "dwell": tuple(f"{epochs} epochs" for epochs in DWELL_EPOCHS),
    "isolation": tuple(isolation.value for isolation in ISOLATIONS),
    "seed_lr": tuple(f"{factor:g}x" for factor in SEED_LR_FACTORS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCount:
    """How often one value of one choice was taken.

    Attributes:
        environment: The environment.
        head: `op`, `slot of GERMINATE` and so on, or a lever's name.
        value: The value in words.
        valid: Unforced decisions in which it could have been taken; of a lever, the GERMINATEs.
        taken: Those that took it.
        env_seeds: Distinct env_seeds among those that took it.
    """

    environment: str
    head: str
    value: str
    valid: int
    taken: int
    env_seeds: int


def value_counts(connection: duckdb.DuckDBPyConnection) -> list[ValueCount]:
    """Return one entry for every value that an environment offers; the working tables must be there."""
    out = []
    for name, spec in sorted(environment_specs(connection).items()):
        here = decisions(connection).filter(f"environment = '{name}'")
        out += _ops(here, name, spec) + _slots(here, name, spec) + _levers(here, name, spec)
    return out


def _counted(relation: duckdb.DuckDBPyRelation, what: str) -> dict[int, tuple[int, int]]:
    """Return by code how many rows and how many distinct env_seeds."""
    found = rows(relation.aggregate(f"{what} AS code, count(*) AS n, count(DISTINCT env_seed) AS env_seeds", what))
    return {row["code"]: (row["n"], row["env_seeds"]) for row in found}


def _ops(here: duckdb.DuckDBPyRelation, name: str, spec: EnvironmentSpec) -> list[ValueCount]:
    valid = rows(here.aggregate(", ".join(f"count(*) FILTER (valid_ops & {1 << op} > 0) AS {op.name}" for op in Op)))[0]
    taken = rows(here.aggregate("op, count(*) AS n, count(DISTINCT env_seed) AS env_seeds", "op"))
    by_op = {row["op"]: (row["n"], row["env_seeds"]) for row in taken}
    return [_count(name, "op", op.name, valid[op.name], by_op.get(op.name)) for op in sorted(possible_ops(spec)) if op]


def _slots(here: duckdb.DuckDBPyRelation, name: str, spec: EnvironmentSpec) -> list[ValueCount]:
    out = []
    for op in sorted(possible_ops(spec) - {Op.WAIT}):
        sums = [
            f"count(*) FILTER (valid_slots[{op + 1}] & {1 << slot} > 0) AS s{slot}"
            for slot in range(spec.host.num_slots)
        ]
        read = here.filter(f"op = '{op.name}'")
        valid, taken = rows(here.aggregate(", ".join(sums)))[0], _counted(read, "action_slot")
        out += [
            _count(name, f"slot of {op.name}", str(slot), valid[f"s{slot}"], taken.get(slot))
            for slot, enabled in enumerate(spec.enabled_slots)
            if enabled
        ]
    return out


def _levers(here: duckdb.DuckDBPyRelation, name: str, spec: EnvironmentSpec) -> list[ValueCount]:
    if Op.GERMINATE not in possible_ops(spec):
        return []
    born = here.filter("op = 'GERMINATE'")
    num = rows(born.aggregate("count(*) AS n"))[0]["n"]
    names = {"blueprint": spec.blueprints, **_LEVER_NAMES}
    out = []
    for lever, offered in zip(LEVERS, spec.lever_masks()):
        taken = _counted(born, f"action_{lever}")
        out += [
            _count(name, lever, names[lever][code], num, taken.get(code))
            for code, is_offered in enumerate(offered)
            if is_offered
        ]
    return out


def _count(environment: str, head: str, value: str, valid: int, found: tuple[int, int] | None) -> ValueCount:
    taken, env_seeds = found or (0, 0)
    return ValueCount(environment=environment, head=head, value=value, valid=valid, taken=taken, env_seeds=env_seeds)


def _values(counts: Sequence[ValueCount], names: Sequence[str]) -> list[Measure]:
    out = []
    for name in (WHOLE, *names):
        of = [count for count in counts if name in (WHOLE, count.environment)]
        pooled: dict[tuple[str, str], int] = {}
        for count in (count for count in of if count.valid):
            pooled[count.head, count.value] = pooled.get((count.head, count.value), 0) + count.env_seeds
        never = [key for key, number in pooled.items() if number == 0]
        told = ", ".join(f"{head} {value}" for head, value in never[:6]) + (", ..." if len(never) > 6 else "")
        message = f"never taken: {told}" if never else f"each of {len(pooled)} values that were valid was taken"
        value = 1 - len(never) / len(pooled) if pooled else None
        out.append(Measure(check="value_coverage", environment=name, value=value, message=message))
        least = min(pooled.values(), default=None)
        rare = [key for key, number in pooled.items() if number == least]
        told = ", ".join(f"{head} {value}" for head, value in rare[:6]) + (", ..." if len(rare) > 6 else "")
        message = f"fewest env_seeds: {told}" if rare else "no environment offers a choice"
        value = None if least is None else float(least)
        out.append(Measure(check="value_env_seeds", environment=name, value=value, message=message))
    return out


def _pairs(connection: duckdb.DuckDBPyConnection, counts: Sequence[ValueCount], names: Sequence[str]) -> list[Measure]:
    slots = {(c.environment, c.head, c.value): c.taken for c in counts if c.head.startswith("slot of ")}
    found = rows(
        decisions(connection)
        .filter("op = 'GERMINATE'")
        .aggregate("environment, action_blueprint AS blueprint, action_tempo AS tempo")
    )
    seen = {(row["environment"], row["blueprint"], row["tempo"]) for row in found}
    specs = environment_specs(connection)
    offered = {
        (name, blueprint, tempo)
        for name, spec in specs.items()
        if Op.GERMINATE in possible_ops(spec)
        for blueprint, has_blueprint in enumerate(spec.lever_masks()[0])
        for tempo, has_tempo in enumerate(spec.lever_masks()[2])
        if has_blueprint and has_tempo
    }
    out = []
    for name in (WHOLE, *names):
        of = [taken for (environment, _, _), taken in slots.items() if name in (WHOLE, environment)]
        out.append(_pair_share("slot_op_pairs", name, sum(taken > 0 for taken in of), len(of), "slot and op"))
        pairs = {pair for pair in offered if name in (WHOLE, pair[0])}
        out.append(_pair_share("blueprint_tempo_pairs", name, len(pairs & seen), len(pairs), "blueprint and tempo"))
    return out


def _pair_share(check: str, name: str, taken: int, offered: int, what: str) -> Measure:
    value = taken / offered if offered else None
    message = f"{taken} of {offered} pairs of {what} on offer were taken"
    return Measure(check=check, environment=name, value=value, message=message)


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return the coverage of values and of pairs, of the whole dataset and of every environment."""
    counts = value_counts(connection)
    return [*_values(counts, names), *_pairs(connection, counts, names)]
