"""All benchmarks of this folder, one after the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

for script in ("scoring.py", "quality.py", "decode.py"):
    subprocess.run([sys.executable, str(HERE / script)], check=True)
