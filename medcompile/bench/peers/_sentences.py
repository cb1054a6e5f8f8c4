"""sentence-transformers on one of its backends: SentenceTransformer.encode(), which sorts texts by length by itself.

Settings: batch size tuned; a checkpoint without modules.json gets a pooling layer as job.pooling has it; texts may be
as long as job.max_length allows everybody, which the checkpoint's own limit may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medcompile.bench.peer import TEXT, Answer, Job, Note, Peer
from medcompile.bench.peers._runner import FunctionRunner, tuned_runner

INSTALL = "pip install sentence-transformers"


class SentencePeer(Peer):
    """backend: by the library's name."""

    tasks = ("embed",)
    clocks = (TEXT,)
    backend = "torch"

    def load(self, job: Job, folder: str, settings: Mapping[str, Any]) -> Any:
        """The model in folder: the checkpoint, or what save_pretrained() left."""
        import torch
        from sentence_transformers import SentenceTransformer, models

        torch.set_num_threads(job.threads)
        backend: Any = self.backend
        if (Path(folder) / "modules.json").is_file():
            found = SentenceTransformer(
                folder, backend=backend, device="cpu", local_files_only=True, model_kwargs=dict(settings)
            )
        else:
            words = models.Transformer(folder, backend=backend, model_kwargs={"local_files_only": True, **settings})
            pooling = models.Pooling(words.get_word_embedding_dimension(), pooling_mode=job.pooling)
            found = SentenceTransformer(modules=[words, pooling], device="cpu", backend=backend)
        found.max_seq_length = job.max_length
        return found

    def runner(self, job: Job, model: Any, notes: Mapping[str, Note]) -> FunctionRunner:
        def call(items: Sequence[str], size: int) -> Answer:
            return Answer(
                model.encode(list(items), batch_size=size, normalize_embeddings=job.normalize, show_progress_bar=False)
            )

        return tuned_runner(call, {"threads": job.threads, **notes})
