"""What a remedy is planned from: how often each op was valid and taken, which states and clusters hold one op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper.karn.store import Version
from esper.leyline.actions import LEVER_SIZES, MAX_SLOTS, NUM_OPS, Op
from esper.leyline.controller_specs import ELEVEN_BEHAVIOURS
from esper.leyline.errors import EsperError, HealthError
from esper.leyline.identity import EpisodeIdentity, env_seed
from esper.leyline.library import load_environment
from esper.leyline.matrix import BranchActor, PlannedEpisode
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.plans import plan_actor
from esper.leyline.schema import ACTION_FIELDS
from esper.leyline.specs import EnvironmentSpec
from quality.clusters import cluster_states, encode
from quality.measures import rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ArmKey = tuple[str, str, float]
"""An environment, a controller's name and an epsilon."""

_DECISIONS = """
SELECT s.*, e.controller, e.branch_parent IS NULL AND e.root = 'host' AS leavable
FROM steps AS s JOIN episodes AS e USING (episode_id)
WHERE e.role = 'data' AND e.outcome <> 'failed'
    AND NOT s.is_last AND NOT s.forced AND NOT s.replayed AND s.op IS NOT NULL
"""

_EPISODES = """
SELECT *, controller_spec ->> '$.pool' AS pool FROM episodes WHERE role = 'data' AND outcome <> 'failed'
"""

MAX_CLUSTERED = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionCounts:
    """How often actions were taken in one environment; S slots.

    Attributes:
        slot_ops: By slot and op, int64 [6, 5].
        levers: By lever, one count per value.
        slot_blueprints: GERMINATEs by slot and blueprint, int64 [6, 8].
        blueprint_tempos: GERMINATEs by blueprint and tempo, int64 [8, 4].
    """

    slot_ops: Ints
    levers: tuple[Ints, ...]
    slot_blueprints: Ints
    blueprint_tempos: Ints

    def copy(self) -> ActionCounts:
        """Return counts that can be added to without changing these."""
        return ActionCounts(
            slot_ops=self.slot_ops.copy(),
            levers=tuple(counts.copy() for counts in self.levers),
            slot_blueprints=self.slot_blueprints.copy(),
            blueprint_tempos=self.blueprint_tempos.copy(),
        )

    @classmethod
    def empty(cls) -> ActionCounts:
        """Return counts of nothing."""
        return cls(
            slot_ops=np.zeros((MAX_SLOTS, NUM_OPS), dtype=np.int64),
            levers=tuple(np.zeros(size, dtype=np.int64) for size in LEVER_SIZES),
            slot_blueprints=np.zeros((MAX_SLOTS, LEVER_SIZES[0]), dtype=np.int64),
            blueprint_tempos=np.zeros((LEVER_SIZES[0], LEVER_SIZES[2]), dtype=np.int64),
        )

    def add(self, action: Sequence[int], count: int = 1) -> None:
        """Count a canonical row that is not a WAIT."""
        op, slot, *levers = action
        self.slot_ops[slot, op] += count
        if op == Op.GERMINATE:
            for counts, value in zip(self.levers, levers, strict=True):
                counts[value] += count
            self.slot_blueprints[slot, levers[0]] += count
            self.blueprint_tempos[levers[0], levers[2]] += count


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What one episode of a controller at an epsilon adds on average: unforced decisions, by op, and states.

    Attributes:
        valid: How often each op was valid, [5].
        taken: How often it was taken, [5].
        uniform: How often the uniform policy would have taken it in the same states, [5].
        states: Distinct states.
        episodes: Episodes that this is the mean of.
    """

    valid: Floats
    taken: Floats
    uniform: Floats
    states: float
    episodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One environment of the dataset that `esper datagen` can extend.

    Attributes:
        spec: Its specification, as the library has it.
        reward: Name of its reward.
        replicates: The replicates in the dataset, ascending.
    """

    spec: EnvironmentSpec
    reward: str
    replicates: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """One row per distinct state in which something could be compared, sorted by state_id; N states.

    Attributes:
        environment: Names, [N].
        parent: Index into `parents` of one episode that passed through it, int64 [N].
        step: When it did, int64 [N].
        taken_NO: Which ops were taken there, bool [N, 5].
        valid_NO: Which ops are valid there, bool [N, 5].
        actions: Distinct actions taken there, int64 [N].
        mask: Packed tree masks, one bytes object per state.
        cluster: Cluster of the state, int64 [N]; -1 where it was not clustered.
    """

    environment: NDArray[np.object_]
    parent: Ints
    step: Ints
    taken_NO: NDArray[np.bool_]
    valid_NO: NDArray[np.bool_]
    actions: Ints
    mask: list[bytes]
    cluster: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """An episode that branchings may leave: its identity can be rebuilt from names."""

    environment: str
    replicate: int
    actor: BranchActor


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that a remedy is planned from.

    Attributes:
        sites: Environments that can be extended, by name.
        left_out: Environments that cannot, with the reason.
        known: Ids of the episodes in the dataset.
        arms: Means per episode.
        parents: Episodes that can be left.
        states: The states they passed through.
        cluster_ops: Which ops each cluster holds, bool [C, 5].
        cluster_rows: Decisions per cluster, int64 [C].
        counts: How often actions were taken, by environment.
        plans: The explorers' plans in the dataset.
        histories: By environment, its episodes that are no branches, and how many of them differ within an env_seed.
        twins: By environment, behaviours whose greediest episodes have the histories of another one's, and the epsilon.
    """

    sites: Mapping[str, Site]
    left_out: Mapping[str, str]
    known: frozenset[str]
    arms: Mapping[ArmKey, Arm]
    parents: tuple[Parent, ...]
    states: States
    cluster_ops: NDArray[np.bool_]
    cluster_rows: Ints
    counts: Mapping[str, ActionCounts]
    plans: frozenset[int]
    histories: Mapping[str, tuple[int, int]]
    twins: Mapping[str, tuple[tuple[str, float], ...]]


def gather(connection: duckdb.DuckDBPyConnection, version: Version) -> Findings:
    """Return the findings on a sealed version.

    Raises:
        HealthError: No environment of the version can be extended.
    """
    sites, left_out = _sites(connection, version)
    if not sites:
        told = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise HealthError(f"{version.ref} cannot be extended\n  {told or 'it holds no episode of role data'}")
    parents, ids = _parents(connection, sites)
    states, cluster_ops, cluster_rows = _states(connection, ids)
    plans = connection.sql(_EPISODES).filter("branch_parent IS NULL AND plan IS NOT NULL").project("plan").distinct()
    known = connection.sql("SELECT episode_id FROM episodes").to_arrow_table()["episode_id"].to_pylist()
    return Findings(
        sites=sites,
        left_out=left_out,
        known=frozenset(known),
        arms=_arms(connection),
        parents=tuple(parents),
        states=states,
        cluster_ops=cluster_ops,
        cluster_rows=cluster_rows,
        counts=_action_counts(connection),
        plans=frozenset(row["plan"] for row in rows(plans)),
        histories=_histories(connection),
        twins=_twins(connection),
    )


def _sites(connection: duckdb.DuckDBPyConnection, version: Version) -> tuple[dict[str, Site], dict[str, str]]:
    """The environments whose library entry is the one that the dataset was made in, and why others are not."""
    found = connection.sql(_EPISODES).aggregate(
        "environment, max(environment_id) AS id, count(DISTINCT environment_id) AS ids, "
        "list_sort(list(DISTINCT replicate)) AS replicates",
        "environment",
    )
    rewards = version.manifest.provenance.get("rewards")
    sites, left_out = {}, {}
    for row in rows(found.order("environment")):
        name = row["environment"]
        reward = rewards.get(name) if isinstance(rewards, dict) else None
        try:
            spec = load_environment(name)
        except EsperError as error:
            left_out[name] = str(error).splitlines()[0]
            continue
        if row["ids"] != 1 or spec.spec_id != row["id"]:
            left_out[name] = "the library's environment of this name is another one than the dataset's"
        else:
            known = reward.get("name") if isinstance(reward, dict) else None
            sites[name] = Site(spec=spec, reward=str(known or name), replicates=tuple(row["replicates"]))
    return sites, left_out


def _arms(connection: duckdb.DuckDBPyConnection) -> dict[ArmKey, Arm]:
    sums = []
    for op in Op:
        valid = f"valid_ops & {1 << op} > 0"
        sums.append(f"count(*) FILTER ({valid}) AS valid_{int(op)}")
        sums.append(f"count(*) FILTER (op = '{op.name}') AS taken_{int(op)}")
        sums.append(f"sum(CASE WHEN {valid} THEN 1.0 / bit_count(valid_ops) ELSE 0 END) AS uniform_{int(op)}")
    sums += ["count(DISTINCT state_id) AS states", "count(DISTINCT episode_id) AS episodes"]
    key = "environment, controller, epsilon"
    found = connection.sql(_DECISIONS).aggregate(f"{key}, {', '.join(sums)}", key).order(key)
    arms = {}
    for row in rows(found):
        count = row["episodes"]
        means = {
            kind: np.array([float(row[f"{kind}_{op}"]) for op in range(NUM_OPS)]) / count
            for kind in ("valid", "taken", "uniform")
        }
        arms[row["environment"], row["controller"], row["epsilon"]] = Arm(
            **means, states=row["states"] / count, episodes=count
        )
    return arms


def _parents(connection: duckdb.DuckDBPyConnection, sites: Mapping[str, Site]) -> tuple[list[Parent], list[str]]:
    found = connection.sql(_EPISODES).filter("branch_parent IS NULL AND root = 'host'")
    found = found.order("environment, replicate, episode_id")
    parents, ids = [], []
    for row in rows(found):
        site = sites.get(row["environment"])
        parent = None if site is None else _rebuilt(row, site.spec)
        if parent is not None:
            parents.append(parent)
            ids.append(row["episode_id"])
    return parents, ids


def _rebuilt(row: Mapping[str, object], spec: EnvironmentSpec) -> Parent | None:
    """The parent in names, None where they do not lead to the episode that is stored (learned policies, schedules)."""
    fields = {name: row[name] for name in ("controller", "epsilon", "temperature", "repetition", "pool")}
    try:
        actor = BranchActor.parse(fields, "an episode")
        planned = plan_actor(actor, spec)
    except EsperError:
        return None
    replicate = int(str(row["replicate"]))
    if episode_id_of(planned, spec, replicate) != row["episode_id"]:
        return None
    return Parent(environment=spec.name, replicate=replicate, actor=actor)


def episode_id_of(planned: PlannedEpisode, spec: EnvironmentSpec, replicate: int) -> str:
    """Return the id of an episode in a cohort of the environment."""
    return EpisodeIdentity(
        environment_id=spec.spec_id,
        env_seed=env_seed(spec.task.task_id, replicate),
        root=planned.root,
        controller_id=planned.controller.spec_id,
        epsilon=planned.epsilon,
        temperature=planned.temperature,
        repetition=planned.repetition,
    ).episode_id


def _states(connection: duckdb.DuckDBPyConnection, ids: list[str]) -> tuple[States, NDArray[np.bool_], Ints]:
    action = f"(op, {', '.join(ACTION_FIELDS)})"
    taken = " | ".join(f"(CASE WHEN bool_or(op = '{op.name}') THEN {1 << op} ELSE 0 END)" for op in Op)
    found = connection.sql(_DECISIONS).aggregate(
        f"state_id, min(environment) AS environment, ({taken})::INTEGER AS taken, min(valid_ops)::INTEGER AS valid, "
        f"count(DISTINCT {action}) AS actions, min(step) AS step, min(tree_mask) AS tree_mask, "
        "min(episode_id) FILTER (leavable) AS episode_id",
        "state_id",
    )
    table = found.order("state_id").to_arrow_table()
    clusters, cluster_ops, cluster_rows = _clusters(connection)
    place = {name: index for index, name in enumerate(ids)}
    parents = table["episode_id"].to_pylist()
    bits = 1 << np.arange(NUM_OPS)
    states = States(
        environment=np.array(table["environment"].to_pylist(), dtype=object),
        parent=np.array([place.get(name, -1) for name in parents], dtype=np.int64),
        step=table["step"].to_numpy().astype(np.int64),
        taken_NO=(table["taken"].to_numpy()[:, None] & bits) > 0,
        valid_NO=(table["valid"].to_numpy()[:, None] & bits) > 0,
        actions=table["actions"].to_numpy().astype(np.int64),
        mask=table["tree_mask"].to_pylist(),
        cluster=np.array([clusters.get(name, -1) for name in table["state_id"].to_pylist()], dtype=np.int64),
    )
    return states, cluster_ops, cluster_rows


def _clusters(connection: duckdb.DuckDBPyConnection) -> tuple[dict[str, int], NDArray[np.bool_], Ints]:
    """The cluster of each state in a fixed sample, and per cluster which ops it holds and how many decisions."""
    columns = ", ".join(("state_id", "environment", "step", "op", *FEATURE_COLUMNS))
    drawn = connection.sql(_DECISIONS).project(f"{columns}, md5(concat(episode_id, '/', step)) AS draw")
    table: pa.Table = drawn.order("draw").limit(MAX_CLUSTERED).to_arrow_table()
    if not table.num_rows:
        return {}, np.zeros((0, NUM_OPS), dtype=bool), np.zeros(0, dtype=np.int64)
    labels = cluster_states(encode(table))
    op_N = np.array([Op[name] for name in table["op"].to_pylist()], dtype=np.int64)
    held = np.zeros((int(labels.max()) + 1, NUM_OPS), dtype=bool)
    held[labels, op_N] = True
    found = dict(zip(table["state_id"].to_pylist(), labels.tolist(), strict=True))
    return found, held, np.bincount(labels, minlength=len(held)).astype(np.int64)


def _action_counts(connection: duckdb.DuckDBPyConnection) -> dict[str, ActionCounts]:
    key = f"environment, op, {', '.join(ACTION_FIELDS)}"
    found = connection.sql(_DECISIONS).filter("op <> 'WAIT'").aggregate(f"{key}, count(*) AS n", key)
    counts: dict[str, ActionCounts] = {}
    for row in rows(found):
        action = [int(Op[row["op"]]), *(row[name] for name in ACTION_FIELDS)]
        counts.setdefault(row["environment"], ActionCounts.empty()).add(action, row["n"])
    return counts


def _histories(connection: duckdb.DuckDBPyConnection) -> dict[str, tuple[int, int]]:
    episodes = connection.sql(_EPISODES).filter("branch_parent IS NULL")
    told = "environment, count(*) AS n, count(DISTINCT (env_seed, history_id)) AS distinct_n"
    return {row["environment"]: (row["n"], row["distinct_n"]) for row in rows(episodes.aggregate(told, "environment"))}


def _twins(connection: duckdb.DuckDBPyConnection) -> dict[str, tuple[tuple[str, float], ...]]:
    episodes = connection.sql(_EPISODES).filter("branch_parent IS NULL AND plan IS NULL")
    lowest = episodes.project("*, min(epsilon) OVER (PARTITION BY environment, controller) AS lowest")
    histories = lowest.filter("epsilon = lowest").aggregate(
        "environment, controller, epsilon, list_sort(list((env_seed, history_id))) AS did",
        "environment, controller, epsilon",
    )
    groups: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for row in rows(histories.order("environment, controller")):
        if row["controller"] in ELEVEN_BEHAVIOURS:
            groups.setdefault((row["environment"], str(row["did"])), []).append((row["controller"], row["epsilon"]))
    twins: dict[str, tuple[tuple[str, float], ...]] = {}
    for (environment, _), names in groups.items():
        if len(names) > 1:
            twins[environment] = (*twins.get(environment, ()), *names)
    return twins
