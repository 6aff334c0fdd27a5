#!/usr/bin/env bash
# Create .venv with the exact tested versions; does nothing when pyproject and constraints are unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
stamp=.venv/.stamp
want=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "honeloom needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "setting up .venv (once, a few minutes)" >&2
.venv/bin/python -m pip install -q --upgrade pip
.venv/bin/python -m pip install -q -c constraints.txt -e ".[all,dev]"
echo "$want" > "$stamp"
