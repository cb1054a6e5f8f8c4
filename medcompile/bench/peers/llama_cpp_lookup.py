"""llama.cpp's speculation by prompt lookup, as llama-cpp-python has it: LlamaPromptLookupDecoding over Q4_0.

Settings: 2 guessed tokens, as its documentation advises for a CPU; greedy. It runs one sequence at a time.
"""

from __future__ import annotations

import time
from pathlib import Path

from medcompile.bench.peer import Answer, Batch, Job, Peer
from medcompile.bench.peers import _decoding, llama_cpp
from medcompile.bench.peers._runner import FunctionRunner

_GUESSED = 2


class LlamaCppLookup(Peer):
    name = "llama_cpp_lookup"
    title = "llama.cpp q4_0, prompt lookup"
    tasks = _decoding.TASKS
    modules = llama_cpp.MODULES
    engine = "llama.cpp"
    precision = "int4"

    def prepare(self, job: Job) -> None:
        llama_cpp.quantize(job, "q4_0")

    def open(self, job: Job) -> FunctionRunner:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        model = Llama(
            str(Path(job.work) / llama_cpp.FILE),
            n_ctx=_decoding.context(job) + 16,  # room for guesses past the end
            n_threads=job.threads,
            n_threads_batch=job.threads,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=_GUESSED),
            verbose=False,
        )

        def run(batch: Batch) -> Answer:
            prompts = batch.feeds["input_ids"].tolist()
            if len(prompts) > 1:
                raise ValueError("it runs one sequence at a time")
            start = time.perf_counter_ns()
            model.reset()  # forget the last prompt, which would be reused
            found = model.generate(prompts[0], temp=0.0, top_k=1, repeat_penalty=1.0)
            return _decoding.timed(start, ([token] for _, token in zip(range(batch.cell.new), found, strict=False)))

        return FunctionRunner(run, {"threads": job.threads, "guessed": _GUESSED})


PEER = LlamaCppLookup()
