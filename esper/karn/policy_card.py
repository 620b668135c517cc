"""The model card of a policy: a page beside its checkpoint that says what it is, where from, and what it is not for.

Rendered from `policy.json` alone: the same card gives the same bytes. Sections follow Mitchell et al., "Model Cards for
Model Reporting", FAT* 2019.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from esper.leyline.errors import CheckpointError

PAGE = "README.md"
CARD = "policy.json"

ALGORITHMS = {
    "bc": "behaviour cloning: it imitates the actions in the data",
    "rwbc": "return-weighted behaviour cloning: it imitates the data, better episodes more often",
    "iql": "implicit Q-learning: values by expectile regression, then advantage-weighted extraction",
    "cql": "conservative Q-learning: values that distrust actions outside the data",
    "imitate": "the imitation policy of the concept documents: a classifier of a rule's actions",
    "ppo": "PPO from an offline checkpoint, on live episodes",
}
NETWORKS = {
    "tree": "a network over Esper's action tree: op, then slot, then levers, each masked",
    "flat": "a d3rlpy network over a flat list of the actions in the data; the mask is applied when it acts",
    "imitation": "a small classifier; the levers are those of the rule that it imitates",
}


def write_policy_page(folder: Path) -> Path:
    """Write the model card of a checkpoint into its folder, whole or not at all; return its path.

    Raises:
        CheckpointError: There is no checkpoint, or the folder cannot be written.
    """
    path = folder / PAGE
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        temporary = path.with_name(f".{PAGE}.{os.getpid()}.tmp")
        temporary.write_text(policy_page(card), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write the model card of {folder}: {error.strerror}") from None
    return path


def policy_page(card: Mapping[str, Any]) -> str:
    """Return the page of a policy, Markdown.

    Args:
        card: The contents of `policy.json`.
    """
    sections = {
        "What it is": _what(card),
        "Data": _data(card),
        "Recipe": _table("field", _flat(card["recipe"])),
        "Measured in training": _measured(card),
        "Intended use": _use(card),
        "Limits": _limits(card),
        "How to evaluate it": _evaluate(card),
    }
    body = "".join(f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items())
    return f"# Policy `{card['name']}`\n{body}"


def _what(card: Mapping[str, Any]) -> list[str]:
    network = card["network"]
    kind = network.get("kind", "tree")
    algorithm = card["algorithm"]
    lines = [
        f"A controller of seeds in a growing network, trained by {ALGORITHMS.get(algorithm, algorithm)}.",
        f"It is {NETWORKS.get(kind, kind)}.",
        "",
        *_table("network", _flat(network)),
        "",
        f"Identity (SHA-256 of the weights): `{card['weights_sha256']}`  ",
        f"Code {card['code_version']}, engine {card['engine_version']}, training seed {card['training_seed']}. "
        "The same data, recipe, seed and version give the same bytes on a CPU.",
    ]
    if card.get("start_digest"):
        lines.append(f"It began from the weights `{card['start_digest']}`.")
    return lines


def _data(card: Mapping[str, Any]) -> list[str]:
    if card.get("dataset") is None:
        lines = ["Live episodes alone; no dataset."]
    else:
        lines = [f"`{card['dataset']}`, digest `{card['dataset_digest']}`, verdict: {card['verdict'] or 'none'}."]
    if card.get("split"):
        lines += ["", f"Held-out environment seeds: those of its stored split `{card['split']}`."]
    if card.get("unchecked"):
        lines += ["", f"**Trained against the verdict of the data or without one.** Reason: {card['override_reason']}"]
    names = sorted(card["rewards"])
    lines += ["", f"Environments: {', '.join(f'`{name}`' for name in names)}. Rewards:", ""]
    return lines + _table("reward", _flat(card["rewards"]))


def _measured(card: Mapping[str, Any]) -> list[str]:
    metrics = card["metrics"]
    held = {key: value for key, value in metrics.items() if key.startswith("held_out_")}
    lines = ["No environment seed was held out."]
    if held:
        chosen = "; which step's weights to keep was chosen on them" if "chosen_step" in metrics else ""
        if card["algorithm"] == "imitate":
            chosen = "; the loss, which chose the step, is of training seeds set aside for that"
        lines = [f"On held-out environment seeds, from which no gradient came{chosen}:", ""]
        lines += _table("metric", held.items())
    others = {key: value for key, value in metrics.items() if key not in held}
    return [*lines, "", "The rest:", "", *_table("metric", others.items())]


def _use(card: Mapping[str, Any]) -> list[str]:
    names = ", ".join(f"`{name}`" for name in sorted(card["rewards"]))
    return [f"To choose the seeds' life cycle in episodes of {names}, one decision an epoch, under the rewards above."]


def _limits(card: Mapping[str, Any]) -> list[str]:
    lines = [
        "- A loss on held-out data says how well data are explained, not how well the policy acts: judge it by paired "
        "live episodes.",
        "- Nothing is known about other environments, rewards, horizons or action levers than those of its data.",
        "- One training seed: another one can act differently.",
    ]
    kind = card["network"].get("kind", "tree")
    if kind == "flat":
        lines.append("- It can choose no action that its data do not hold.")
    if kind == "imitation":
        lines.append("- At best it is as good as the rule that it imitates.")
    if card["algorithm"] in ("bc", "rwbc"):
        lines.append("- It imitates: it is not expected to exceed the best behaviour in its data.")
    if card["algorithm"] in ("iql", "cql"):
        lines.append("- Its values are estimates from fixed data; where the data hold few actions, they are guesses.")
    return lines


def _evaluate(card: Mapping[str, Any]) -> list[str]:
    name = (card.get("dataset") or "NAME").split("@")[0]
    return [
        "From offline data (an estimate), and live against every control, paired by environment seed:",
        "",
        "```",
        f"esper ope {card.get('dataset') or 'NAME'} --policy FOLDER",
        f"esper evaluate {name} --policy FOLDER",
        "```",
        "",
        "with FOLDER the folder of this page.",
    ]


def _flat(tables: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of everything in nested tables, in order of name."""
    for key in sorted(tables):
        value, name = tables[key], f"{path}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _table(heading: str, rows: Any) -> list[str]:
    """A Markdown table of names and values, by name."""
    lines = [f"| {heading} | value |", "| --- | --- |"]
    return [*lines, *(f"| `{name}` | {_cell(value)} |" for name, value in sorted(rows, key=lambda row: row[0]))]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
