"""The checkpoint in torch, behind the face that graphs have: what torch's contenders run and others export.

Models are the checkpoint's own classes of transformers and open_clip; only the last lines (pooling, the masked place)
are ours, so that every contender answers the same question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medcompile.bench.peer import Array, Job, Note
from medcompile.bench.peers._runner import FunctionRunner, array_runner

INSTALL = 'pip install "medcompile[build]"'
MODULES = {"torch": INSTALL, "transformers": INSTALL}
BERT_TASKS = ("embed", "token-classification", "sequence-classification", "fill-mask")
TASKS = (*BERT_TASKS, "image", "text")
_INPUTS = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
_BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_CLASSES = {
    "embed": "BertModel",
    "token-classification": "BertForTokenClassification",
    "sequence-classification": "BertForSequenceClassification",
    "fill-mask": "BertForMaskedLM",
}


def inputs(job: Job) -> tuple[str, ...]:
    """Names of the graph's inputs, in the order that load()'s module takes them."""
    return _INPUTS.get(job.task, _BERT_INPUTS + (("mask_position",) if job.task == "fill-mask" else ()))


def is_open_clip(job: Job) -> bool:
    return bool(job.source) and (Path(job.source) / "open_clip_config.json").is_file()


def load(job: Job, attention: str = "sdpa") -> Any:
    """A torch module in fp32 that takes the tensors of inputs() and returns the graph's one output.

    attention: transformers' implementation; sdpa, its default, is the fastest on a CPU.
    """
    import torch

    torch.set_num_threads(job.threads)
    if job.family == "clip":
        return _tower(job, attention)
    model = bert(job, attention)
    task, pooling = job.task, job.pooling

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any, mask_position: Any = None) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            if task.endswith("classification"):
                return self.model(**given).logits
            if task == "embed":
                return pooled(self.model(**given).last_hidden_state, attention_mask, pooling)
            # Only the masked place goes through the head, as in the compiled graph.
            hidden = self.model.bert(**given).last_hidden_state
            index = mask_position[:, None, None].expand(-1, 1, hidden.shape[-1])
            return self.model.cls(hidden.gather(1, index).squeeze(1))

    return Encoder().eval()


def pooled(hidden: Any, attention_mask: Any, pooling: str) -> Any:
    """hidden [batch, sequence, width] -> [batch, width]; torch tensors or numpy arrays."""
    if pooling == "cls":
        return hidden[:, 0]
    real = attention_mask[:, :, None]
    return (hidden * real).sum(1) / real.sum(1)


def bert(job: Job, attention: str = "sdpa") -> Any:
    """The transformers model of a BERT task."""
    import torch

    transformers = quiet_transformers()
    extra = {"add_pooling_layer": False} if job.task == "embed" else {}
    return (
        getattr(transformers, _CLASSES[job.task])
        .from_pretrained(job.source, dtype=torch.float32, attn_implementation=attention, local_files_only=True, **extra)
        .eval()
    )


def clip(job: Job, attention: str = "sdpa") -> Any:
    """transformers' CLIPModel, whole."""
    import torch

    transformers = quiet_transformers()
    return transformers.CLIPModel.from_pretrained(
        job.source, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    ).eval()


def open_clip_model(job: Job) -> tuple[Any, Any]:
    """open_clip's model, whole, and its transform of images."""
    import open_clip

    folder = Path(job.source).resolve()
    settings: dict[str, Any] = {}
    if (folder / "text_config" / "config.json").is_file():  # open_clip would look for it in the working directory
        text = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
        settings["text_cfg"] = text | {"hf_model_name": str(folder / "text_config"), "hf_model_pretrained": False}
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}", **settings)
    return model.eval(), transform


def _tower(job: Job, attention: str) -> Any:
    import torch

    opened = is_open_clip(job)
    model = open_clip_model(job)[0] if opened else clip(job, attention)
    image = job.task == "image"
    unused = ("text", "visual") if opened else ("text_model", "vision_model")
    setattr(model, unused[0] if image else unused[1], torch.nn.Identity())

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, first: Any, attention_mask: Any = None) -> Any:
            if opened and image:
                return self.model.encode_image(first)
            if opened:  # which takes its mask from the ids themselves
                pad = self.model.text.config.pad_token_id
                return self.model.encode_text(torch.where(attention_mask.bool(), first, pad))
            result = (
                self.model.get_image_features(first)
                if image
                else self.model.get_text_features(first, attention_mask=attention_mask)
            )
            return getattr(result, "pooler_output", result)  # transformers before 5 gave the tensor itself

    return Tower().eval()


def runner(job: Job, module: Any, notes: Mapping[str, Note], dtype: str = "float32") -> FunctionRunner:
    """Runs load()'s module, or what was made of it. dtype: of images, as the module wants them."""
    import torch

    names = inputs(job)

    def call(feeds: Mapping[str, Array]) -> Array:
        with torch.inference_mode():
            tensors = [torch.from_numpy(feeds[name]) for name in names]
            if job.task == "image":
                tensors[0] = tensors[0].to(getattr(torch, dtype))
            result: Array = module(*tensors).float().numpy()
        return result

    return array_runner(call, {"threads": torch.get_num_threads(), **notes})


def quiet_transformers() -> Any:
    """transformers, which then draws no progress bars and gives no advice."""
    import transformers

    module: Any = transformers
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module
