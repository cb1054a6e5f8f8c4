"""llama.cpp through llama-cpp-python: Q4_0 and Q4_K_M.

Settings: Q4_0 of every matrix (for which it has its fastest CPU kernels), Q4_K_M as it mixes it, both made here from
the checkpoint; its C interface, all rows of a batch in one llama_decode; greedy.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medcompile.bench.peer import Answer, Array, Batch, Job, Note, Peer
from medcompile.bench.peers import _decoding, _gguf
from medcompile.bench.peers._runner import FunctionRunner

_FILE_TYPES = {"q4_0": 2, "q4_k_m": 15}
FILE = "model.gguf"
_MICRO_BATCH = 512
MODULES = {
    "llama_cpp": 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python (compiles)',
    "gguf": "pip install gguf",
}


class LlamaCpp(Peer):
    name = "llama_cpp"
    title = "llama.cpp"
    tasks = _decoding.TASKS
    modules = MODULES
    engine = "llama.cpp"
    precision = "int4"

    def options(self, job: Job) -> tuple[str, ...]:
        return tuple(_FILE_TYPES)

    def prepare(self, job: Job) -> None:
        quantize(job, job.option)

    def open(self, job: Job) -> FunctionRunner:
        notes: dict[str, Note] = {"threads": job.threads, "weights": job.option}
        return FunctionRunner(_batched(job, Path(job.work) / FILE), notes)


def quantize(job: Job, kind: str) -> None:
    """Write the checkpoint to job.work as a GGUF file of that kind."""
    import llama_cpp as c

    work = Path(job.work)
    _gguf.write(Path(job.source), work / "source.gguf")
    settings = c.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.pure = _FILE_TYPES[kind], job.threads, kind == "q4_0"
    source, out = (str(work / name).encode() for name in ("source.gguf", FILE))
    if failed := c.llama_model_quantize(source, out, ctypes.byref(settings)):
        raise RuntimeError(f"llama_model_quantize returned {failed}; what it printed says why")
    (work / "source.gguf").unlink()


def _batched(job: Job, path: Path) -> Any:
    import llama_cpp as c
    import numpy as np

    c.llama_backend_init()
    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    words = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    contexts: dict[int, Any] = {}

    def context(batch: int) -> Any:
        if batch not in contexts:
            s = c.llama_context_default_params()
            row = -(-_decoding.context(job) // 256) * 256
            s.n_ctx, s.n_batch, s.n_ubatch, s.n_seq_max = batch * row, batch * row, _MICRO_BATCH, batch
            s.n_threads = s.n_threads_batch = job.threads
            contexts[batch] = c.llama_init_from_model(model, s)
        return contexts[batch]

    def run(batch: Batch) -> Answer:
        prompts: Array = batch.feeds["input_ids"]
        held = context(len(prompts))
        tokens = c.llama_batch_init(prompts.size, 0, 1)

        def decode(rows: Array, position: int) -> Array:
            n = 0
            for sequence, row in enumerate(rows.tolist()):
                for i, token in enumerate(row):
                    tokens.token[n], tokens.pos[n], tokens.n_seq_id[n] = token, position + i, 1
                    tokens.seq_id[n][0], tokens.logits[n] = sequence, i == len(row) - 1
                    n += 1
            tokens.n_tokens = n
            if failed := c.llama_decode(held, tokens):
                raise RuntimeError(f"llama_decode returned {failed}")
            ends = range(rows.shape[1] - 1, n, rows.shape[1])
            logits = (np.ctypeslib.as_array(c.llama_get_logits_ith(held, end), (words,)) for end in ends)
            return np.array([row.argmax() for row in logits])

        def steps() -> Iterator[list[int]]:
            chosen = decode(prompts, 0)
            yield chosen.tolist()
            for i in range(batch.cell.new - 1):
                chosen = decode(chosen[:, None], prompts.shape[1] + i)
                yield chosen.tolist()

        start = time.perf_counter_ns()
        c.llama_memory_clear(c.llama_get_memory(held), True)
        try:
            return _decoding.timed(start, steps())
        finally:
            c.llama_batch_free(tokens)

    return run


PEER = LlamaCpp()
