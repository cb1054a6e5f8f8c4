"""onnxruntime-genai in int4: its model builder's defaults for a CPU with accuracy level 4, blocks of 32.

Settings: greedy, the cache shared between steps, the prompt appended as token ids. It can't be told to go on after the
end token, so that is said to be the vocabulary's last one, the rarest, which min_length then forbids. Its builder needs
torch and transformers beside it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from medcompile.bench.peer import Answer, Batch, Job, Note, Peer
from medcompile.bench.peers import _decoding
from medcompile.bench.peers._runner import FunctionRunner

_INSTALL = "pip install onnxruntime-genai onnx-ir torch transformers"
_MODULES = {"onnxruntime_genai": _INSTALL, "torch": _INSTALL, "transformers": _INSTALL, "onnx_ir": _INSTALL}


class OnnxRuntimeGenai(Peer):
    name = "onnxruntime_genai"
    title = "onnxruntime-genai int4"
    tasks = _decoding.TASKS
    modules = _MODULES
    engine = "onnxruntime"
    precision = "int4"

    def prepare(self, job: Job) -> None:
        work = Path(job.work)
        asked = ["-i", job.source, "-o", job.work, "-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
        asked += ["--extra_options", "int4_accuracy_level=4"]
        _decoding.run_module("onnxruntime_genai.models.builder", asked)
        shutil.rmtree(work / "cache", ignore_errors=True)

    def open(self, job: Job) -> FunctionRunner:
        import numpy as np
        import onnxruntime_genai as og

        settings = Path(job.work) / "genai_config.json"
        config = json.loads(settings.read_text(encoding="utf-8"))
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = job.threads
        config["model"]["eos_token_id"] = config["model"]["vocab_size"] - 1
        config["search"]["past_present_share_buffer"] = True
        settings.write_text(json.dumps(config, indent=1), encoding="utf-8")
        model = og.Model(job.work)

        def run(batch: Batch) -> Answer:
            ids = batch.feeds["input_ids"].astype(np.int32)
            start = time.perf_counter_ns()
            asked = og.GeneratorParams(model)
            length = ids.shape[1] + batch.cell.new
            asked.set_search_options(max_length=length, min_length=length, batch_size=len(ids), do_sample=False)
            generator = og.Generator(model, asked)

            def steps() -> Iterator[list[int]]:
                generator.append_tokens(ids if len(ids) > 1 else ids[0])
                for _ in range(batch.cell.new):
                    generator.generate_next_token()
                    yield generator.get_next_tokens().tolist()

            return _decoding.timed(start, steps())

        notes: dict[str, Note] = {"threads": job.threads, "weights": "int4, blocks of 32, accuracy level 4"}
        return FunctionRunner(run, notes)


PEER = OnnxRuntimeGenai()
