"""Train the lab's base model from scratch and write it as a Hugging Face model folder.

Two phases. First six layers learn until the copying skills stand. Then two layers whose outputs are zero are
inserted and training goes on while their attention is left out of every second step, so that the model learns
not to need it: two planted redundant attentions, whose numbers are therefore known. Matrices are trained by Muon
(orthogonalised momentum), embedding and norms by AdamW.

    OMP_NUM_THREADS=1 python scripts/train_lab_base.py --output-dir src/honeloom/lab/base

takes about 18 CPU-minutes on one core with bf16 instructions. The same seed gives the same weights on the same
kind of CPU and the same library versions, and close ones elsewhere: bf16 sums differ between CPU kinds.

Runs differ in when the copying skills arrive. One in which they came late (72 % of the taught questions right
after 4,000 steps, where the shipped one had 85 %) ended with the same exact match and yet was much harder to
tune: measure ``benchmarks/lab`` before shipping other weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from honeloom.lab import world
from honeloom.lab.tokenizer import build_tokenizer, write_tokenizer

PLANTED = (3, 5)
PROMPT_WEIGHT = 0.1
FACT_SHARE = 0.035
WARM_UP = 100
Encoded = tuple[list[int], int]  # token ids, and from where on the loss counts in full
Batch = tuple[Tensor, Tensor]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(7000, 7500), metavar=("PHASE1", "PHASE2"))
    parser.add_argument("--batch", type=int, nargs=2, default=(64, 96), metavar=("PHASE1", "PHASE2"))
    parser.add_argument("--lr", type=float, nargs=2, default=(0.02, 0.014), metavar=("PHASE1", "PHASE2"))
    parser.add_argument("--log", type=Path, help="JSON lines with loss, CPU seconds and exact match")
    return parser.parse_args()


def encode(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Encoded]:
    """Encode (prompt, answer) pairs in the chat format; an empty prompt makes a plain document."""
    user, assistant, end = (tokenizer.token_to_id(f"<|{name}|>") for name in ("user", "assistant", "end"))
    prompts = tokenizer.encode_batch([prompt for prompt, _ in texts])
    answers = tokenizer.encode_batch([answer for _, answer in texts])
    rows: list[Encoded] = []
    for (prompt, _), p, a in zip(texts, prompts, answers, strict=True):
        head = [user, *p.ids, assistant] if prompt else [end]
        rows.append(([*head, *a.ids, end], len(head)))
    return rows


def to_batch(rows: Sequence[Encoded]) -> Batch:
    """Pad on the right: ids (B, T) and loss weights of the tokens (B, T); padding weighs nothing."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for i, (tokens, start) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        weights[i, 1:start] = PROMPT_WEIGHT
        weights[i, start : len(tokens)] = 1.0
    return ids, weights


def training_batches(tokenizer: Tokenizer, seed: int, size: int) -> Iterator[Batch]:
    """Yield batches for ever: chunks of about 6,000 rows, sorted by length, cut, batches shuffled."""
    rng = world.random_for("batches", seed)
    questions, facts = world.pretraining(seed), world.plain_facts()
    chunk = size * (6000 // size)
    while True:
        texts = []
        for _ in range(chunk):
            if rng.random() < FACT_SHARE:
                texts.append(("", rng.choice(facts)))
            else:
                question = next(questions)
                texts.append((question.prompt, question.answer))
        rows = sorted(encode(tokenizer, texts), key=lambda row: len(row[0]))
        batches = [rows[i : i + size] for i in range(0, chunk, size)]
        rng.shuffle(batches)
        yield from map(to_batch, batches)


def new_model(vocabulary: int, layers: int) -> LlamaForCausalLM:
    """Build a small Llama; the matrices that write to the residual stream start smaller."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1 / math.sqrt(2 * layers))
            layer.mlp.down_proj.weight.mul_(1 / math.sqrt(2 * layers))
    return model


def grow(small: LlamaForCausalLM) -> LlamaForCausalLM:
    """Insert layers that write nothing at the planted places; the function computed stays the same."""
    count = small.config.num_hidden_layers + len(PLANTED)
    model = new_model(small.config.vocab_size, count)
    old = iter(small.model.layers)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight)
        model.model.norm.weight.copy_(small.model.norm.weight)
        for i, layer in enumerate(model.model.layers):
            if i in PLANTED:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            else:
                layer.load_state_dict(next(old).state_dict())
    return model


def skip_attention_at_random(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Make the planted attentions return zero in every second training step, by chance."""

    def skipping(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.rand((), generator=generator) < 0.5 and torch.is_grad_enabled():
                return torch.zeros_like(hidden_states), None
            return forward(hidden_states, *args, **kwargs)

        return run

    for i in PLANTED:
        attention = model.model.layers[i].self_attn
        attention.forward = skipping(attention.forward)


def orthogonalise(g_NRC: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack, roughly: five Newton-Schulz steps (quintic, tuned for speed)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g_NRC.shape[-2] > g_NRC.shape[-1]
    x = (g_NRC.mT if tall else g_NRC).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, orthogonalised, for matrices; those of one shape go through one batched call."""

    def __init__(self, matrices: Sequence[nn.Parameter], momentum: float = 0.95, decay: float = 0.02) -> None:
        self.momentum, self.decay = momentum, decay
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.groups = [[p for p in matrices if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix; one whose layer was left out of this step has a zero gradient."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            buffer.mul_(self.momentum).add_(grad)
            rows, columns = grad.shape[-2:]
            update = orthogonalise(grad.add_(buffer, alpha=self.momentum)) * math.sqrt(max(1, rows / columns))
            for p, change in zip(group, update, strict=True):
                p.mul_(1 - lr * self.decay).sub_(change, alpha=lr)


def rate(step: int, steps: int) -> float:
    """Learning rate as a fraction of its peak: warm-up, then a cosine down to 2 %."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Weighted mean of the tokens' cross-entropy, in nats."""
    ids, weights = batch
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, rows: Sequence[Encoded]) -> float:
    """Percentage of rows whose every answer token, the end included, is the likeliest one."""
    right = 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for i in range(0, len(ordered), 250):
        ids, weights = to_batch(ordered[i : i + 250])
        guess = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        right += int(((guess == ids[:, 1:]) | (weights[:, 1:] < 1)).all(1).sum())
    return 100 * right / len(rows)


def dev_sets(tokenizer: Tokenizer, size: int = 60) -> dict[str, list[Encoded]]:
    """Draw questions of the dev part, by op; untaught ops carry a plus sign."""
    sets = {}
    for name, op in world.OPS.items():
        rng = world.random_for("training dev", name)
        # Facts must be known, not inferred: all of them are in the training text, so any will do.
        drawn = [world.draw_question(op, rng, "pretrain" if op.everywhere else "dev") for _ in range(size)]
        sets[name if op.taught else f"{name}+"] = encode(tokenizer, [(q.prompt, q.answer) for q in drawn])
    return sets


class Log:
    """Prints and keeps one JSON line per look at the model."""

    def __init__(self, path: Path | None, dev: dict[str, list[Encoded]]) -> None:
        self.path, self.dev, self.tokens = path, dev, 0

    def look(self, model: LlamaForCausalLM, phase: int, step: int, loss: float) -> None:
        """Measure exact match by op and write the line."""
        with torch.autocast("cpu", torch.bfloat16):
            scores = {name: round(exact_match(model, rows), 1) for name, rows in self.dev.items()}
        taught = [v for k, v in scores.items() if not k.endswith("+")]
        untaught = [v for k, v in scores.items() if k.endswith("+")]
        line = {
            "phase": phase,
            "step": step,
            "tokens": self.tokens,
            "cpu_seconds": round(time.process_time(), 1),
            "loss": round(loss, 4),
            "taught": round(sum(taught) / len(taught), 1),
            "untaught": round(sum(untaught) / len(untaught), 1),
            "ops": scores,
        }
        print(json.dumps(line), flush=True)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def train_phase(
    model: LlamaForCausalLM, batches: Iterator[Batch], steps: int, peak: float, phase: int, log: Log
) -> None:
    """Train a model in place for one phase."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    mean = 0.0
    for step in range(steps):
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = rate(step, steps)
        muon.step(peak * factor)
        adam.param_groups[0]["lr"] = 0.15 * peak * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        log.tokens += int((batch[1] > 0).sum())
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            log.look(model, phase, step + 1, mean)


def main() -> None:
    """Train both phases and write the folder."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    log = Log(arguments.log, dev_sets(tokenizer))
    model = new_model(tokenizer.get_vocab_size(), 6)
    for phase in (1, 2):
        if phase == 2:
            model = grow(model)
            skip_attention_at_random(model, torch.Generator().manual_seed(arguments.seed))
        batches = training_batches(tokenizer, 2 * arguments.seed + phase, arguments.batch[phase - 1])
        train_phase(model, batches, arguments.steps[phase - 1], arguments.lr[phase - 1], phase, log)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=1, pad_token_id=0, max_new_tokens=32)
    model.to(torch.bfloat16).save_pretrained(arguments.output_dir)
    (arguments.output_dir / "model.safetensors").chmod(0o644)
    write_tokenizer(arguments.output_dir)


if __name__ == "__main__":
    main()
