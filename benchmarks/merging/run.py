"""Every benchmark on merging, one after the other: real experts, mergekit's results, errors, time and memory.

Usage: OMP_WAIT_POLICY=PASSIVE python benchmarks/merging/run.py
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    failed = 0
    for name in ("experts", "parity", "error", "engine"):
        try:
            runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
        except SystemExit as end:
            failed = max(failed, int(bool(end.code)))
    sys.exit(failed)
