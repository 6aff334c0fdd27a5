"""Tiny random models with a tokenizer, for tests that need real files but no training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from honeloom import lab
from honeloom.checkpoint.folders import copy_tokenizer

__all__ = ["tiny_llama"]


def tiny_llama(folder: Path, *, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """Write a random Llama with the lab's tokenizer and chat template; returns the folder.

    Parameters
    ----------
    folder : Path
        Created if absent.
    layers, hidden : int
        Size; four heads, two key-value heads.
    seed : int
        Of the weights.
    """
    vocabulary = LlamaConfig.from_pretrained(lab.base_path()).vocab_size
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    copy_tokenizer(lab.base_path(), folder)
    return folder
