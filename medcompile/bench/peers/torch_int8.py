"""torch's dynamic quantization: torch.ao.quantization.quantize_dynamic over every Linear, int8 weights.

Settings: as its tutorial for BERT has them (per tensor; activations quantized as they come).
"""

from __future__ import annotations

import warnings

from medcompile.bench.peer import Job, Peer
from medcompile.bench.peers import _torch
from medcompile.bench.peers._runner import FunctionRunner


class TorchInt8(Peer):
    name = "torch_int8"
    title = "torch dynamic int8"
    tasks = _torch.TASKS
    modules = _torch.MODULES
    engine = "torch"
    precision = "int8"

    def open(self, job: Job) -> FunctionRunner:
        import torch
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces torchao as its successor
            module = quantize_dynamic(  # type: ignore[no-untyped-call]
                _torch.load(job), {torch.nn.Linear}, dtype=torch.qint8
            )
        notes = {"activations": "int8, scales as they come", "kernels": torch.backends.quantized.engine}
        return _torch.runner(job, module, notes)


PEER = TorchInt8()
