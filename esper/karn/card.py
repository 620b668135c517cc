"""The card of a sealed version: where it comes from, what is in it, what it is fit for, and how to load it.

Markdown with the front matter that the Hugging Face hub reads, or one HTML page that loads nothing from anywhere.
The same version with the same verdict gives the same card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files as package_files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from esper.karn.card_loading import loading_section
from esper.karn.card_text import brief, code, number, schema_section, table, text
from esper.karn.catalogue import query
from esper.karn.overrides import overrides_of
from esper.karn.split_statistics import OP_SHARES, TIMEOUT_S, split_statistics
from esper.karn.splits_stored import StoredSplit, stored_split
from esper.karn.verdict_text import FIRED, USE_WORDS, override_lines, sorted_checks
from esper.leyline.actions import Op
from esper.leyline.secrets import mask
from esper.leyline.verdict import Use, Verdict

if TYPE_CHECKING:
    from esper.karn.versions import Version

SIZE_CATEGORIES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
LARGEST_CATEGORY = "10M<n<100M"
SKELETON = (
    "**SKELETON DATA: every number in it is made up.** No network was trained. It is for testing pipelines; training, "
    "off-policy evaluation and evaluation refuse it."
)

_ENVIRONMENT_FIELDS = ("task", "host", "optimiser", "learning_rate", "batch_size", "horizon", "schedule", "gates")

_CELLS = """
SELECT environment, role, root, controller, epsilon, episodes, env_seeds, distinct_histories, failed, control_invalid,
    mean_gain_points
FROM cells ORDER BY ALL
"""

_OPS = f"""
SELECT environment, count(*) AS decisions, count(*) FILTER (NOT forced) AS free,
    {", ".join(f"avg((op = '{op.name}')::INT) FILTER (NOT forced) AS share_{op.name.lower()}" for op in Op)}
FROM steps WHERE NOT is_last AND NOT replayed GROUP BY environment ORDER BY environment
"""  # noqa: S608

_HISTORIES = """
SELECT environment, count(*) AS episodes, count(DISTINCT env_seed) AS env_seeds,
    count(DISTINCT (env_seed, history_id)) AS histories, count(*) FILTER (outcome = 'failed') AS failed,
    count(*) FILTER (outcome = 'diverged') AS diverged, count(*) FILTER (outcome = 'rolled_back') AS rolled_back,
    count(*) FILTER (NOT control_valid) AS control_invalid, count(*) FILTER (plan IS NOT NULL) AS without_propensity
FROM episodes GROUP BY environment ORDER BY environment
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Card of {{ ref }}</title>
<style>
{{ css }}
main { overflow-x: auto; } th, td { text-align: left; }
pre { background: var(--wash); padding: 10px 14px; overflow-x: auto; font-size: 12.5px; }
code { font-size: 12.5px; overflow-wrap: anywhere; } blockquote { border-left: 6px solid var(--red); margin: 14px 0;
  padding: 4px 14px; background: #fdf1ec; }
</style>
</head>
<body><main>
{{ body }}
</main></body>
</html>
"""


def card_markdown(version: Version, *, files: Mapping[str, str] | None = None) -> str:
    """Return the card of a version as Markdown with YAML front matter, without any credential.

    Args:
        version: The sealed version.
        files: By table a glob relative to the card, where the version's Parquet files lie beside it (an export).

    Raises:
        IntegrityError: A file of the version is missing or damaged.
    """
    return mask(_front_matter(version, files) + "\n" + _body(version, files))


def card_html(version: Version) -> str:
    """Return the card of a version as one HTML page without remote assets (IntegrityError as above)."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    # `js-default` escapes HTML and refuses script addresses.
    body = MarkdownIt("js-default", {"linkify": False}).render(mask(_body(version, None)))
    css = package_files("esper.karn").joinpath("page.css").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(_PAGE)
    return page.render(ref=version.ref, css=Markup(css), body=Markup(body))  # noqa: S704


def is_skeleton(version: Version) -> bool:
    """Return whether the version's rows are made up (`esper datagen --skeleton`)."""
    return bool(version.manifest.provenance.get("skeleton"))


def _front_matter(version: Version, files: Mapping[str, str] | None) -> str:
    """YAML for the hub; JSON strings are YAML strings."""
    rows = version.manifest.counts.get("decisions", 0) + version.manifest.counts.get("episodes", 0)
    size = next((name for limit, name in SIZE_CATEGORIES if rows < limit), LARGEST_CATEGORY)
    tags = ["esper", "offline-rl", "trajectories", "growing-networks", *(["synthetic"] if is_skeleton(version) else [])]
    lines = [
        f"pretty_name: {json.dumps('Esper ' + version.ref)}",
        "license: other",
        'license_name: "see Host data in the card"',
        "task_categories: [reinforcement-learning]",
        f"tags: {json.dumps(tags)}",
        f"size_categories: [{json.dumps(size)}]",
    ]
    if files:
        lines.append("configs:")
        for name, glob in files.items():
            lines += [f"- config_name: {json.dumps(name)}", f"  data_files: {json.dumps(glob)}"]
            lines += ["  default: true"] if name == "steps" else []
    return "\n".join(["---", *lines, "---", ""])


def _body(version: Version, files: Mapping[str, str] | None) -> str:
    manifest = version.manifest
    verdict = version.verdict()
    split = stored_split(version)
    counts = query(version, _HISTORIES, timeout_s=TIMEOUT_S).to_pylist()
    parts = [f"# Dataset {code(version.ref)}"]
    if is_skeleton(version):
        parts.append(f"> {SKELETON}")
    held = ", ".join(f"{count:,} {text(what.replace('_', ' '))}" for what, count in manifest.counts.items())
    parts += [
        "Trajectories of neural networks that grow while they train: a controller acts once per host epoch, and every "
        f"episode carries its own control, the host that never grew. It holds {held}.",
        "## Provenance",
        *_provenance(version),
        "## Host data",
        *_host_data(manifest.provenance),
        "## Coverage",
        *_coverage(version, counts),
        "## Verdict",
        *_verdict(version, verdict),
        "## Splits",
        *_splits(version, split),
        "## How to load it",
        *loading_section(version.name, version.number, files),
        "## Known limits",
        "\n".join(f"- {line}" for line in _limits(version, verdict, counts)),
        "## Schema",
        f"Schema version {manifest.schema_version}. Null is what was not measured; accuracies are fractions, gains and "
        "probes are points (hundredths). A column without a unit is a name, an index or a flag.",
        *schema_section(),
    ]
    return "\n\n".join(parts) + "\n"


def _provenance(version: Version) -> list[str]:
    manifest = version.manifest
    provenance = manifest.provenance
    matrix: Any = provenance.get("matrix")
    name = matrix.get("name") if isinstance(matrix, dict) else None
    machines: Any = provenance.get("machines") or provenance.get("machine")
    facts = [
        ("digest", code(manifest.digest)),
        ("sealed", text(manifest.created_at)),
        ("matrix", f"{text(name)}, {code(manifest.matrix_id)}" if name else code(manifest.matrix_id)),
        ("code commits", ", ".join(code(commit) for commit in manifest.code_commits) or "none recorded"),
        ("packages", text(brief(provenance.get("packages", "not recorded")))),
        ("machine", text(brief(machines or "not recorded"))),
        ("numerics", text(brief(provenance.get("numerics", "not recorded")))),
        ("files", f"{len(manifest.files)}, {sum(entry.size for entry in manifest.files):,} bytes"),
    ]
    parts = [table(("", ""), facts)]
    environments: Any = provenance.get("environments")
    rewards: Any = provenance.get("rewards")
    if isinstance(environments, dict) and environments:
        rows = [
            [code(key), *(text(brief(spec.get(field, ""))) for field in _ENVIRONMENT_FIELDS)]
            for key, spec in environments.items()
            if isinstance(spec, dict)
        ]
        parts += ["Environments:", table(("environment", *_ENVIRONMENT_FIELDS), rows)]
    if isinstance(rewards, dict) and rewards:
        rows = [[code(key), text(brief(spec))] for key, spec in rewards.items()]
        parts += ["Rewards (functions of stored columns, no part of the rows):", table(("environment", "reward"), rows)]
    parts.append(
        f"The whole specifications are in {code(f'versions/{version.number}.json')} and, for every episode, in the "
        "columns `environment_spec` and `controller_spec`."
    )
    return parts


def _host_data(provenance: Mapping[str, Any]) -> list[str]:
    found = provenance.get("host_data")
    rows = [
        [text(item.get(key, "")) for key in ("name", "source", "licence", "changes")]
        for item in (found if isinstance(found, list) else [])
        if isinstance(item, dict)
    ]
    if not rows:
        return ["Whose data the hosts were trained on is not recorded."]
    return [
        "The hosts were trained on these data; the rows hold losses, accuracies and actions, none of them.",
        table(("data", "source", "licence", "changes"), rows),
    ]


def _coverage(version: Version, counts: list[dict[str, Any]]) -> list[str]:
    cells = query(version, _CELLS, timeout_s=TIMEOUT_S).to_pylist()
    ops = query(version, _OPS, timeout_s=TIMEOUT_S).to_pylist()
    cell_rows = [[text(v) if isinstance(v, str) else number(v) for v in row.values()] for row in cells]
    op_rows = [[text(row["environment"]), *(number(v) for v in list(row.values())[1:])] for row in ops]
    named = ("environment", "episodes", "env_seeds", "histories")
    total_rows = [[text(row["environment"]), *(number(row[name]) for name in named[1:])] for row in counts]
    return [
        "Distinct histories (episodes of one environment seed with equal actions are one):",
        table(("environment", "episodes", "env_seeds", "distinct histories"), total_rows),
        "Shares of each op among the decisions that were not forced:",
        table(("environment", "decisions", "not forced", *(op.name for op in Op)), op_rows),
        "Cells, with the mean gain over the control on validation, in points:",
        table([text(name.replace("_", " ")) for name in cells[0]] if cells else ("cell",), cell_rows),
    ]


def _verdict(version: Version, verdict: Verdict | None) -> list[str]:
    told = [f"- {text(line)}" for line in override_lines(overrides_of(version))]
    overrides = ["Used against its verdict or without one:", "\n".join(told)] if told else []
    if verdict is None:
        return [f"Never checked. {code(f'esper health {version.ref}')} checks it.", *overrides]
    parts = [
        f"Checked {text(verdict.checked_at)}.",
        table(("use", "verdict"), [[USE_WORDS[use], f"**{verdict.level(use).value}**"] for use in Use]),
    ]
    fired = [check for check in sorted_checks(verdict) if check.level in FIRED]
    if fired:
        rows = [
            [check.level.value, text(check.environment), text(check.name), text(check.message), text(check.remedy)]
            for check in fired
        ]
        parts.append(table(("level", "environment", "check", "finding", "what to do"), rows))
    return parts + overrides


def _splits(version: Version, split: StoredSplit) -> list[str]:
    rows = []
    for row in split_statistics(version, split).to_pylist():
        shares = [number(row[name]) for name in OP_SHARES]
        sizes = [number(row[name]) for name in ("episodes", "decisions", "env_seeds", "return_mean", "return_sd")]
        rows.append([row["split"], text(row["environment"]), *sizes, *shares])
    names = ("split", "environment", "episodes", "decisions", "env_seeds", "return mean", "return sd")
    return [
        f"Stored split {code(split.name)} by environment seed: {text(split.spec.show())} (training, validation, test). "
        "An environment seed is in one split only, in every environment that shares it. `esper evaluate` runs on "
        "environment seeds that no dataset holds. Shares of ops are of decisions that were not forced.",
        table((*names, *(op.name for op in Op)), rows),
    ]


def _limits(version: Version, verdict: Verdict | None, counts: list[dict[str, Any]]) -> list[str]:
    total = {key: sum(row[key] for row in counts) for key in counts[0] if key != "environment"} if counts else {}
    lines = ["The data are made up (skeleton): no number in them means anything."] if is_skeleton(version) else []
    if verdict is None:
        lines.append("Its health was never checked.")
    told = {
        "failed": "failed; their rows end where they did",
        "diverged": "diverged: their accuracy is that of chance",
        "rolled_back": "were rolled back on the way and went on at a lower learning rate",
        "control_invalid": "have no valid control (the host broke without any seed): their gain compares with nothing",
        "without_propensity": "carry out plans and have no propensity: no importance-based estimate can use them",
    }
    lines += [
        f"{total[key]:,} of {total['episodes']:,} episodes {words}." for key, words in told.items() if total.get(key)
    ]
    lines += [
        "Episodes of one environment seed share rows and are not independent: intervals go by environment seed.",
        "Costs are measured on the machine above and are no part of the digest.",
        "Nothing is known about other environments, horizons or action levers than those above.",
    ]
    return lines
