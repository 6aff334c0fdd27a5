"""Two million rows through preview, select and evaluate: resident memory and time. Writes RESULT.md.

Usage: python benchmarks/streaming/run.py [--rows N]

The rows are synthetic and lie in one JSONL file; the model is the lab's. Every command is a process of its own, and
its peak is what the operating system counted for it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT = 2 * 2**30
WORDS = ("add", "cut", "find", "list", "name", "order", "read", "say", "sort", "spell", "tell", "turn", "write")


def write_rows(path: Path, count: int) -> None:
    """Alpaca rows of a few dozen words, every one with its own text."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            words = draw.choices(WORDS, k=24)
            texts = {"instruction": " ".join(words[:12]), "input": str(i), "output": " ".join(words[12:])}
            file.write(json.dumps({"id": f"row-{i}", **texts, "domain": words[0]}) + "\n")


def run(*arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    start = time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "honeloom", *arguments], **quiet)  # type: ignore[call-overload]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"honeloom {' '.join(arguments)}: status {status}")
    return time.monotonic() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Write rows, run the commands, write RESULT.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2_000_000)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder) / "rows.jsonl", Path(folder) / "out"
        write_rows(rows, count)
        size = rows.stat().st_size
        commands = {
            "rows preview": ("rows", "preview", str(rows), "--model", "lab:base"),
            "select --method random --keep 10%": (
                "select", str(rows), "--method", "random", "--keep", "10%", "--output-dir", str(out),
            ),
            "evaluate --limit 200": ("evaluate", "lab:base", "--rows", str(rows), "--limit", "200"),
            "verify": ("verify", str(out)),
        }  # fmt: skip
        found = {name: run(*command) for name, command in commands.items()}
    lines = [f"| `{name}` | {seconds:.0f} | {peak / 2**20:,.0f} |" for name, (seconds, peak) in found.items()]
    worst = max(peak for _, peak in found.values())
    text = TEXT.format(rows=f"{count:,}", size=f"{size / 2**20:,.0f}", lines="\n".join(lines))
    if worst > LIMIT:
        text += f"\n## Not reached\n\nThe limit is 2 GiB; the largest peak is {worst / 2**30:.2f} GiB.\n"
    (HERE / "RESULT.md").write_text(text)
    print(text)


TEXT = """# {rows} rows

Command: `python benchmarks/streaming/run.py`. {rows} synthetic alpaca rows in one JSONL file of {size} MiB; two shared
cores. The goal is a peak below 2 GiB (2,048 MiB) for every command; half a GiB of it is torch and transformers.

| command | seconds | peak MiB |
|---|---|---|
{lines}
"""


if __name__ == "__main__":
    main()
