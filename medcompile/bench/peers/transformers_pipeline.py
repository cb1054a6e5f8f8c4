"""transformers as its users run it: text in, meanings out. The reference of the clock that starts with text.

Settings: fp32, scaled_dot_product_attention, pipeline() for entities and classes (aggregation "first": a word is what
its first token is), for embeddings the loop of tokenizer, model and mean that model cards give; batch size tuned.
"""

from __future__ import annotations

from medcompile.bench.peer import TEXT, Job, Peer
from medcompile.bench.peers import _texts, _torch
from medcompile.bench.peers._runner import FunctionRunner


class TransformersPipeline(Peer):
    name = "transformers_pipeline"
    title = "transformers pipeline"
    tasks = _texts.TASKS
    clocks = (TEXT,)
    modules = _torch.MODULES
    engine = "torch"
    reference = True

    def open(self, job: Job) -> FunctionRunner:
        import torch

        torch.set_num_threads(job.threads)
        return _texts.runner(job, _torch.bert(job), {"threads": job.threads})


PEER = TransformersPipeline()
