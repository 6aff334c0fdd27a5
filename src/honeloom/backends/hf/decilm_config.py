"""Configuration of a decoder whose blocks may lack attention or MLP (model type nemotron-nas).

Runtimes that have the model itself (vLLM) read its configuration with this file, which stands beside
the weights as `configuration_nemotron_nas.py` and needs transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class Part(dict):
    """A JSON object whose fields are attributes too, as runtimes read them."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(PretrainedConfig):
    """Llama's fields, and `block_configs`: of every block what its attention and its MLP are, or that there is none.

    Parameters
    ----------
    block_configs : list of dict
        Each with "attention" (no_op, n_heads_in_group, ...) and "ffn" (no_op, ffn_mult, ...).
    """

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, block_configs: Any = None, **kwargs: Any) -> None:
        self.block_configs = [Part({name: Part(part) for name, part in b.items()}) for b in block_configs or ()]
        for name, value in kwargs.items():
            if name in ("rope_theta", "rope_scaling"):  # some versions of transformers rename them
                setattr(self, name, value)
        super().__init__(**kwargs)
