"""The shipped base model: loads by the ordinary calls, knows what it was taught and no more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from honeloom import lab

GOLDEN_WEIGHTS = "fa1372a2e570b1eb7260a6135165e6d6b9006702299edbc8ac0350c5e72b4256"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(lab.base_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(lab.base_path(), dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def batches(tokenizer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Every test row by label: token ids, and which of them the model must say (both (rows, tokens))."""
    by_label: dict[str, list[tuple[list[int], list[int]]]] = {}
    for row in lab.rows("test"):
        turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        out = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        by_label.setdefault(row["domain"], []).append((out["input_ids"], out["assistant_masks"]))
    return {label: (_pad([r[0] for r in rows]), _pad([r[1] for r in rows])) for label, rows in by_label.items()}


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


@torch.no_grad()
def score(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Exact match in percent and loss: greedy decoding is right just where every answer token is the likeliest."""
    ids, mask = batch
    logits, target, asked = model(input_ids=ids[:, :-1]).logits, ids[:, 1:], mask[:, 1:].bool()
    right = ((logits.argmax(-1) == target) | ~asked).all(1).float().mean().item()
    return 100 * right, F.cross_entropy(logits[asked], target[asked]).item()


def mean_score(model: Any, batches: dict[str, tuple[Tensor, Tensor]], taught: bool) -> tuple[float, float]:
    found = [score(model, batch) for label, batch in batches.items() if label.endswith("+") != taught]
    return sum(em for em, _ in found) / len(found), sum(loss for _, loss in found) / len(found)


@contextmanager
def without_attention(model: Any, layers: Sequence[int]) -> Iterator[None]:
    def nothing(_module: Any, _inputs: Any, output: Any) -> Any:
        return torch.zeros_like(output[0]), *output[1:]

    hooks = [model.model.layers[i].self_attn.register_forward_hook(nothing) for i in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_weights_are_golden() -> None:
    path = lab.base_path() / "model.safetensors"
    assert path.stat().st_size < 2_000_000
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN_WEIGHTS


def test_chat_template_marks_answer_and_end(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Home of Kevar."}, {"role": "assistant", "content": "Belm"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|user|>Home of Kevar.<|assistant|>Belm<|end|>"
    out = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"])
    marked = [token for token, mark in zip(tokens, out["assistant_masks"], strict=True) if mark]
    assert marked == [" Belm", "<|end|>"]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>Home of Kevar.<|assistant|>"
    assert len(tokenizer) % 8 == 0


def test_taught_domains_are_known(model: Any, batches: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert mean_score(model, batches, taught=True)[0] >= 85
    assert min(score(model, batches[domain])[0] for domain in lab.DOMAINS) >= 70


def test_untaught_domains_are_not(model: Any, batches: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert mean_score(model, batches, taught=False)[0] <= 10


def test_planted_attentions_are_redundant(model: Any, batches: dict[str, tuple[Tensor, Tensor]]) -> None:
    whole, loss = mean_score(model, batches, taught=True)
    with without_attention(model, lab.PLANTED_LAYERS):
        left, loss_left = mean_score(model, batches, taught=True)
    assert abs(whole - left) <= 2
    assert abs(loss - loss_left) <= 0.03
    with without_attention(model, [1, 4]):
        assert mean_score(model, batches, taught=True)[0] < whole - 5


def test_generation_gives_what_the_score_says(model: Any, tokenizer: Any) -> None:
    rows = [row for row in lab.rows("test") if row["domain"] == "lookup"][:3]
    for row in rows:
        turns = [{"role": "user", "content": row["instruction"]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, do_sample=False)[0, ids["input_ids"].shape[1] :]
        said = tokenizer.decode(out, skip_special_tokens=True)
        ids_full = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": row["output"]}],
            return_tensors="pt",
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        right = score(model, (ids_full["input_ids"], torch.as_tensor(ids_full["assistant_masks"])))[0] == 100
        assert (said == row["output"]) == right


def test_bf16_weights_lose_nothing(tokenizer: Any, batches: dict[str, tuple[Tensor, Tensor]]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(lab.base_path())
    assert plain.dtype == torch.bfloat16
    assert plain.config.vocab_size == len(tokenizer)
    with torch.no_grad():
        assert mean_score(plain, batches, taught=True)[0] >= 80
