"""CLIPModel folders of transformers, as PubMedCLIP ships them: both towers are CLIP's own transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from medcompile.errors import SourceError
from medcompile.models._layout import MASKED, ImageFacts, TextFacts, additive, edges, numbers
from medcompile.models._tokenizers import settings, tokenizer
from medcompile.sources import Checkpoint

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_CLIP_TRANSFORM = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_OLD_END = 2
"""What configs before transformers 4.31 say for the end token, whatever it is; then the highest id is the end."""


@dataclass(frozen=True)
class HfClip:
    checkpoint: Checkpoint
    template: str = "{}"
    unescape: bool = False
    prefixes: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        return int(self._config.projection_dim)

    def image(self) -> ImageFacts:
        vision = self._config.vision_config
        return ImageFacts(edges(self.checkpoint.source, vision.image_size), int(vision.patch_size))

    def text(self) -> TextFacts:
        return TextFacts(int(self._config.text_config.max_position_embeddings), self._pad_id, "eos")

    def notes(self, task: str) -> tuple[str, ...]:
        return ()

    def transform(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        from medcompile.sources.folder import read_json

        source, path = self.checkpoint.source, self.checkpoint.folder / "preprocessor_config.json"
        notes: tuple[str, ...] = ()
        if path.is_file():
            said = _CLIP_TRANSFORM | {k: v for k, v in read_json(source, path).items() if v is not None}
        else:
            said = _CLIP_TRANSFORM
            notes = ("transform: the checkpoint has no preprocessor_config.json, so it is CLIP's own",)
        size, crop = said["size"], said["crop_size"] if said.get("do_center_crop", True) else None
        mode: str = "shortest"
        if isinstance(size, dict) and "shortest_edge" in size:
            size = size["shortest_edge"]
        elif isinstance(size, dict):
            mode, size = "squash", [size.get("height"), size.get("width")]
        if isinstance(crop, dict):
            crop = [crop.get("height"), crop.get("width")]
        given = list(edges(source, crop if crop is not None else size))
        if not said.get("do_resize", True) or (mode == "shortest" and crop is None):
            raise SourceError(
                f"{source}: preprocessor_config.json gives images of many sizes",
                fix="set do_resize and do_center_crop to true in it",
            )
        if given != list(self.image().size):
            raise SourceError(
                f"{source}: preprocessor_config.json gives images of {given} pixels, the model takes "
                f"{list(self.image().size)}",
                fix="fetch preprocessor_config.json again",
            )
        normalize = said.get("do_normalize", True)
        transform = {
            "convention": "transformers",
            "size": list(edges(source, size)) if mode == "squash" else int(size),
            "mode": mode,
            "crop": given if crop is not None else None,
            "resample": _RESAMPLE.get(said.get("resample", 3), "bicubic"),
            "fill": 0,
            "rescale": float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0,
            "mean": numbers(source, "image_mean", said["image_mean"]) if normalize else [0.0] * 3,
            "std": numbers(source, "image_std", said["image_std"]) if normalize else [1.0] * 3,
        }
        return transform, notes

    def tower(self, task: str, *, resolution: bool) -> Any:
        """transformers' own layers, untrained; what lies around them is written in plain operators."""
        import torch
        from transformers.models.clip import modeling_clip

        from medcompile.models import _vit

        config, dim = self._config, self.dim

        class Image(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vision_model = modeling_clip.CLIPVisionModel(config.vision_config)
                self.visual_projection = torch.nn.Linear(config.vision_config.hidden_size, dim, bias=False)
                table = self.vision_model.embeddings
                table.patch_embedding = _vit.patches(table.patch_embedding)

            def forward(self, pixel_values: Any) -> Any:
                model = self.vision_model
                x, table = model.embeddings.patch_embedding(pixel_values), model.embeddings.position_embedding.weight
                if resolution:
                    patch, edge = config.vision_config.patch_size, round((len(table) - 1) ** 0.5)
                    rows, columns = pixel_values.shape[2] // patch, pixel_values.shape[3] // patch
                    grid = _vit.interpolated(table[1:].reshape(edge, edge, -1), rows, columns, antialias=False)
                    table = torch.cat([table[:1], grid])
                first = model.embeddings.class_embedding.expand(x.shape[0], 1, -1)
                x = model.pre_layrnorm(torch.cat([first, x], dim=1) + table)
                for layer in model.encoder.layers:
                    x = layer(x, None)
                return self.visual_projection(model.post_layernorm(x[:, 0]))

        class Text(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.text_model = modeling_clip.CLIPTextModel(config.text_config)
                self.text_projection = torch.nn.Linear(config.text_config.hidden_size, dim, bias=False)

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                model, end = self.text_model, config.text_config.eos_token_id
                place = torch.arange(input_ids.shape[1])
                later = (place[None, :] > place[:, None]).to(torch.float32) * MASKED
                table = model.embeddings
                x = table.token_embedding(input_ids) + table.position_embedding(place)[None]
                for layer in model.encoder.layers:
                    x = layer(x, additive(attention_mask) + later)
                ends = input_ids == (input_ids.amax(1, keepdim=True) if end == _OLD_END else end)
                # The first of them. Not an argmax, whose choice among equals is each backend's own.
                last = torch.where(ends, place[None], input_ids.shape[1] - 1).amin(1)
                index = last[:, None, None].expand(-1, 1, x.shape[-1])
                return self.text_projection(model.final_layer_norm(torch.gather(x, 1, index).squeeze(1)))

        tower: Any = Image() if task == "image" else Text()
        return tower.eval()

    def reference(self, task: str, *, resolution: bool) -> Any:
        """transformers' whole CLIPModel, less the tower that is not asked for."""
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model: Any = transformers.CLIPModel.from_pretrained(
            self.checkpoint.folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        model.eval()
        setattr(model, "text_model" if task == "image" else "vision_model", torch.nn.Identity())

        class Reference(torch.nn.Module):
            def forward(self, first: Any, attention_mask: Any = None) -> Any:
                if task == "image":
                    return model.get_image_features(first, interpolate_pos_encoding=resolution).pooler_output
                return model.get_text_features(first, attention_mask=attention_mask).pooler_output

        return Reference().eval()

    @cached_property
    def _config(self) -> Any:
        import torch
        import transformers

        said = self.checkpoint.config
        lost = [key for key in ("text_config", "vision_config") if not said.get(key) and not said.get(f"{key}_dict")]
        if lost:
            raise SourceError(
                f"{self.checkpoint.source}: config.json has no {' and no '.join(lost)}",
                fix="name a checkpoint of a whole CLIPModel, with both towers",
            )
        config = transformers.CLIPConfig.from_dict(dict(said))
        parts: tuple[Any, ...] = (config, config.text_config, config.vision_config)
        for part in parts:
            part._attn_implementation = "eager"
            part.dtype = torch.float32
        return config

    @cached_property
    def _pad_id(self) -> int:
        """The tokenizer's padding id: the config's is often another one. The end of text where it says none."""
        folder = self.checkpoint.folder
        made, _ = tokenizer(folder)
        special = folder / "special_tokens_map.json"
        named = json.loads(special.read_text(encoding="utf-8")) if special.is_file() else {}
        token = settings(folder).get("pad_token") or named.get("pad_token") or "<|endoftext|>"
        found = made.token_to_id(token["content"] if isinstance(token, dict) else token)
        if found is None:
            raise SourceError(
                f"{self.checkpoint.source}: the tokenizer does not know its padding token {token!r}",
                fix="fetch the tokenizer's files again",
            )
        return int(found)
