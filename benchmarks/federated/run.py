"""Every benchmark on federation, one after the other: large layers, what a round costs, rounds on rows, zeroth-order
clients.

Usage: OMP_NUM_THREADS=1 python benchmarks/federated/run.py
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    failed = 0
    for name in ("aggregation", "overhead", "rounds", "fedmezo"):
        try:
            runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
        except SystemExit as end:
            failed = max(failed, int(bool(end.code)))
    sys.exit(failed)
