"""One writer per output: a second process is told who holds it, and death frees it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from honeloom.errors import LockedError
from honeloom.runs.lock import writer_lock

HOLDER = """
import sys, time
from pathlib import Path
from honeloom.runs.lock import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_by_pid_and_host_until_the_first_dies(tmp_path, holder):
    out = tmp_path / "out"
    held = json.dumps({"pid": holder.pid, "host": socket.gethostname()})
    with pytest.raises(LockedError, match="is being written by") as caught, writer_lock(out):
        pass
    assert held in str(caught.value)
    assert caught.value.exit_code == 1
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with writer_lock(out):
        assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_the_lock_is_not_reentrant_and_is_free_after_an_error(tmp_path):
    out = tmp_path / "out"
    with writer_lock(out), pytest.raises(LockedError), writer_lock(out):
        pass
    with pytest.raises(RuntimeError), writer_lock(out):
        raise RuntimeError
    with writer_lock(out):
        pass
