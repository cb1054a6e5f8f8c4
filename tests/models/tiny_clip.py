"""Tiny two-tower checkpoints with random weights, in the layouts of open_clip and of transformers, and their graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from medcompile import sources
from medcompile.models import ModelOptions, clip
from medcompile.passes.export import export
from medcompile.passes.simplify import Simplify
from medcompile.program import Context, Silent
from medcompile.run_onnx import run_onnx
from medcompile.sources import Checkpoint
from medcompile.spec import Axis, Profile
from tests.runtime import fakes

Array = np.ndarray[Any, Any]
HUB_ID = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
TEXT_CONFIG = {
    "model_type": "bert",
    "vocab_size": len(fakes.VOCABULARY),
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "hidden_act": "gelu",
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
CONTEXT = 24
MERGES = ["p a", "c h", "ch e", "che s", "ches t</w>", "t h", "th e</w>", "x -"]
END = 2 * 94 + len(MERGES) + 1
"""The id of the end of text, the highest of the byte pairs' vocabulary."""


def write_open_clip(folder: Path, hf_model_name: str = "text_config", **vision: Any) -> Path:
    """timm's test_vit beside a BERT of two layers, as BiomedCLIP's folder has them."""
    import open_clip
    from safetensors.torch import save_file

    (folder / "text_config").mkdir(parents=True)
    text = {
        "hf_model_name": hf_model_name,
        "hf_tokenizer_name": hf_model_name,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": CONTEXT,
    }
    look = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160} | vision
    config = {
        "model_cfg": {"embed_dim": 40, "vision_cfg": look, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "text_config/config.json").write_text(json.dumps(TEXT_CONFIG))
    fakes.tokenizer().save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, text_cfg=_absolute(folder, text))
    _stir(model)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def open_clip_model(folder: Path) -> Any:
    """The folder in open_clip's own class, loaded as its users load it."""
    import open_clip

    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    return open_clip.create_model(f"local-dir:{folder}", text_cfg=_absolute(folder, text)).eval()


def write_hf(folder: Path, end: int | None = None) -> Path:
    """A CLIPModel with byte pairs in vocab.json and merges.txt. end: its eos_token_id, 2 as in old configs if None."""
    import transformers

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m.split()) for m in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **shape,
            "vocab_size": len(words),
            "max_position_embeddings": CONTEXT,
            "eos_token_id": end or 2,
            "pad_token_id": 1,
            "bos_token_id": 0,
        },
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=40,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    _stir(model)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    settings = {"crop_size": 32, "size": 32, "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def hf_model(folder: Path) -> Any:
    import transformers

    return transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


def checkpoint(folder: Path) -> Checkpoint:
    return sources.resolve(f"path:{folder}")


def options(*tasks: str, resolution: tuple[int, int, int] | None = None, **keys: Any) -> ModelOptions:
    axes = [Axis("batch", 1, 2, 4), Axis("sequence", 1, 8, CONTEXT)]
    if resolution:
        axes.append(Axis("resolution", *resolution))
    return ModelOptions(tasks or ("image", "text"), (Profile("all", tuple(axes)),), **keys)


def graph(folder: Path, task: str, resolution: tuple[int, int, int] | None = None) -> ir.Model:
    """The simplified graph of one task."""
    program = export(clip.FAMILY, checkpoint(folder), options(task, resolution=resolution))
    return Simplify()(program, Context(Path(), Silent())).graphs[task].model


def run(model: ir.Model, **feeds: Array) -> Array:
    return next(run_onnx(model, iter([feeds]), ("embedding",)))["embedding"]


def pixels(batch: int, edge: int) -> Array:
    return np.random.default_rng(batch * 1000 + edge).normal(size=(batch, 3, edge, edge)).astype(np.float32)


def _absolute(folder: Path, text: dict[str, Any]) -> dict[str, Any]:
    return {**text, "hf_model_name": str((folder / "text_config").resolve()), "hf_model_pretrained": False}


def _stir(model: Any) -> None:
    """Make every weight count: fresh models have biases of 0, norms of 1 and a scale that is the default."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
