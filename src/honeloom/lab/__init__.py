"""A small synthetic world with known answers, and a tiny base model trained on it.

Eight domains of short questions, each with ops the base model was taught and ops it was not, which are
compositions of the former. ``rows`` gives a pool with planted errors, duplicates and mixtures, and a clean dev
and test split; ``truth`` tells what was planted; ``base_path`` is the folder of the base model, an ordinary Hugging
Face folder of a Llama with 0.9 million parameters. Two of its attentions, those of layers 3 and 5, are redundant
by construction: in training they were left out of every second step.

The world is an oracle for tests and a demonstration, not a judge of methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from honeloom.lab.splits import Row, Split, Truth, rows, truth
from honeloom.lab.world import DOMAINS

__all__ = ["DOMAINS", "PLANTED_LAYERS", "Row", "Split", "Truth", "base_path", "rows", "truth"]

PLANTED_LAYERS: Final = (3, 5)
"""Layers of the base model whose attention is redundant by construction."""


def base_path() -> Path:
    """Return the folder of the shipped base model.

    Returns
    -------
    Path
        Holds ``config.json``, ``model.safetensors`` (bf16), the tokenizer and the generation settings.
    """
    return Path(__file__).resolve().parent / "base"
