"""open_clip as its users run it: image files or texts in, embeddings out. For checkpoints in its own layout.

Settings: torch fp32 eager, its own transform of images and its own tokenizer, batch size tuned. Files are read and
resized before each batch, as its examples do, in one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medcompile.bench.peer import TEXT, Answer, Job, Missing, Peer
from medcompile.bench.peers import _torch
from medcompile.bench.peers._runner import FunctionRunner, tuned_runner

_MODULES = {"open_clip": _torch.INSTALL, "torch": _torch.INSTALL}


class OpenClip(Peer):
    name = "open_clip"
    title = "open_clip"
    tasks = ("image", "text")
    clocks = (TEXT,)
    modules = _MODULES
    engine = "torch"
    reference = True

    def missing(self, job: Job) -> Missing | None:
        found = super().missing(job)
        if found is None and not _torch.is_open_clip(job):
            return Missing(
                "the checkpoint is not in open_clip's layout", fix="the contender transformers_clip takes it"
            )
        return found

    def open(self, job: Job) -> FunctionRunner:
        import open_clip
        import torch
        from PIL import Image

        torch.set_num_threads(job.threads)
        model, transform = _torch.open_clip_model(job)
        tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{Path(job.source).resolve()}")

        def embed(items: Sequence[str]) -> Any:
            if job.task == "image":
                pixels = torch.stack([transform(Image.open(path)) for path in items])
                return model.encode_image(pixels, normalize=job.normalize)
            return model.encode_text(tokenizer(list(items)), normalize=job.normalize)

        def call(items: Sequence[str], size: int) -> Answer:
            with torch.inference_mode():
                return Answer(torch.cat([embed(items[i : i + size]) for i in range(0, len(items), size)]).numpy())

        return tuned_runner(call, {"threads": job.threads})


PEER = OpenClip()
