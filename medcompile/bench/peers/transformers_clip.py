"""CLIP in transformers as its users run it: image files or texts in, embeddings out. For CLIPModel checkpoints.

Settings: torch fp32, scaled_dot_product_attention, CLIPProcessor, batch size tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medcompile.bench.peer import TEXT, Answer, Job, Missing, Peer
from medcompile.bench.peers import _torch
from medcompile.bench.peers._runner import FunctionRunner, tuned_runner


class TransformersClip(Peer):
    name = "transformers_clip"
    title = "transformers CLIPModel"
    tasks = ("image", "text")
    clocks = (TEXT,)
    modules = _torch.MODULES
    engine = "torch"
    reference = True

    def missing(self, job: Job) -> Missing | None:
        found = super().missing(job)
        if found is None and _torch.is_open_clip(job):
            return Missing("the checkpoint is in open_clip's layout", fix="the contender open_clip takes it")
        return found

    def open(self, job: Job) -> FunctionRunner:
        import torch
        import transformers
        from PIL import Image

        torch.set_num_threads(job.threads)
        model = _torch.clip(job)
        processor: Any = transformers.CLIPProcessor.from_pretrained(job.source, local_files_only=True)

        def embed(items: Sequence[str]) -> Any:
            if job.task == "image":
                given = processor(images=[Image.open(path) for path in items], return_tensors="pt")
                found = model.get_image_features(**given)
            else:
                given = processor(text=list(items), padding=True, truncation=True, return_tensors="pt")
                found = model.get_text_features(**given)
            found = getattr(found, "pooler_output", found)
            return torch.nn.functional.normalize(found) if job.normalize else found

        def call(items: Sequence[str], size: int) -> Answer:
            with torch.inference_mode():
                return Answer(torch.cat([embed(items[i : i + size]) for i in range(0, len(items), size)]).numpy())

        return tuned_runner(call, {"threads": job.threads})


PEER = TransformersClip()
