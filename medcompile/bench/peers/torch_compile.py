"""torch.compile with inductor's CPU code, in float32.

Settings: frozen weights, as torch's documentation advises for inference; one compilation for each shape
(dynamic=False), at its first run, which is never timed. What was compiled is kept in the job's folder.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from medcompile.bench.peer import Job, Missing, Peer
from medcompile.bench.peers import _torch
from medcompile.bench.peers._runner import FunctionRunner


class TorchCompile(Peer):
    name = "torch_compile"
    title = "torch.compile fp32"
    tasks = _torch.TASKS
    modules = _torch.MODULES
    engine = "torch.compile"

    def missing(self, job: Job) -> Missing | None:
        found = super().missing(job)
        if found is None and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            return Missing("no C++ compiler here", fix="apt-get install g++")
        return found

    def open(self, job: Job) -> FunctionRunner:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(job.work) / "inductor")
        import torch
        import torch._dynamo.config
        import torch._inductor.config

        torch._inductor.config.freezing = True
        torch._dynamo.config.recompile_limit = max(8, 2 * len(job.cells))
        module = torch.compile(_torch.load(job), dynamic=False)
        return _torch.runner(job, module, {"compiled": "for each shape, weights frozen"})


PEER = TorchCompile()
