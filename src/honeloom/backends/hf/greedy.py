"""Greedy continuation by transformers, with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["continue_greedily"]


@torch.inference_mode()
def continue_greedily(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The `count` likeliest tokens after each prompt, one by one, beyond any end of text.

    The model's own `generate` would take penalties and ends from its generation_config, which no server knows of.

    Parameters
    ----------
    model : transformers model
        In evaluation mode.
    prompts : sequence of sequence of int
        Token ids.
    count : int
        At least 1.
    """
    found = []
    for prompt in prompts:
        ids, past = torch.tensor([list(prompt)], device=model.device), None
        tokens: list[int] = []
        for _ in range(count):
            given = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = given.past_key_values
            ids = given.logits[:, -1:].argmax(dim=-1)
            tokens.append(int(ids))
        found.append(tokens)
    return found
