"""Settings of `export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from honeloom.config.base import Dtype, ModelInput, VerbConfig

__all__ = ["ExportConfig"]


class ExportConfig(VerbConfig):
    """One file of a whole model, for a runtime that reads no model folder."""

    model: ModelInput = Field(description="Model to export: hub id, id@revision, path or lab:base.")
    format: Literal["gguf"] = Field("gguf", description="gguf is the format of llama.cpp and its front-ends.")
    quant: Literal["f16", "q8_0"] = Field(
        "f16",
        description="Type of matrices, embeddings included. f16 holds what bf16 weights hold, and llama.cpp computes "
        "nearer to the source with it than with bf16; q8_0 has 8 bits and a scale for every 32 weights. Norms, biases "
        "and routers are float32.",
    )
    dtype: Dtype = Field("auto", description="Of the source that the file is compared with; auto is fp32.")
