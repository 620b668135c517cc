"""Random states of slots that the lifecycle allows, as feature columns."""

import numpy as np

from esper.leyline.actions import MAX_SLOTS, Bools
from esper.leyline.masks import LeverRules, build_mask
from esper.leyline.observations import slot_column
from esper.leyline.stages import OCCUPIED_STAGES, Stage

LEVER_SIZES = (8, 5, 4, 4, 2, 3)


def random_columns(generator: np.random.Generator, num: int) -> dict[str, np.ndarray]:
    """Rows of 1 to 6 slots in random stages, with random caps and budgets."""
    out: dict[str, list[float]] = {}
    for _ in range(num):
        num_slots = int(generator.integers(1, MAX_SLOTS + 1))
        row: dict[str, float] = {"num_slots": num_slots, "seed_params": float(generator.integers(0, 500))}
        for slot in range(MAX_SLOTS):
            there = slot < num_slots
            stage = Stage(int(generator.choice([int(stage) for stage in Stage]))) if there else None
            seeded = stage in OCCUPIED_STAGES
            row[slot_column(slot, "present")] = float(there)
            row[slot_column(slot, "stage")] = np.nan if stage is None else int(stage)
            row[slot_column(slot, "epochs_in_stage")] = float(generator.integers(0, 7)) if there else np.nan
            row[slot_column(slot, "dwell")] = float(generator.integers(0, 4)) if seeded else -1.0
            row[slot_column(slot, "tempo")] = float(generator.integers(0, 4)) if seeded else -1.0
        row["max_seeds"] = float(generator.integers(0, num_slots + 1))
        row["max_fossils"] = float(generator.integers(0, num_slots + 1))
        row["param_budget"] = np.nan if generator.random() < 0.5 else float(generator.integers(1, 1000))
        for name, value in row.items():
            out.setdefault(name, []).append(value)
    return {name: np.array(values, dtype=np.float32) for name, values in out.items()}


def random_rules(generator: np.random.Generator) -> LeverRules:
    """Random sizes of blueprints and gates, a non-empty choice of every lever, random slots, G1 and G3 asked or not."""
    masks = []
    for size in LEVER_SIZES:
        mask = generator.random(size) < 0.6
        mask[generator.integers(size)] = True
        masks.append(mask)
    return LeverRules(
        blueprint_params_SB=generator.integers(1, 800, (MAX_SLOTS, 8)),
        lever_masks=tuple(masks),
        enabled_slots=generator.random(MAX_SLOTS) < 0.8,
        ask_at_every_gate=bool(generator.random() < 0.5),
        gate_params_S=generator.integers(0, 100, MAX_SLOTS),
    )


def random_masks(seed: int, num: int = 4) -> Bools:
    """Masks of random states."""
    generator = np.random.default_rng(seed)
    return build_mask(random_columns(generator, num), random_rules(generator))
