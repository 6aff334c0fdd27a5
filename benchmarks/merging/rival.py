"""mergekit in an environment of its own: made once, then run on the same YAML files as honeloom.

    python benchmarks/merging/rival.py [--env DIR] [CONFIG OUT [-- OPTION ...]]

Without CONFIG it only makes the environment, with the versions of constraints.txt where mergekit shares a package with
us. With CONFIG and OUT it merges, and prints what that took. Options behind `--` go to mergekit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measured import GIB, Usage, measured

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = HERE / "out" / "mergekit"
VERSION = "0.1.5"
OFFLINE: dict[str, str | None] = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
PACKAGES = ("mergekit", "torch", "transformers", "safetensors", "numpy")

_MANY = """
import json, logging, sys, traceback, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
failed = {}
for config, out in json.load(open(sys.argv[1])):
    text = open(config).read()
    try:
        settings = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(settings, out, options=MergeOptions(copy_tokenizer=False, quiet=True), config_source=text)
    except Exception as error:
        traceback.print_exc()
        failed[out] = f"{type(error).__name__}: {error}"
json.dump(failed, open(sys.argv[1], "w"))
"""


def make(env: Path) -> Path:
    """Make the environment unless it is there; returns its Python."""
    python = env / "bin" / "python"
    if not (env / "bin" / "mergekit-yaml").exists():
        print(f"making {env} with mergekit {VERSION} (once, a few minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        wanted = ["-c", str(ROOT / "constraints.txt"), f"mergekit=={VERSION}"]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def versions(env: Path) -> dict[str, str]:
    """Versions of what computes."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([make(env), "-c", code, *PACKAGES], check=True, capture_output=True, text=True)
    return dict(zip(PACKAGES, done.stdout.split(), strict=True))


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """Write a merge as YAML (JSON is YAML); mergekit passes over keys that it does not know, as `compat`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path


def command(env: Path, config: Path, out: Path, options: Sequence[str] = ()) -> list[str]:
    """mergekit's command line; absolute paths, since it takes a relative one for a name on the hub."""
    program = env.absolute() / "bin" / "mergekit-yaml"
    return [str(program), str(config.absolute()), str(out.absolute()), "--no-copy-tokenizer", "--quiet", *options]


def merge(env: Path, config: Path, out: Path, log: Path, options: Sequence[str] = ()) -> Usage:
    """Merge, and say what it took."""
    make(env)
    return measured(command(env, config, out, options), log, OFFLINE)


def merge_many(env: Path, jobs: Iterable[tuple[Path, Path]], log: Path) -> dict[str, str]:
    """Merge one (config, out) after the other in one process, which saves the imports; errors by output folder."""
    listed = log.with_suffix(".json")
    listed.write_text(json.dumps([(str(config.absolute()), str(out.absolute())) for config, out in jobs]))
    usage = measured([str(make(env)), "-c", _MANY, str(listed)], log, OFFLINE)
    if usage.status:
        raise SystemExit(f"mergekit ended with status {usage.status}: see {log}")
    failed: dict[str, str] = json.loads(listed.read_text())
    return failed


def main() -> None:
    """Make the environment, and merge if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=ENVIRONMENT)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    make(given.env)
    if given.config is None:
        print(versions(given.env))
        return
    if given.out is None:
        parser.error("OUT is missing")
    log = Path(f"{given.out}.log")
    usage = merge(given.env, given.config, given.out, log, given.options)
    print(
        f"status {usage.status}, wall {usage.wall:.1f} s, user {usage.user:.1f} s, system {usage.system:.1f} s, "
        f"peak resident {usage.rss / GIB:.2f} GiB, anonymous {usage.anonymous / GIB:.2f} GiB, asked "
        f"{usage.asked / GIB:.2f} GiB, from disk {usage.read / GIB:.2f} GiB, written {usage.written / GIB:.2f} GiB; "
        f"log {log}"
    )
    sys.exit(usage.status)


if __name__ == "__main__":
    main()
