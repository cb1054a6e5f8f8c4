"""NVIDIA's builders over our fp16 export, through Polygraphy, their own Python front.

NOT RUN HERE: written from their documentation and Polygraphy's source, for a machine with a GPU. Settings: strongly
typed, one profile for each shape that is timed, inputs and outputs on the host (copies are inside the clock).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medcompile.bench.peer import Array, Job, Peer
from medcompile.bench.peers import _onnx, _torch
from medcompile.bench.peers._runner import FunctionRunner, array_runner

_ENGINE = "model.engine"


class TensorRtPeer(Peer):
    """One of the two builders; before either, Polygraphy's environment says which one it drives."""

    tasks = _torch.TASKS
    device = "cuda"
    precision = float_precision = "float16"

    def choose(self) -> None:
        """Set what Polygraphy reads when it is imported."""

    def prepare(self, job: Job) -> None:
        self.choose()
        import numpy as np
        from polygraphy.backend import trt

        exported = _onnx.export(job, Path(job.work) / "export.onnx", "float16")
        _, network, _ = parsed = trt.network_from_onnx_path(str(exported), strongly_typed=True)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        profiles = []
        for cell in job.cells:
            profile = trt.Profile()
            for one in inputs:
                shape = [cell.batch, *(cell.sequence if d < 0 else d for d in tuple(one.shape)[1:])]
                profile.add(one.name, min=shape, opt=shape, max=shape)
            profiles.append(profile)
        made = trt.engine_bytes_from_network(parsed, config=trt.CreateConfig(profiles=profiles))
        (Path(job.work) / _ENGINE).write_bytes(np.asarray(made, dtype=np.uint8).tobytes())
        exported.unlink()

    def open(self, job: Job) -> FunctionRunner:
        self.choose()
        import numpy as np
        from polygraphy.backend import trt

        engine = trt.engine_from_bytes((Path(job.work) / _ENGINE).read_bytes())
        runners = {}
        for i, cell in enumerate(job.cells):
            runners[cell.batch, cell.sequence] = trt.TrtRunner(engine, optimization_profile=i)
            runners[cell.batch, cell.sequence].activate()

        def call(feeds: Mapping[str, Array]) -> Array:
            shape = next(iter(feeds.values())).shape
            runner = runners[shape[0], shape[1] if len(shape) == 2 else 0]
            wanted = runner.get_input_metadata()
            given = {name: np.asarray(feeds[name], wanted[name].dtype) for name in wanted}
            return np.asarray(runner.infer(given)["values"], np.float32)

        return array_runner(call, {})
