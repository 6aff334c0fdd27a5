"""Estimate against measured peak on a GPU: bf16 and 4-bit LoRA, all weights, and inference of a 1B random Llama."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from honeloom.checkpoint.folders import read_config
from honeloom.planning.memory import Work, peak_memory, read_decoder

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory"
JOBS = (
    Work("lora", 4, 512),
    Work("lora", 4, 512, load_in="4bit"),
    Work("lora", 2, 2048, checkpointing=True),
    Work("full", 1, 512),
    Work("inference", 8, 512),
)


@pytest.fixture(scope="module")
def billion(tmp_path_factory):
    sys.path.insert(0, str(BENCHMARK))
    from measure import write_model

    return write_model(tmp_path_factory.mktemp("models") / "1B", "1B")


@pytest.mark.gpu
@pytest.mark.parametrize("work", JOBS, ids=lambda w: f"{w.mode}-{w.load_in or w.dtype}-{w.batch_size}x{w.tokens}")
def test_estimate_is_within_a_fifth_of_the_peak(billion, work):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    command = [sys.executable, str(BENCHMARK / "measure.py"), str(billion), json.dumps(asdict(work)), "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])["peak"]
    assert peak_memory(read_decoder(read_config(billion)), work).total == pytest.approx(peak, rel=0.2)
