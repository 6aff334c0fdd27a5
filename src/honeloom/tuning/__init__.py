"""Tuning on one machine. `METHODS` lists what can be trained."""

from honeloom.registry import Method

METHODS = (
    Method("lora", "honeloom.backends.hf.tune:add_lora", "honeloom.tuning.config:LoraMethodConfig",
           "Hu et al. 2021, arXiv:2106.09685", "low-rank adapters on the linear layers (PEFT)"),
    Method("full", "honeloom.backends.hf.tune:unfreeze", "honeloom.tuning.config:FullConfig",
           "baseline", "all weights are trained"),
)  # fmt: skip
