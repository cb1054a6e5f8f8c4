"""OpenVINO after NNCF's quantization, as openvino_int8, with the hint THROUGHPUT: streams that work side by side.

Settings: a batch is cut into pieces that an AsyncInferQueue of the optimal number of requests works off, the way its
documentation has it. Row by row and one piece per stream are tried on the first run of a shape; the faster one stays.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medcompile.bench.peer import Answer, Array, Batch, Cell, Job, Note
from medcompile.bench.peers import _openvino
from medcompile.bench.peers._runner import FunctionRunner


class OpenVinoThroughput(_openvino.NncfPeer):
    name = "openvino_throughput"
    title = "OpenVINO NNCF int8, bf16, THROUGHPUT"

    def open(self, job: Job) -> FunctionRunner:
        import openvino

        model = _openvino.compiled(job, Path(job.work) / _openvino.INT8_FILE, "THROUGHPUT", "bf16")
        queue = openvino.AsyncInferQueue(model)  # of the optimal number of requests
        names = _openvino.input_names(model)
        facts: dict[str, Note] = {"hint": "THROUGHPUT", "requests": len(queue), "quantized by": "NNCF"}
        runner = FunctionRunner(None, _openvino.facts(model, facts))
        chosen: dict[Cell, int] = {}

        def in_pieces(feeds: Mapping[str, Array], rows: int) -> Array:
            import numpy as np

            given = {name: array for name, array in feeds.items() if name in names}
            found: dict[int, Any] = {}
            queue.set_callback(lambda request, start: found.__setitem__(start, request.get_output_tensor().data.copy()))
            for start in range(0, len(next(iter(given.values()))), rows):
                queue.start_async({name: array[start : start + rows] for name, array in given.items()}, start)
            queue.wait_all()
            return np.concatenate([found[start] for start in sorted(found)])

        def run(batch: Batch) -> Answer:
            if batch.cell not in chosen:
                taken = {}
                for rows in sorted({1, -(-batch.cell.batch // len(queue))}):
                    in_pieces(batch.feeds, rows)  # compiles for the shape
                    begin = time.perf_counter_ns()
                    in_pieces(batch.feeds, rows)
                    taken[rows] = time.perf_counter_ns() - begin
                chosen[batch.cell] = min(taken, key=lambda rows: taken[rows])
                runner.notes[f"rows in a request, {batch.cell.name}"] = chosen[batch.cell]
            return Answer(in_pieces(batch.feeds, chosen[batch.cell]))

        runner.call = run
        return runner


PEER = OpenVinoThroughput()
