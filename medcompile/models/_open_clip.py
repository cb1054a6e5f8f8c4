"""open_clip folders as BiomedCLIP ships them: a timm vision transformer and a BERT text tower of transformers.

open_clip's own towers (those of plain CLIP checkpoints) are refused: transformers' layout of the same models is taken.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medcompile import sources
from medcompile.errors import SourceError
from medcompile.models._bert_config import TEXT_CONFIG, text_config
from medcompile.models._layout import ImageFacts, TextFacts, additive, edges, numbers
from medcompile.sources import Checkpoint, TensorRef

_PATCH_WEIGHT = "visual.trunk.patch_embed.proj.weight"
# The prompt that BiomedCLIP's authors use; other checkpoints say none.
_TEMPLATES = {"BiomedBERT": "this is a photo of {}", "PubMedBERT": "this is a photo of {}"}
_CLS_POOLERS = ("cls_last_hidden_state_pooler",)


@dataclass(frozen=True)
class OpenClip:
    checkpoint: Checkpoint
    prefixes: tuple[str, ...] = ("visual.", "text.transformer.", "text.")
    unescape: bool = True

    @property
    def dim(self) -> int:
        return int(self._model["embed_dim"])

    @property
    def template(self) -> str:
        name = str(self._text.get("hf_model_name", ""))
        return next((text for part, text in _TEMPLATES.items() if part in name), "{}")

    def image(self) -> ImageFacts:
        if not self._vision.get("timm_model_name"):
            raise self._foreign("image tower")
        size = edges(self.checkpoint.source, self._vision.get("image_size", 224))
        weight = self._tensors.get(_PATCH_WEIGHT)
        if weight is None or len(weight.shape) != 4:
            raise SourceError(
                f"{self.checkpoint.source}: no weight {_PATCH_WEIGHT}: "
                f"{self._vision['timm_model_name']} is not a vision transformer, or its weights are missing",
                fix="name a checkpoint whose image tower is a timm vision transformer",
            )
        return ImageFacts(size, weight.shape[2])

    def text(self) -> TextFacts:
        config, _ = self._bert
        pooler = self._text.get("hf_pooler_type")
        if pooler not in _CLS_POOLERS:
            raise SourceError(
                f"{self.checkpoint.source}: the text tower pools by {pooler}",
                fix=f"name a checkpoint with hf_pooler_type {' or '.join(_CLS_POOLERS)}",
            )
        context = min(int(self._text.get("context_length", 77)), int(config["max_position_embeddings"]))
        return TextFacts(context, int(config.get("pad_token_id") or 0), "cls")

    def notes(self, task: str) -> tuple[str, ...]:
        return self._bert[1] if task == "text" else ()

    def transform(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        source, said = self.checkpoint.source, self.checkpoint.config.get("preprocess_cfg") or {}
        size = list(self.image().size)
        mode = said.get("resize_mode") or "shortest"
        if mode != "squash" and size[0] != size[1]:
            raise SourceError(
                f"{source}: images of {size} pixels, resized by their {mode} edge", fix='use resize_mode "squash"'
            )
        defaults = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
        transform = {
            "convention": "open_clip",
            "size": size if mode == "squash" else size[0],
            "mode": mode,
            "crop": None if mode == "squash" else size,
            "resample": said.get("interpolation") or "bicubic",
            "fill": int(said.get("fill_color") or 0),
            "rescale": 1 / 255,
        }
        for key, default in defaults.items():
            transform[key] = numbers(source, key, said.get(key) or default)
        notes = () if said.get("mean") else ("transform: the checkpoint gives no mean and std, so they are CLIP's own",)
        return transform, notes

    def tower(self, task: str, *, resolution: bool) -> Any:
        """open_clip's own modules, but for attention, patches and positions, which are written in plain operators."""
        import torch

        from medcompile.models import _vit

        if task == "text":
            text = self._text_tower()
        else:
            visual = self._visual()
            interpolate = resolution or tuple(visual.trunk.patch_embed.img_size) != self.image().size

        class Image(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.visual: Any = visual

            def forward(self, pixel_values: Any) -> Any:
                trunk = self.visual.trunk
                x = trunk.norm_pre(_vit.embedded(trunk, pixel_values, interpolate=interpolate))
                for block in trunk.blocks:
                    x = block(x)
                return self.visual.head(trunk.forward_head(trunk.norm(x)))

        class Text(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.text: Any = text

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                hidden = self.text.transformer(
                    input_ids=input_ids,
                    attention_mask=additive(attention_mask),
                    position_ids=torch.arange(input_ids.shape[1])[None],
                    token_type_ids=torch.zeros((1, 1), dtype=torch.int64),
                ).last_hidden_state
                return self.text.proj(hidden[:, 0])

        return (Image() if task == "image" else Text()).eval()

    def reference(self, task: str, *, resolution: bool) -> Any:
        """open_clip's whole model, less the tower that is not asked for."""
        import logging

        import open_clip
        import torch

        self.image(), self.text()
        level = logging.getLogger().level
        with self._text_config() as folder:
            text = {**self._text, "hf_model_name": str(folder), "hf_model_pretrained": False}
            model = open_clip.create_model(
                f"local-dir:{self.checkpoint.folder}", text_cfg=text, precision="fp32", output_dict=False
            ).eval()
        logging.getLogger().setLevel(level)
        setattr(model, "text" if task == "image" else "visual", torch.nn.Identity())
        if resolution:
            _any_size(model.visual.trunk)
        pad = self.text().pad_id

        class Reference(torch.nn.Module):
            def forward(self, first: Any, attention_mask: Any = None) -> Any:
                if task == "image":
                    return model.encode_image(first)
                # open_clip takes its mask from the ids themselves.
                return model.encode_text(torch.where(attention_mask.bool(), first, pad))

        return Reference().eval()

    # ---- config

    @property
    def _model(self) -> Mapping[str, Any]:
        model = self.checkpoint.config.get("model_cfg")
        if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
            raise SourceError(
                f"{self.checkpoint.source}: open_clip_config.json has no model_cfg with embed_dim, vision_cfg and "
                "text_cfg",
                fix="fetch open_clip_config.json again",
            )
        return model

    @property
    def _vision(self) -> dict[str, Any]:
        return dict(self._model["vision_cfg"])

    @property
    def _text(self) -> dict[str, Any]:
        return dict(self._model["text_cfg"])

    @cached_property
    def _tensors(self) -> Mapping[str, TensorRef]:
        return sources.tensors(self.checkpoint)

    def _foreign(self, tower: str) -> SourceError:
        return SourceError(
            f"{self.checkpoint.source}: its {tower} is open_clip's own, which this compiler does not know",
            fix="take the same model in transformers' layout (a CLIPModel with config.json), or one with a timm vision "
            "transformer and a BERT text tower",
        )

    @cached_property
    def _bert(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The text tower's BERT config, and what was assumed in it."""
        name = self._text.get("hf_model_name")
        if not name:
            raise self._foreign("text tower")
        return text_config(self.checkpoint, str(name))

    @contextmanager
    def _text_config(self) -> Iterator[Path]:
        """A folder with the text tower's config.json, which open_clip wants as a path."""
        path = self.checkpoint.folder / TEXT_CONFIG
        if path.is_file():
            yield path.parent.resolve()
            return
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(self._bert[0]), encoding="utf-8")
            yield Path(folder)

    # ---- towers

    def _visual(self) -> Any:
        """open_clip's TimmModel, untrained."""
        from open_clip.model import _build_vision_tower
        from timm.layers.attention import Attention
        from timm.models.vision_transformer import VisionTransformer

        from medcompile.models import _vit

        facts = self.image()
        visual = _build_vision_tower(self.dim, {**self._vision, "timm_model_pretrained": False})
        trunk = visual.trunk
        if type(trunk) is not VisionTransformer or not _vit.is_patch_embedding(trunk.patch_embed.proj):
            raise SourceError(
                f"{self.checkpoint.source}: {self._vision['timm_model_name']} is no plain vision transformer",
                fix="name a checkpoint whose image tower is a timm vision transformer",
            )
        own = tuple(trunk.patch_embed.img_size)
        if own != facts.size and not trunk.dynamic_img_size:
            raise SourceError(
                f"{self.checkpoint.source}: image_size {list(facts.size)} in open_clip_config.json, but "
                f"{self._vision['timm_model_name']} takes {list(own)} pixels",
                fix="correct image_size; other sizes go through shapes.resolution",
            )
        trunk.patch_embed.proj = _vit.patches(trunk.patch_embed.proj)
        for block in trunk.blocks:
            attention: Any = block.attn
            if (
                type(attention) is Attention
                and attention.gate is None
                and not any(
                    p for part in (attention.q_norm, attention.k_norm, attention.norm) for p in part.parameters()
                )
            ):
                block.attn = _vit.attention(attention)
            else:
                attention.fused_attn = False
        return visual

    def _text_tower(self) -> Any:
        """open_clip's HFTextEncoder, untrained, with plain attention and without BERT's own pooler."""
        import transformers
        from open_clip.hf_model import HFTextEncoder

        self.text()
        config = transformers.BertConfig.from_dict(self._bert[0])
        config._attn_implementation = "eager"
        encoder = HFTextEncoder(
            "bert",
            self.dim,
            config=config,
            pooler_type=self._text.get("hf_pooler_type"),
            proj_type=self._text.get("hf_proj_type"),
            pretrained=False,
        )
        encoder.transformer.pooler = None
        return encoder


def _any_size(trunk: Any) -> None:
    """Let a built timm trunk take any size, as its dynamic_img_size argument would have."""
    from timm.layers.format import Format

    trunk.dynamic_img_size = True
    embed = trunk.patch_embed
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
