"""Hugging Face: loading, rendering, scoring, hidden states, tuning."""

import importlib.util
import logging
import sys
import warnings

# PEFT asks for this under its old name, in every model it wraps.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
# It advises to install `kernels`, which is what the next lines keep out.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# PEFT imports bitsandbytes, and that fetches compiled code from the hub where the package `kernels` is installed.
if "bitsandbytes" not in sys.modules and all(importlib.util.find_spec(n) for n in ("bitsandbytes", "kernels")):
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
