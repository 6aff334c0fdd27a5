"""The model, the rows of each client, and an ordinary training loop."""

from functools import lru_cache
from itertools import islice

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from honeloom import lab

BASE = str(lab.base_path())
"""A Llama of 0.9 million parameters, shipped with honeloom; put any model here."""
RANKS = (8, 4, 2)
"""Of clients whose node does not say."""
ROWS = 48


@lru_cache
def model_of(rank: int) -> PeftModel:
    """Make the base with a fresh adapter; where a process serves several messages, it is made once."""
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


@lru_cache
def rows_of(client: int, clients: int, split: str) -> list[dict[str, torch.Tensor]]:
    """Rows of a client: each has other domains."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    mine = [domain for domain in sorted(lab.DOMAINS) if sorted(lab.DOMAINS).index(domain) % clients == client]
    rows = islice((row for row in lab.rows(split) if row.get("domain", "").rstrip("+") in mine), ROWS)
    found = []
    for row in rows:
        prompt = tokenizer.encode(f"<|user|>{row['instruction']} {row['input']}".rstrip() + "<|assistant|>")
        answer = tokenizer.encode(row["output"] + "<|end|>")
        ids = torch.tensor(prompt + answer)
        labels = torch.tensor([-100] * len(prompt) + answer)
        found.append({"input_ids": ids, "labels": labels})
    return found


def batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad rows to one length."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def train(model: PeftModel, rows: list[dict[str, torch.Tensor]], steps: int, lr: float) -> float:
    """Train what is trainable now; the mean loss of the steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for step in range(steps):
        chosen = [rows[(8 * step + k) % len(rows)] for k in range(8)]
        loss = model(**batch(chosen)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model: PeftModel, rows: list[dict[str, torch.Tensor]]) -> float:
    """Compute the loss on rows."""
    return float(model.eval()(**batch(rows)).loss)
