"""Folders of this machine that several layers use."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "ESPER_CACHE"


def cache_folder() -> Path:
    """Return the folder for downloads ($ESPER_CACHE, else ~/.cache/esper); it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "esper"
