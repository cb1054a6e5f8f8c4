"""sentence-transformers on torch, in float32 also where the checkpoint is not. Other settings: _sentences.py."""

from __future__ import annotations

from medcompile.bench.peer import Job
from medcompile.bench.peers import _sentences
from medcompile.bench.peers._runner import FunctionRunner

_MODULES = {"sentence_transformers": _sentences.INSTALL}


class SentenceTransformersTorch(_sentences.SentencePeer):
    name = "sentence_transformers"
    title = "sentence-transformers"
    modules = _MODULES
    engine = "torch"

    def open(self, job: Job) -> FunctionRunner:
        return self.runner(job, self.load(job, job.source, {"dtype": "float32"}), {})


PEER = SentenceTransformersTorch()
