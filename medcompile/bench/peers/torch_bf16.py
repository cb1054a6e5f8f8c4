"""torch, eager, with weights and activations in bfloat16: model.to(torch.bfloat16), in inference mode."""

from __future__ import annotations

from medcompile.bench.peer import Job, Peer
from medcompile.bench.peers import _torch
from medcompile.bench.peers._runner import FunctionRunner


class TorchBf16(Peer):
    name = "torch_bf16"
    title = "torch bf16 eager"
    tasks = _torch.TASKS
    modules = _torch.MODULES
    engine = "torch"
    precision = "bfloat16"
    float_precision = "bfloat16"

    def open(self, job: Job) -> FunctionRunner:
        import torch

        module = _torch.load(job).to(torch.bfloat16)
        return _torch.runner(job, module, {}, "bfloat16")


PEER = TorchBf16()
