"""Run honeloom with FSDP on a CPU: accelerate offers it for GPUs alone, and torch runs the same code over gloo."""

import sys
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType

from honeloom.cli.main import main

plain_init = accelerate.state.AcceleratorState.__init__


def init(self: Any, *args: Any, fsdp_plugin: Any = None, **rest: Any) -> None:
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **rest)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


accelerate.state.AcceleratorState.__init__ = init  # type: ignore[method-assign]
main(sys.argv[1:])
