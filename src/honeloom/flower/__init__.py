"""honeloom's rules in Flower apps that exchange LoRA factors: a strategy for the server, helpers for PEFT clients."""

from __future__ import annotations

from honeloom.backends.flower.peft_client import hold, receive, reply
from honeloom.backends.flower.strategy import FloraStrategy

__all__ = ["FloraStrategy", "hold", "receive", "reply"]
