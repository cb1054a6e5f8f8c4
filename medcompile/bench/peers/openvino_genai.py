"""OpenVINO GenAI in int4: optimum-cli's symmetric int4 weights in groups of 128, LLMPipeline on the CPU.

Settings: hint LATENCY, everything else by default (which is bfloat16 and a dynamic quantization group of its own choice
on this kind of CPU); greedy, the end token ignored, prompts as token ids. Groups are smaller where 128 does not divide
the model's sizes. Its converter is optimum-intel, in the same environment.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from medcompile.bench.peer import Answer, Batch, Job, Note, Peer
from medcompile.bench.peers import _decoding
from medcompile.bench.peers._runner import FunctionRunner

_INSTALL = 'pip install openvino-genai "optimum-intel[openvino]"'
_GROUP = 128
_MODULES = {"openvino_genai": _INSTALL, "optimum.intel": _INSTALL}


class OpenVinoGenai(Peer):
    name = "openvino_genai"
    title = "OpenVINO GenAI int4"
    tasks = _decoding.TASKS
    modules = _MODULES
    engine = "openvino"
    precision = "int4"
    float_precision = "bfloat16"

    def prepare(self, job: Job) -> None:
        asked = ["export", "openvino", "-m", job.source, "--task", "text-generation-with-past"]
        asked += ["--weight-format", "int4", "--sym", "--group-size", str(_group(job)), "--ratio", "1.0", job.work]
        _decoding.run_module("optimum.commands.optimum_cli", asked)

    def open(self, job: Job) -> FunctionRunner:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        pipe = genai.LLMPipeline(job.work, "CPU", **settings)

        def run(batch: Batch) -> Answer:
            ids = batch.feeds["input_ids"]
            asked = genai.GenerationConfig()
            asked.max_new_tokens, asked.ignore_eos, asked.do_sample = batch.cell.new, True, False
            given = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
            start = time.perf_counter_ns()
            found = pipe.generate(given, asked)
            elapsed = time.perf_counter_ns() - start
            first = round(found.perf_metrics.get_ttft().mean * 1e6)
            # It tells the time of no single step for batches; the mean of what is left is each one's.
            later = batch.cell.new - 1
            times = [start + first + round((elapsed - first) * i / max(later, 1)) for i in range(later + 1)]
            return _decoding.answer(np.array(found.tokens).T.tolist(), start, times)

        notes: dict[str, Note] = {
            "threads": job.threads,
            "weights": f"int4, groups of {_group(job)}",
            "hint": "LATENCY",
        }
        return FunctionRunner(run, notes)


def _group(job: Job) -> int:
    config = json.loads((Path(job.source) / "config.json").read_text(encoding="utf-8"))
    return _decoding.block_size(int(config["hidden_size"]), int(config["intermediate_size"]), _GROUP)


PEER = OpenVinoGenai()
