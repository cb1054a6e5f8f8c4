"""vLLM's offline engine, on its CPU backend, or on a GPU where its build is for one.

NOT RUN HERE: written from its documentation (LLM.generate with prompt_token_ids, SamplingParams, RequestOutput.metrics
of the V1 engine, the CPU backend's environment variables) and never tried by this project. Settings: bfloat16, greedy,
end token ignored, no prefix caching (prompts come again), at most as long a context as is asked for.
"""

from __future__ import annotations

import os
import time
from typing import Any

from medcompile.bench.peer import Answer, Batch, Job, Peer
from medcompile.bench.peers import _decoding
from medcompile.bench.peers._runner import FunctionRunner

_INSTALL = "pip install vllm (for a CPU: the +cpu wheel of its releases; it brings a torch of its own)"
_MODULES = {"vllm": _INSTALL}


class Vllm(Peer):
    name = "vllm"
    title = "vLLM bf16"
    tasks = _decoding.TASKS
    modules = _MODULES
    engine = "vllm"
    precision = "bfloat16"
    float_precision = "bfloat16"

    def open(self, job: Job) -> FunctionRunner:
        # The CPU backend takes its cores from here, not from the process; a GPU build does not look.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, job.cpus)) or "auto")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        from vllm import LLM, SamplingParams

        engine = LLM(
            job.source,
            dtype="bfloat16",
            max_model_len=_decoding.context(job),
            max_num_seqs=max(cell.batch for cell in job.cells),
            enable_prefix_caching=False,
            disable_log_stats=False,  # else it keeps no times
            skip_tokenizer_init=True,
        )

        def run(batch: Batch) -> Answer:
            asked = SamplingParams(temperature=0.0, max_tokens=batch.cell.new, ignore_eos=True, detokenize=False)
            prompts = [{"prompt_token_ids": row} for row in batch.feeds["input_ids"].tolist()]
            start = time.perf_counter_ns()
            found: list[Any] = engine.generate(prompts, asked, use_tqdm=False)
            elapsed = time.perf_counter_ns() - start
            first = round(max(one.metrics.first_token_latency for one in found) * 1e9)
            later = batch.cell.new - 1
            times = [start + first + round((elapsed - first) * i / max(later, 1)) for i in range(later + 1)]
            tokens = [list(one.outputs[0].token_ids) for one in found]
            return _decoding.answer(list(zip(*tokens, strict=True)), start, times)

        return FunctionRunner(run, {"threads": job.threads})


PEER = Vllm()
