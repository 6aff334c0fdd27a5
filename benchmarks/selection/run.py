"""Every benchmark on selection, one after the other: clusters, wrong rows and bad sources of the lab, real rows, DaaR.

Usage: OMP_NUM_THREADS=1 python benchmarks/selection/run.py
"""

from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    for name in ("clustering", "lab", "values", "real", "daar", "pools"):
        runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
