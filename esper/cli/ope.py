"""`esper ope`: what policies would be worth, from the episodes of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from esper.cli.launch import default_workers, launch
from esper.cli.output import note, note_verdict, rich_table

if TYPE_CHECKING:
    from esper.leyline.ope import OpeResult, PolicyEstimate, RankingQuality, ValueEstimate

Flag = Annotated[bool, Parameter(negative="")]


def ope(
    dataset: str,
    /,
    *,
    policy: Annotated[list[str], Parameter(consume_multiple=True)],
    sampled: Flag = False,
    behaviours: int = 11,
    branch_states: int = 0,
    branch_actions: int = 4,
    iql_critic: Flag = False,
    recipe: str = "fqe",
    seed: int = 0,
    override_health: str | None = None,
    store: str | None = None,
    workers: int | None = None,
    no_prefect: Flag = False,
    run_name: str | None = None,
) -> None:
    """Estimate the return of checkpoints from logged episodes alone, and say how far to trust that.

    Fitted Q evaluation with intervals over environment seeds, weighted doubly robust beside it, the effective sample
    size by horizon, the behaviours of the data valued in the same way, and how the critics rank actions that were
    tried from the same states. Writes ope.json into the run's folder.

    Args:
        dataset: NAME or NAME@n.
        policy: Checkpoint folders.
        sampled: Value the policies' distributions instead of their most probable choices.
        behaviours: Behaviours of the data to value too, at most (0: none).
        branch_states: Try actions live from so many logged states, the policy going on (costs episodes; default none).
        branch_actions: Actions tried in each of them.
        iql_critic: Fit implicit Q-learning on the data and hold its advantages against the measured ones too.
        recipe: Name of a recipe of fitted values, or a TOML file.
        seed: Seed of resamples and networks.
        override_health: Reason to go ahead without a verdict or against it.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        workers: Worker processes (default: one per core); 0 runs in this process.
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time).
    """
    from esper.karn.store import open_store
    from flows.ope import OpeRequest, run_ope

    request = OpeRequest.parse(
        {
            "dataset": dataset,
            "policies": policy,
            "sampled": sampled,
            "behaviours": behaviours,
            "branch_states": branch_states,
            "branch_actions": branch_actions,
            "iql_critic": iql_critic,
            "recipe": recipe,
            "seed": seed,
            "override_health": override_health,
            "store": store,
            "workers": default_workers() if workers is None else workers,
            "run_name": run_name,
        },
        "esper ope",
    )
    result, path = launch("ope", request, run_ope, prefect=not no_prefect)
    print_ope(result)
    note_verdict(open_store(store).resolve(dataset))
    print(f"result  {path}")


def print_ope(result: OpeResult) -> None:
    """Print the estimates, then what speaks for and against them."""
    from esper.leyline.ope import ALL

    environments = list(dict.fromkeys(item.environment for item in result.policies))
    shown = [name for name in environments if name != ALL] if len(environments) == 2 else environments
    scores = result.scores()
    ordered = sorted(result.policies, key=lambda item: -scores[item.policy])
    rows = [_estimate_row(item) for item in ordered if item.environment in shown]
    headings = ["policy", "environment", "FQE", "95 %", "WDR", "95 %", "usable decisions", "episodes weighed", "data"]
    print(rich_table(headings, rows, f"{result.dataset}@{result.version}: estimated returns, highest first"), end="")
    _print_effective(result, ALL)
    if result.behaviours:
        main = ALL if len(environments) > 2 else shown[0]
        checks = [check for check in result.behaviours if check.environment == main]
        lines = [
            [c.behaviour, c.epsilon, c.measured_return, c.fqe.mean, _ends(c.fqe), "yes" if c.covered else "no"]
            for c in checks
        ]
        names = ["behaviour", "epsilon", "measured return", "FQE", "95 %", "covered"]
        print(rich_table(names, lines, f"calibration on {main}"), end="")
    total, left_out = len(result.behaviours), result.num_behaviours_left_out
    if total:
        print(f"covered: {result.num_covered} of {total} (behaviour, environment); {left_out} behaviours left out")
        for item in result.behaviour_ranking:
            print(f"ranking of {len(item.policies)} behaviours on {item.environment}: {_quality(item)}")
    _print_branches(result)
    _print_ranking(result)


def _estimate_row(item: PolicyEstimate) -> list[object]:
    # without an episode that carries weight it is FQE again, with an interval that means nothing
    known = item.wdr is not None and item.effective_episodes and item.effective_episodes[0] >= 1
    wdr = [item.wdr.mean, _ends(item.wdr)] if item.wdr is not None and known else [None, ""]
    weighed = f"{item.num_episodes} ({item.num_without_propensity} left out)"
    fitted = [item.fqe.mean, _ends(item.fqe)]
    return [item.policy, item.environment, *fitted, *wdr, item.usable_decisions, weighed, item.data_return]


def _ends(value: ValueEstimate) -> str:
    return f"{value.low:.3g} … {value.high:.3g}"


def _print_effective(result: OpeResult, environment: str) -> None:
    for item in result.policies:
        curve = item.effective_episodes
        if item.environment == environment and curve:
            at = sorted({0, 1, 2, 4, 9, len(curve) - 1} & set(range(len(curve))))
            told = ", ".join(f"{curve[t]:.1f} after {t + 1}" for t in at)
            print(f"effective episodes of {item.policy}: {told} decisions")


def _print_branches(result: OpeResult) -> None:
    if not result.branches:
        note("branch oracle: the data hold no two actions tried from one state; --branch-states N tries some")
        return
    rows = []
    for item in result.branches:
        interval = "" if item.spearman_low is None else f"{item.spearman_low:.2f} … {item.spearman_high:.2f}"
        best = f"{item.top_share:.2f} (chance {item.chance_share:.2f})"
        size = f"{item.num_states} × {item.num_actions / item.num_states:.1f}"
        rows.append([item.policy, item.critic, item.then, size, item.spearman, interval, item.kendall, best])
    names = ["policy", "critic", "then", "states × actions", "Spearman", "95 %", "Kendall", "best action found"]
    print(rich_table(names, rows, "branch oracle: measured advantages"), end="")


def _print_ranking(result: OpeResult) -> None:
    for item in result.ranking:
        count = len(item.policies)
        print(f"ranking of {count} policies that met live episodes on {item.environment}: {_quality(item)}")
    if not result.ranking:
        note("ranking: fewer than three policies have both an estimate and live evaluation episodes in this dataset")


def _quality(item: RankingQuality) -> str:
    rank = "undefined" if item.spearman is None else f"{item.spearman:.2f}"
    regrets = [f"regret@{k} {value:.3g}" for k, value in item.regret_at.items()]
    sharpe = [f"Sharpe@{k} {value:.3g}" for k, value in item.sharpe_at.items() if value is not None]
    return ", ".join([f"Spearman {rank}", *regrets, *sharpe]) + f" (range of returns {item.live_range:.3g})"
