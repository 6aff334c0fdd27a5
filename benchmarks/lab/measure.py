"""Shared steps of the lab benchmark: draw questions, score, tune, leave attentions out."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from honeloom import lab
from honeloom.lab import world

Encoded = tuple[list[int], int]  # token ids, and where the answer begins


def load_base() -> nn.Module:
    """Load the shipped model in fp32, with eager attention (faster than the fused one for rows this short)."""
    return AutoModelForCausalLM.from_pretrained(lab.base_path(), dtype=torch.float32, attn_implementation="eager")


def questions(domain: str, taught: bool, part: world.Part, count: int, seed: int = 0) -> list[world.Question]:
    """Draw questions of one domain, all ops alike; facts come from anywhere, for they must be known."""
    ops = [op for op in world.OPS.values() if op.domain == domain and op.taught == taught]
    rng = world.random_for("lab benchmark", domain, taught, part, seed)
    return [world.draw_question(op, rng, "pretrain" if op.everywhere else part) for op in rng.choices(ops, k=count)]


def with_errors(drawn: Sequence[world.Question], share: float, rng: Random) -> list[tuple[str, str, bool]]:
    """Replace a share of the answers by that of another row with the same op: (prompt, answer, wrong)."""
    answers = defaultdict(list)
    for q in drawn:
        answers[q.op.name].append(q.answer)
    wrong = set(rng.sample(range(len(drawn)), round(share * len(drawn))))
    rows = []
    for i, q in enumerate(drawn):
        others = [a for a in answers[q.op.name] if a != q.answer]
        close = [a for a in others if len(a) == len(q.answer)] or others
        rows.append((q.prompt, rng.choice(close) if i in wrong else q.answer, i in wrong))
    return rows


def chance(drawn: Sequence[world.Question]) -> float:
    """Percentage right if one always gave an op's most frequent answer."""
    by_op = defaultdict(list)
    for q in drawn:
        by_op[q.op.name].append(q.answer)
    return 100 * sum(Counter(a).most_common(1)[0][1] for a in by_op.values()) / len(drawn)


class Encoder:
    """Prompts and answers as token ids in the chat format."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(lab.base_path())

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Encode (prompt, answer) pairs."""
        encoded = []
        for prompt, answer in pairs:
            head = self.tokenizer(f"<|user|>{prompt}<|assistant|>")["input_ids"]
            encoded.append((head + self.tokenizer(f"{answer}<|end|>")["input_ids"], len(head)))
        return encoded

    def asked(self, drawn: Sequence[world.Question]) -> list[Encoded]:
        """Encode questions with their true answers."""
        return self([(q.prompt, q.answer) for q in drawn])


def to_batch(rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Pad on the right: ids (B, T), and which of them are answer or end (B, T)."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    counted = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (tokens, start) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        counted[i, start : len(tokens)] = True
    return ids, counted


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits of the next tokens, fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    return logits.float()


def loss_of(model: nn.Module, rows: Sequence[Encoded]) -> Tensor:
    """Mean cross-entropy of the answers' tokens and their ends, in nats."""
    ids, counted = to_batch(rows)
    return F.cross_entropy(logits_of(model, ids)[counted[:, 1:]], ids[:, 1:][counted[:, 1:]])


@torch.no_grad()
def score(model: nn.Module, rows: Sequence[Encoded]) -> tuple[float, float]:
    """Return exact match in percent and the mean loss.

    Under teacher forcing the whole answer is the likeliest at every place if and only if greedy decoding gives
    it, so no text is generated.
    """
    right, losses, tokens = 0, 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for i in range(0, len(ordered), 200):
        ids, counted = to_batch(ordered[i : i + 200])
        logits, target, asked = logits_of(model, ids), ids[:, 1:], counted[:, 1:]
        right += int(((logits.argmax(-1) == target) | ~asked).all(1).sum())
        losses += float(F.cross_entropy(logits[asked], target[asked], reduction="sum"))
        tokens += int(asked.sum())
    return 100 * right / len(rows), losses / tokens


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[Encoded]) -> list[float]:
    """Return each row's mean loss over its answer and end, in nats, in the order given."""
    losses: list[float] = []
    for i in range(0, len(rows), 200):
        ids, counted = to_batch(rows[i : i + 200])
        asked = counted[:, 1:]
        token_losses = F.cross_entropy(logits_of(model, ids).mT, ids[:, 1:], reduction="none")
        losses += ((token_losses * asked).sum(1) / asked.sum(1)).tolist()
    return losses


def tune(model: nn.Module, rows: Sequence[Encoded], steps: int, lr: float, seed: int) -> nn.Module:
    """Tune in place with AdamW, batches of 16 drawn in shuffled epochs, the rate falling to nothing."""
    rng = Random(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    order: list[int] = []
    model.train()
    for step in range(steps):
        if len(order) < 16:
            order = rng.sample(range(len(rows)), len(rows))
        batch, order = order[:16], order[16:]
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss_of(model, [rows[i] for i in batch]).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def tuned_copy(base: nn.Module, rows: Sequence[Encoded], steps: int, lr: float, seed: int) -> nn.Module:
    """Tune a copy of the model."""
    return tune(copy.deepcopy(base), rows, steps, lr, seed)


@contextmanager
def without_attention(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """Let the attentions of some layers write nothing to the residual stream."""

    def nothing(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return torch.zeros_like(output[0]), *output[1:]

    hooks = [model.model.layers[i].self_attn.register_forward_hook(nothing) for i in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_importance(model: Any, rows: Sequence[Encoded]) -> list[float]:
    """One minus the mean cosine of the residual stream before and after each attention; lower is more redundant."""
    ids, _ = to_batch(rows)
    real = torch.tensor([[j < len(tokens) for j in range(ids.shape[1])] for tokens, _ in rows])
    scores: list[float] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        # The attention reads the normed stream; the stream itself is what the layer was called with.
        before = streams[-1][real]
        scores.append(float(1 - F.cosine_similarity(before, before + output[0].float()[real], dim=-1).mean()))

    streams: list[Tensor] = []
    hooks: list[Any] = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_pre_hook(lambda _m, args: streams.append(args[0].float())))
        hooks.append(layer.self_attn.register_forward_hook(look))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return scores
