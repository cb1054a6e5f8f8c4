"""From texts to meanings with transformers' tools: its pipelines, and the loop that model cards give for embeddings.

Around any model with transformers' face: torch's own, or Optimum's. Batch sizes are tuned (_runner.py); nothing is
sorted by length, because these tools don't. Texts longer than the model are cut, or for entities read in overlapping
windows (the pipeline's stride).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medcompile.bench.peer import Answer, Array, Job, Note
from medcompile.bench.peers import _torch
from medcompile.bench.peers._runner import FunctionRunner, Texts, normalized, tuned_runner

TASKS = ("embed", "token-classification", "sequence-classification")
_PIPELINES = {"token-classification": "token-classification", "sequence-classification": "text-classification"}


def runner(job: Job, model: Any, notes: Mapping[str, Note]) -> FunctionRunner:
    """model: of transformers' face, in eval mode, for job.task."""
    transformers = _torch.quiet_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.source, local_files_only=True)
    tokenizer.model_max_length = job.max_length
    if job.labels:
        model.config.id2label = dict(enumerate(job.labels))
        model.config.label2id = {label: i for i, label in enumerate(job.labels)}
    if job.task == "embed":
        return tuned_runner(_embedder(job, model, tokenizer), notes)
    pipe = transformers.pipeline(_PIPELINES[job.task], model=model, tokenizer=tokenizer, device="cpu")
    call = _entities(job, pipe) if job.task == "token-classification" else _classes(job, pipe, model)
    return tuned_runner(call, notes)


def _embedder(job: Job, model: Any, tokenizer: Any) -> Texts:
    import numpy as np
    import torch

    def call(items: Sequence[str], size: int) -> Answer:
        rows = []
        for start in range(0, len(items), size):
            given = tokenizer(list(items[start : start + size]), padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**given).last_hidden_state
                rows.append(_torch.pooled(hidden, given["attention_mask"], job.pooling).numpy())
        found = np.concatenate(rows)
        return Answer(normalized(found) if job.normalize else found)

    return call


def _entities(job: Job, pipe: Any) -> Texts:
    stride = job.max_length // 4

    def call(items: Sequence[str], size: int) -> Answer:
        found = pipe(list(items), batch_size=size, aggregation_strategy="first", stride=stride)
        spans = tuple(
            tuple((int(e["start"]), int(e["end"]), str(e["entity_group"])) for e in entities) for entities in found
        )
        return Answer(spans=spans)

    return call


def _classes(job: Job, pipe: Any, model: Any) -> Texts:
    import numpy as np

    order = {str(label): int(i) for i, label in model.config.id2label.items()}

    def call(items: Sequence[str], size: int) -> Answer:
        values: Array = np.zeros((len(items), len(order)), np.float32)
        for row, scores in zip(values, pipe(list(items), batch_size=size, top_k=None, truncation=True), strict=True):
            for score in scores:
                row[order[score["label"]]] = score["score"]
        return Answer(values)

    return call
