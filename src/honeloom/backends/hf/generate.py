"""Text from a model: sampled in batches, padded left, from draws that do not hang on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from honeloom.backends.devices import memory_guard
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, max_positions
from honeloom.backends.hf.score import has_own_tokenizers
from honeloom.errors import SourceError
from honeloom.ops.noise import uniform
from honeloom.registry import load_target

__all__ = ["Generator", "Prompter"]

LEAST_ROOM = 16
"""New tokens below which a prompt counts as too long."""


class Prompter(Encoder):
    """Renders one user turn, and the beginning of the answer."""

    def prompt(self, text: str) -> list[int]:
        """Token ids up to where the answer begins; UnrenderableRow where the template refuses the text."""
        if self.template is None:
            return self._bos() + self._ids(f"{text}\n")
        messages = [{"role": "user", "content": text}]
        return self._ids(str(self._apply(messages, tokenize=False, add_generation_prompt=True)))


class Generator:
    """A loaded model that answers prompts: the port of methods that need text.

    Parameters
    ----------
    model : transformers model
        In evaluation mode.
    encoder : Prompter
        Renders prompts with the tokenizer's chat template, where there is one.
    batch_size : int
        Prompts per forward pass.
    """

    def __init__(self, model: Any, encoder: Prompter, batch_size: int) -> None:
        self.model = model
        self.encoder = encoder
        self.batch_size = batch_size
        self._ends = _end_tokens(model, encoder.tokenizer)

    @classmethod
    def open(
        cls, path: Path, *, base: Path | None = None, loading: Loading | None = None, batch_size: int = 16
    ) -> Generator:
        """Load model and tokenizer; SourceError if the folder has no tokenizer.

        Of a mixture of whole models: a generator whose prompts are answered by the model chosen for each.
        """
        if has_own_tokenizers(path):
            routed: Generator = load_target("honeloom.backends.hf.routed:RoutedGenerator").open(
                path, base=base, loading=loading, batch_size=batch_size
            )
            return routed
        tokenizer = load_tokenizer(path, base=base)
        if tokenizer is None:
            raise SourceError(f"{path}: no tokenizer, so it cannot write; add tokenizer.json to the folder")
        model = load_model(path, base=base, loading=loading)
        return cls(model, Prompter(tokenizer, max_positions(model.config, tokenizer)), batch_size)

    def generate(
        self, prompts: Sequence[str], *, seed: int, max_new_tokens: int, temperature: float, top_p: float
    ) -> list[str]:
        """Sample one continuation per prompt, special tokens left out.

        Parameters
        ----------
        prompts : sequence of str
            User turns; a prompt that leaves fewer than 16 tokens of the model's positions, or
            fewer than asked for, is answered by the empty text.
        seed : int
            Token t of the answer to prompt i follows from (seed, i, t), whatever the batch.
        max_new_tokens : int
            At least 1; less where the positions end.
        temperature : float
            What logits are divided by; 0 takes the likeliest token.
        top_p : float
            Only the likeliest tokens that make up this probability are drawn, in (0, 1].
        """
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}: need >= 1, "
                             ">= 0 and (0, 1]")  # fmt: skip
        return self._answer(prompts, range(len(prompts)), seed, max_new_tokens, temperature, top_p)

    def _answer(
        self, prompts: Sequence[str], numbers: Sequence[int], seed: int, max_new_tokens: int, temperature: float,
        top_p: float,
    ) -> list[str]:  # fmt: skip
        """Answers to prompts whose draws go by the given numbers."""
        limit = self.encoder.max_length
        encoded = [self.encoder.prompt(text) for text in prompts]
        fits = [i for i, ids in enumerate(encoded) if ids and limit - len(ids) >= min(LEAST_ROOM, max_new_tokens)]
        fits.sort(key=lambda i: (-len(encoded[i]), i))
        found = [""] * len(prompts)
        advice = [f"--batch-size {max(1, self.batch_size // 2)}"]
        for start in range(0, len(fits), self.batch_size):
            picked = fits[start : start + self.batch_size]
            room = min(max_new_tokens, limit - len(encoded[picked[0]]))
            draws = torch.stack([uniform(seed, f"generate/{numbers[i]}", room) for i in picked])
            with memory_guard(self.model.device, f"writing {len(picked)} texts", advice):
                tokens = self._sample([encoded[i] for i in picked], draws, temperature, top_p)
            for i, ids in zip(picked, tokens, strict=True):
                found[i] = str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True))
        return found

    @torch.inference_mode()
    def _sample(
        self, prompts: Sequence[list[int]], draws: torch.Tensor, temperature: float, top_p: float
    ) -> list[list[int]]:
        """New tokens of every prompt, up to its end token."""
        ids, mask = _pad_left(prompts)
        device = self.model.device
        ids, mask = ids.to(device), mask.to(device)
        cache, open_rows = None, [True] * len(prompts)
        found: list[list[int]] = [[] for _ in prompts]
        for step in range(draws.shape[1]):
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            chosen = _draw(output.logits[:, -1].double().cpu(), draws[:, step], temperature, top_p)
            for row, token in enumerate(chosen.tolist()):
                open_rows[row] = open_rows[row] and token not in self._ends
                if open_rows[row]:
                    found[row].append(token)
            if not any(open_rows):
                break
            ids = chosen[:, None].to(device)
            mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), dim=1)
        return found

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Mean input embedding (n, d) of every text's tokens; zeros for a text without tokens."""
        table = self.model.get_input_embeddings()
        found = np.zeros((len(texts), self.model.config.get_text_config().hidden_size), dtype=np.float32)
        for i, text in enumerate(texts):
            ids = self.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if ids:
                rows = table(torch.tensor(ids, device=table.weight.device)).double()
                found[i] = rows.mean(dim=0).float().cpu().numpy()
        return found


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, by the model's generation settings and its tokenizer."""
    given = getattr(model.generation_config, "eos_token_id", None)
    listed = given if isinstance(given, list) else [given]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _pad_left(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, each (B, T), int64: answers begin at the same place."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids, mask


def _draw(logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Token (B,) of logits (B, V) by inversion of draws in [0, 1) among the likeliest tokens of mass `top_p`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    chances, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    before = chances.cumsum(dim=-1) - chances
    chances = chances.where(before < top_p, torch.zeros_like(chances))
    total = chances.cumsum(dim=-1)
    place = torch.searchsorted(total, (draws[:, None] * total[:, -1:]).contiguous(), right=True)
    last = (chances > 0).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, place.minimum(last)).squeeze(1)
