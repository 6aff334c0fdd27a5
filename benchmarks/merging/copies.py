"""The least a merge can do: read every input once, and write one output of the size of the first. Prints JSON.

    python benchmarks/merging/copies.py OUT INPUT...

Reads are of 8 MiB, from one input after the other at the same place. `copied` is until the last write, `durable` until
the output is on the disk.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

SIZE = 8 << 20


def copy(out: Path, inputs: list[Path]) -> dict[str, float]:
    """Read and write; seconds until written, and until on the disk."""
    begun, buffer = time.monotonic(), bytearray(SIZE)
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb", buffering=0)) for path in inputs]
        target = stack.enter_context(open(out, "wb", buffering=0))
        left = True
        while left:
            left = False
            for i, file in enumerate(files):
                size = file.readinto(buffer)
                left |= bool(size)
                if i == 0 and size:
                    target.write(memoryview(buffer)[:size])
        written = time.monotonic()
        os.fsync(target.fileno())
    return {"copied": written - begun, "durable": time.monotonic() - begun}


if __name__ == "__main__":
    print(json.dumps(copy(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])))
