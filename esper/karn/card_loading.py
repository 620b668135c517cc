"""How to load a sealed version, as runnable code: from a store, or from Parquet files that lie beside the card."""

from __future__ import annotations

from collections.abc import Mapping
from string import Template

_GROUPED = "Rows of one `env_seed` share trajectories: split, bootstrap and hold out by `env_seed`, never by episode."

_FROM_STORE = Template("""
With Esper, checked against the manifest and with the types of the schema below:

```python
from esper.karn.store import open_store

version = open_store().resolve("$ref")  # $$ESPER_STORE, else datasets/local
steps = version.table("steps", columns=["episode_id", "step", "op"])  # a pyarrow table
for batch in version.batches("steps", batch_rows=8192):
    print(batch.num_rows)  # larger than memory
```

```shell
esper sql "SELECT * FROM cells" --dataset $ref
esper dataset stats $ref
```

The Parquet files without Esper, exactly those of this version. Of an episode that was attempted twice the last attempt
counts:

```python
import json
import os
from pathlib import Path

folder = Path(os.environ.get("ESPER_STORE", "datasets/local")) / "$name"
manifest = json.loads((folder / "versions" / "$number.json").read_text())
files = {}
for entry in manifest["files"]:
    files.setdefault(entry["table"], []).append(str(folder / entry["path"]))
```

DuckDB:

```python
import duckdb

connection = duckdb.connect()
read = "SELECT * FROM read_parquet({!r}, union_by_name = true, hive_partitioning = true)"
last = "row_number() OVER (PARTITION BY episode_id ORDER BY attempt DESC, commit_id DESC) = 1"
connection.sql(f"CREATE VIEW episodes AS {read.format(files['episodes'])} QUALIFY {last}")
keys = "episode_id, attempt, commit_id"
connection.sql(f"CREATE VIEW steps AS {read.format(files['steps'])} SEMI JOIN episodes USING ({keys})")
print(connection.sql("SELECT op, count(*) FROM steps WHERE NOT is_last GROUP BY op ORDER BY op"))
```

polars:

```python
import polars as pl

options = {"hive_partitioning": True, "missing_columns": "insert"}
attempts = pl.scan_parquet(files["episodes"], **options).sort("attempt", "commit_id")
episodes = attempts.unique("episode_id", keep="last", maintain_order=True)
steps = pl.scan_parquet(files["steps"], **options)
steps = steps.join(episodes, on=["episode_id", "attempt", "commit_id"], how="semi")
print(steps.filter(~pl.col("is_last")).group_by("op").len().sort("op").collect())
```

pandas:

```python
import pandas as pd

attempts = pd.concat(pd.read_parquet(path, partitioning=None) for path in files["episodes"])
episodes = attempts.sort_values(["attempt", "commit_id"]).drop_duplicates("episode_id", keep="last")
print(episodes.groupby("controller")["final_val_accuracy"].mean())
```
""")

_FROM_FILES = Template("""
In the folder of this card:

```python
files = $files
```

DuckDB:

```python
import duckdb

connection = duckdb.connect()
for table, pattern in files.items():
    connection.sql(f"CREATE VIEW {table} AS SELECT * FROM read_parquet('{pattern}', union_by_name = true)")
print(connection.sql("SELECT op, count(*) FROM steps WHERE NOT is_last GROUP BY op ORDER BY op"))
```

polars:

```python
import polars as pl

steps = pl.scan_parquet(files["steps"], missing_columns="insert")
print(steps.filter(~pl.col("is_last")).group_by("op").len().sort("op").collect())
```

pandas:

```python
from glob import glob

import pandas as pd

episodes = pd.concat(pd.read_parquet(path, partitioning=None) for path in glob(files["episodes"], recursive=True))
print(episodes.groupby("controller")["final_val_accuracy"].mean())
```
""")


def loading_section(name: str, number: int, files: Mapping[str, str] | None) -> list[str]:
    """Return the ways to load a version, Markdown.

    Args:
        name: The dataset's name.
        number: The version's number.
        files: By table a glob relative to the card, where its Parquet files lie beside it with one attempt an episode;
            None: they lie in a store.
    """
    if files is None:
        return [_GROUPED, _FROM_STORE.substitute(name=name, ref=f"{name}@{number}", number=number).strip()]
    return [_GROUPED, _FROM_FILES.substitute(files=dict(files)).strip()]
