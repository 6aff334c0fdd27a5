"""Llama and the families that kept its layout."""

from honeloom.checkpoint.architectures.layout import Architecture

LAYOUTS = tuple(Architecture(model_type) for model_type in ("llama", "mistral", "qwen2", "qwen3", "phi3"))
