"""A large store of synthetic rows: a small consistent dataset repeated under new ids, column by column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from factories import Tables, concat_tables, synthetic_tables

from esper.karn.store import Version, open_store
from esper.leyline.observations import slot_column

TILES_PER_COMMIT = 10
NOISY = (
    *("gradient_norm", "weight_norm", "val_loss_drop", "train_loss_drop", "seed_improvement", "removal_cost"),
    "improvement_since_stage",
)
_KEYS = ("episode_id", "host_key", "state_id", "final_host_key", "history_id")


def tiled(tables: Tables, tile: int, num_env_seeds: int) -> Tables:
    """Return the tables as other env_seeds: ids, seeds and replicates are new, everything else is the same."""
    out = {}
    for name, table in tables.items():
        changed = table
        for column in (*_KEYS, "env_seed", "replicate"):
            if column not in table.column_names:
                continue
            old = table[column]
            if column in _KEYS:
                new = pc.binary_replace_slice(old, 0, 4, f"{tile:04x}")
            elif column == "replicate":
                new = pc.add(old, pa.scalar(tile * num_env_seeds, pa.int64()))
            else:
                new = _moved(old, tile)
            index = table.schema.get_field_index(column)
            changed = changed.set_column(index, table.schema.field(column), new.cast(old.type))
        out[name] = _noisy(changed, tile) if name == "steps" else changed
    return out


def _noisy(steps: pa.Table, tile: int) -> pa.Table:
    """Return the rows with other values in the features that nothing recomputes, so that no column repeats."""
    generator = np.random.default_rng(tile)
    for column in ("train_loss", *(slot_column(slot, name) for name in NOISY for slot in range(3))):
        noise = pa.array(generator.uniform(0.9, 1.1, steps.num_rows).astype(np.float32))
        field = steps.schema.field(column)
        values = pc.multiply(steps[column].cast(pa.float32()), noise).cast(field.type)
        steps = steps.set_column(steps.schema.get_field_index(column), field, values)
    return steps


def _moved(seeds: pa.ChunkedArray, tile: int) -> pa.ChunkedArray:
    """Return other env_seeds, in [0, 2**63), none of which collide in practice."""
    return pc.bit_wise_xor(seeds, pa.scalar(tile << 40, pa.int64()))


def large_version(root: Path, num_rows: int) -> Version:
    """Return a sealed version of at least `num_rows` rows of `steps` in a new store."""
    rules = ("baseline", "random", "quick-culler", "aggressive", "anti-kasmina", "periodic", "never-act")
    num_env_seeds = 16
    base = synthetic_tables(num_env_seeds=num_env_seeds, horizon=24, behaviours=rules, refusal_rate=0.1)
    dataset = open_store(root).dataset("large")
    tiles = -(-num_rows // base["steps"].num_rows)
    for first in range(0, tiles, TILES_PER_COMMIT):
        part = range(first, min(first + TILES_PER_COMMIT, tiles))
        dataset.commit(concat_tables(*(tiled(base, tile, num_env_seeds) for tile in part)))
    return dataset.seal(matrix_id="large", provenance={})
