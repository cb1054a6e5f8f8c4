"""transformers' generate() in float32: the reference of decoders.

Settings: greedy, its own cache, scaled_dot_product_attention; the end token means nothing, so that every contender
generates as many tokens. Times are those at which generate() hands a token to its streamer.
"""

from __future__ import annotations

import time
from typing import Any

from medcompile.bench.peer import Answer, Batch, Job, Peer
from medcompile.bench.peers import _decoding, _torch
from medcompile.bench.peers._runner import FunctionRunner


class TransformersGenerate(Peer):
    name = "transformers_generate"
    title = "transformers generate fp32"
    tasks = _decoding.TASKS
    modules = _torch.MODULES
    engine = "torch"
    reference = True

    def open(self, job: Job) -> FunctionRunner:
        import torch

        transformers = _torch.quiet_transformers()
        torch.set_num_threads(job.threads)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            job.source, dtype=getattr(torch, self.precision), local_files_only=True
        ).eval()
        model.generation_config.eos_token_id = None  # else it stands in for what is left open below
        asked = transformers.GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)

        class Clock:
            """What generate() calls a streamer: told the prompt, then the next token of every row."""

            def __init__(self) -> None:
                self.times: list[int] = []

            def put(self, tokens: Any) -> None:
                self.times.append(time.perf_counter_ns())

            def end(self) -> None:
                return

        def run(batch: Batch) -> Answer:
            ids = torch.from_numpy(batch.feeds["input_ids"])
            clock = Clock()
            start = time.perf_counter_ns()
            with torch.inference_mode():
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=asked,
                    max_new_tokens=batch.cell.new,
                    streamer=clock,
                )
            return _decoding.answer(made[:, ids.shape[1] :].T.tolist(), start, clock.times[1:])

        return FunctionRunner(run, {"threads": job.threads})


PEER = TransformersGenerate()
