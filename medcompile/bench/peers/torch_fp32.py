"""torch, eager, in float32: the reference that answers and times are told against.

Settings: the checkpoint's own classes, scaled_dot_product_attention (transformers' default), inference mode.
"""

from __future__ import annotations

from medcompile.bench.peer import Job, Peer
from medcompile.bench.peers import _torch
from medcompile.bench.peers._runner import FunctionRunner


class TorchFp32(Peer):
    name = "torch_fp32"
    title = "torch fp32 eager"
    tasks = _torch.TASKS
    modules = _torch.MODULES
    engine = "torch"
    reference = True

    def open(self, job: Job) -> FunctionRunner:
        return _torch.runner(job, _torch.load(job), {})


PEER = TorchFp32()
