"""A pure-NumPy life of slots for controllers: stages move as leyline says, measurements come from a script."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from esper.leyline.actions import DWELL_EPOCHS, LEVERS, MAX_SLOTS, TEMPO_EPOCHS, Op, is_valid
from esper.leyline.keys import numpy_generator
from esper.leyline.masks import LeverRules, build_mask
from esper.leyline.observations import FEATURE_COLUMNS, slot_column
from esper.leyline.protocols import ActInputs, EpisodeStart
from esper.leyline.specs import CnnHost, DigitsTask, EnvironmentSpec, TinyStoriesTask, TransformerHost
from esper.leyline.stages import COOLDOWN_EPOCHS, Stage, check_transition
from esper.leyline.tree import NUM_UNIFORMS

NAN = float("nan")


def environment(num_slots: int = 3, **options) -> EnvironmentSpec:
    host = CnnHost(channels=(4,) * num_slots, kernels=(3,) * num_slots, pools=(1,) * num_slots)
    fields = {"learning_rate": 0.1, "batch_size": 8, "batches_per_epoch": 2, "horizon": 20, **options}
    return EnvironmentSpec(name="tiny", task=DigitsTask(), host=host, **fields)


def text_environment(num_slots: int = 3, **options) -> EnvironmentSpec:
    host = TransformerHost(layers=num_slots, heads=2, embed=8, slots=num_slots)
    task = TinyStoriesTask(context=8, vocabulary=32, rows=(16, 8, 8))
    fields = {"learning_rate": 0.1, "batch_size": 8, "batches_per_epoch": 2, "horizon": 20, **options}
    return EnvironmentSpec(name="tiny-text", task=task, host=host, **fields)


def episode(env: EnvironmentSpec | None = None, **fields) -> EpisodeStart:
    values = {"replicate": 0, "repetition": 0, "epsilon": 0.0, "temperature": None, **fields}
    return EpisodeStart(environment=env or environment(), **values)


@dataclass
class Script:
    """What is measured, by step or by (slot, blueprint, epochs in stage), and which ops a gate refuses."""

    plateau: Callable[[int], int] = lambda step: step
    improvement: Callable[[int, int, int], float] = lambda slot, blueprint, epochs: 2.0
    removal_cost: Callable[[int, int, int], float] = lambda slot, blueprint, epochs: 1.0
    refuses: Callable[[Op], bool] = lambda op: False


@dataclass
class World:
    """One row of slots."""

    env: EnvironmentSpec
    script: Script = field(default_factory=Script)
    step: int = 0
    last_op: int = -1
    last_executed: float = 1.0

    def __post_init__(self):
        size = MAX_SLOTS
        self.stage = [Stage.DORMANT] * size
        self.epochs = [0] * size
        self.levers = np.full((size, len(LEVERS)), -1)

    def columns(self) -> dict[str, float]:
        out = dict.fromkeys(FEATURE_COLUMNS, NAN)
        slots = self.env.host.num_slots
        out |= {"num_slots": slots, "max_seeds": self.env.seeds_cap, "max_fossils": self.env.fossils_cap}
        out |= {"seed_params": 0.0, "plateau_epochs": self.script.plateau(self.step), "horizon": self.env.horizon}
        out |= {"last_op": self.last_op, "last_executed": self.last_executed}
        for slot in range(slots):
            stage, epochs = self.stage[slot], self.epochs[slot]
            blueprint = int(self.levers[slot, 0])
            out[slot_column(slot, "present")] = 1.0
            out[slot_column(slot, "stage")] = stage
            out[slot_column(slot, "epochs_in_stage")] = epochs
            for lever, name in enumerate(LEVERS):
                out[slot_column(slot, name)] = self.levers[slot, lever]
            if stage is Stage.TRAINING:
                out[slot_column(slot, "seed_improvement")] = self.script.improvement(slot, blueprint, epochs)
            if stage is Stage.HOLDING:
                out[slot_column(slot, "removal_cost")] = self.script.removal_cost(slot, blueprint, epochs)
        return out

    def _to(self, slot: int, stage: Stage) -> None:
        self.stage[slot] = check_transition(self.stage[slot], stage)
        self.epochs[slot] = 0

    def apply(self, row: np.ndarray) -> None:
        op, slot = Op(int(row[0])), int(row[1])
        self.last_executed = float(not self.script.refuses(op))
        if not self.last_executed:
            pass
        elif op is Op.GERMINATE:
            self._to(slot, Stage.GERMINATED)
            if not self.env.ask_at_every_gate:
                self._to(slot, Stage.TRAINING)
            self.levers[slot] = row[2:]
        elif op is Op.ADVANCE:
            following = {
                Stage.GERMINATED: Stage.TRAINING,
                Stage.TRAINING: Stage.BLENDING,
                Stage.BLENDING: Stage.HOLDING,
            }
            dwelt = self.epochs[slot] >= DWELL_EPOCHS[self.levers[slot, 3]]
            assert self.stage[slot] is not Stage.TRAINING or dwelt
            self._to(slot, following[self.stage[slot]])
        elif op is Op.FOSSILIZE:
            self._to(slot, Stage.FOSSILIZED)
        elif op is Op.PRUNE:
            self._to(slot, Stage.PRUNED)
            self.levers[slot] = -1
        self.last_op = int(op)
        self._train_one_epoch()

    def _train_one_epoch(self) -> None:
        self.step += 1
        following = {Stage.PRUNED: Stage.EMBARGOED, Stage.EMBARGOED: Stage.RESETTING, Stage.RESETTING: Stage.DORMANT}
        for slot in range(self.env.host.num_slots):
            self.epochs[slot] += 1
            stage = self.stage[slot]
            if stage in COOLDOWN_EPOCHS and self.epochs[slot] >= COOLDOWN_EPOCHS[stage]:
                self._to(slot, following[stage])
            full = stage is Stage.BLENDING and self.epochs[slot] >= TEMPO_EPOCHS[self.levers[slot, 2]]
            if full and not self.env.ask_at_every_gate:
                self._to(slot, Stage.HOLDING)


def lever_rules(env: EnvironmentSpec, params: int = 1) -> LeverRules:
    return LeverRules.of(env, np.full((MAX_SLOTS, 8), params, dtype=np.int64))


def observe(worlds: Sequence[World], key: object = 0) -> ActInputs:
    """The block of inputs of some worlds at their present step."""
    rows = [world.columns() for world in worlds]
    columns = {name: np.array([row[name] for row in rows], dtype=np.float32) for name in FEATURE_COLUMNS}
    mask = np.concatenate(
        [
            build_mask({name: values[i : i + 1] for name, values in columns.items()}, lever_rules(world.env))
            for i, world in enumerate(worlds)
        ]
    )
    step = np.array([world.step for world in worlds], dtype=np.int64)
    uniforms = numpy_generator("scripted", str(key), int(step[0])).random((len(worlds), NUM_UNIFORMS))
    return ActInputs(columns=columns, step_N=step, mask_NT=mask, uniforms=uniforms)


def run_block(controller, worlds: Sequence[World], starts: Sequence[EpisodeStart], horizon: int = 20, key: object = 0):
    """Run some episodes together; return (actions int8 [T, N, 8], decisions)."""
    carry = controller.start(starts)
    actions, decisions = [], []
    for _ in range(horizon):
        inputs = observe(worlds, key)
        decision = controller.act(inputs, carry)
        assert is_valid(decision.actions_NA, inputs.mask_NT).all()
        carry = decision.carry
        for world, row in zip(worlds, decision.actions_NA):
            world.apply(row)
        actions.append(decision.actions_NA)
        decisions.append(decision)
    return np.stack(actions), decisions


def run_one(controller, script: Script | None = None, start: EpisodeStart | None = None, horizon: int = 20):
    """Run one episode; return its events [(step, op name, slot)] without WAITs, and its action rows [T, 8]."""
    start = start or episode()
    world = World(start.environment, script or Script())
    actions, _ = run_block(controller, [world], [start], horizon)
    rows = actions[:, 0]
    events = [(step, Op(int(row[0])).name, int(row[1])) for step, row in enumerate(rows) if row[0] != Op.WAIT]
    return events, rows
