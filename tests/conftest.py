"""Fixtures of the whole suite: real data, tiny models, small rows; and an offline, one-threaded process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE",
)  # fmt: skip
for _name in ("HF_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(_name, None)

# The same examples every time where a failure blocks others; elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _importances_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What an earlier run or the user measured must not decide a test."""
    os.environ["HONELOOM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real rows and models, or skip; a missing folder fails where everything is required."""
    folder = Path(os.environ.get("HONELOOM_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        message = f"no real rows at {folder}; set HONELOOM_SHARED_DATA to their folder"
        if os.environ.get("HONELOOM_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def llama_cpp() -> str:
    """A Python that has llama.cpp, or skip; that there is none fails where everything is required."""
    from honeloom.backends.llama_cpp import llama_python
    from honeloom.errors import MissingExtraError

    try:
        return llama_python()
    except MissingExtraError as error:
        if os.environ.get("HONELOOM_REQUIRE_ALL") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    """The folder of a real Llama with 260 thousand parameters."""
    return shared_data / "models" / "stories260k"


def write_tiny_model(folder: Path, seed: int) -> Path:
    """A random Llama of two layers with the lab's tokenizer and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from honeloom.lab.tokenizer import build_tokenizer, write_tokenizer

    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=build_tokenizer().get_vocab_size(), max_position_embeddings=128,
                bos_token_id=1, eos_token_id=1, pad_token_id=0,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; read only."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "base", 0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model of the same architecture; read only."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "other", 1)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write N alpaca rows (ids r0, r1, ...) to a file below the test's folder."""

    def make(count: int = 12, name: str = "rows.jsonl") -> Path:
        return write_jsonl(
            tmp_path / name,
            (
                {"id": f"r{i}", "instruction": f"Say {i}.", "input": "", "output": f"It is {i}.", "domain": "ab"[i % 2]}
                for i in range(count)
            ),
        )

    return make


@pytest.fixture
def rows(make_rows: Callable[..., Path]) -> Path:
    """Twelve alpaca rows of two domains."""
    return make_rows()
