"""Run by test_sharded.py in two processes: ``abacist`` with FSDP2 between processes on CPUs.

accelerate shards on accelerators only. What it asks is the kind of the processes; with another
answer its FSDP2 and PyTorch's run on CPUs by gloo, all the same.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from abacist.cli.main import main

_start = PartialState.__init__


def _start_as_on_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
    _start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _start_as_on_gpus  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
