"""The front door with accelerate's FSDP2 over gloo, for a machine without GPUs.

accelerate takes its FSDP branch only for accelerators in the plural; told that these processes are such, everything
behind it (fully_shard, the launcher's settings, sharded checkpoints, gathered weights) is the real thing.
"""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import DistributedType

from pediatricsgpt import main

if __name__ == "__main__":
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_XPU
    raise SystemExit(main())
