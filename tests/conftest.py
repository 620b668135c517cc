"""Makes the tests independent of how pytest was started."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent))
