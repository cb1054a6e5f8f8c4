"""The clip family: BiomedCLIP, PubMedCLIP and other pairs of an image and a text tower, in one space.

Two tasks, one graph each, that can be built and loaded apart. Neither normalizes: the runtime does, and multiplies
by the checkpoint's scale. Checkpoints come in two layouts: _open_clip.py and _clip_hf.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile import sources
from medcompile.errors import ProfileError, SourceError, UsageError
from medcompile.models import ModelOptions, Traced
from medcompile.models._clip_hf import HfClip
from medcompile.models._files import write_json
from medcompile.models._layout import ImageFacts, Layout, match, scalar
from medcompile.models._open_clip import OpenClip
from medcompile.models._tokenizers import tokenizer
from medcompile.models._torch import TorchExecutor
from medcompile.spec import Dim, GraphSpec, Profile, TensorSpec

if TYPE_CHECKING:
    from medcompile.backends import Executor
    from medcompile.sources import Checkpoint


@dataclass(frozen=True)
class Clip:
    name: str = "clip"
    tasks: tuple[str, ...] = ("image", "text")

    def graph_spec(self, checkpoint: Checkpoint, task: str, options: ModelOptions) -> GraphSpec:
        """image: pixels of one size, or of any that a profile's axis resolution allows. text: ids and their mask."""
        return _spec(_layout(checkpoint), task, options)

    def trace(self, checkpoint: Checkpoint, tensors: Mapping[str, Any], task: str, options: ModelOptions) -> Traced:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        layout = _layout(checkpoint)
        spec = _spec(layout, task, options)
        with torch.device("meta"):  # timm looks into a tensor while it builds, which no fake one allows
            tower = layout.tower(task, resolution=_varies(spec))
        with FakeTensorMode(allow_non_fake_inputs=True):
            tower.to_empty(device="cpu")
            parameters = match(dict(tower.named_parameters()), tensors, task)
            # Sizes of 0 and 1 are specialized by torch.export, so the example has others.
            dims: dict[Dim, Any] = {"batch": torch.export.Dim("batch", min=1, max=65536)}
            sizes: dict[Dim, int] = {"batch": 2, "sequence": 16}
            if task == "text":
                dims["sequence"] = torch.export.Dim("sequence", min=2)
            elif _varies(spec):
                patch = layout.image().patch
                dims["resolution"] = patch * torch.export.Dim("grid", min=2, max=4096)
                sizes["resolution"] = patch * 3
            shapes = tuple({i: dims[d] for i, d in enumerate(t.shape) if d in dims} for t in spec.inputs)
            example = tuple(
                torch.zeros([d if isinstance(d, int) else sizes[d] for d in t.shape], dtype=getattr(torch, t.dtype))
                for t in spec.inputs
            )
            exported = torch.export.export(tower, example, dynamic_shapes=shapes)
        return Traced(exported, parameters, layout.prefixes)

    def adapt(self, model: Any, checkpoint: Checkpoint, task: str, options: ModelOptions) -> None:
        raise SourceError(
            f"{checkpoint.source}: an exported model.onnx of two towers is not taken",
            fix="name the checkpoint itself, with its .safetensors or .bin weights",
        )

    def assets(self, checkpoint: Checkpoint, options: ModelOptions, out: Path) -> tuple[str, ...]:
        layout = _layout(checkpoint)
        notes: tuple[str, ...] = ()
        if "text" in options.tasks:
            facts, profiles = layout.text(), _spec(layout, "text", options).profiles
            made, notes = tokenizer(checkpoint.folder)
            made.save(str(out / "tokenizer.json"))
            limit = min(facts.context, max(p.axis("sequence").max for p in profiles))
            text = {
                "max_length": min(limit, options.max_length or limit),
                "pooling": facts.pooling,
                "normalize": True,
                "pad_id": facts.pad_id,
                "mask_token": None,
                "has_token_types": False,
                "multi_label": False,
            }
            write_json(out / "text.json", text)
        if "image" in options.tasks:
            transform, more = layout.transform()
            write_json(out / "transform.json", transform)
            notes += more
        tensors = sources.tensors(checkpoint)
        templates = options.templates or (layout.template,)
        if any(t.count("{}") != 1 for t in templates):
            raise UsageError("model.templates are texts with one {} each", fix='for example ["an X-ray of {}"]')
        towers = {
            "logit_scale": float(np.exp(scalar(tensors, "logit_scale"))),
            "logit_bias": float(scalar(tensors, "logit_bias")) if "logit_bias" in tensors else 0.0,
            "templates": list(templates),
            "unescape": layout.unescape,
        }
        write_json(out / "towers.json", towers)
        return notes + tuple(note for task in options.tasks for note in layout.notes(task))

    def reference(self, checkpoint: Checkpoint, task: str, options: ModelOptions) -> Executor:
        layout = _layout(checkpoint)
        spec = _spec(layout, task, options)
        return TorchExecutor(spec, layout.reference(task, resolution=_varies(spec)))


def _layout(checkpoint: Checkpoint) -> Layout:
    if checkpoint.kind == "onnx":
        FAMILY.adapt(None, checkpoint, "", ModelOptions((), ()))
    if "model_cfg" in checkpoint.config:
        return OpenClip(checkpoint)
    kind = checkpoint.config.get("model_type")
    if kind == "clip":
        return HfClip(checkpoint)
    raise SourceError(
        f"{checkpoint.source}: {'a ' + str(kind) + ' model' if kind else 'neither open_clip_config.json nor a CLIP'}",
        fix="the family clip takes open_clip folders, and CLIPModel checkpoints of transformers, both towers in one",
    )


def _spec(layout: Layout, task: str, options: ModelOptions) -> GraphSpec:
    embedding = TensorSpec("embedding", "float32", ("batch", layout.dim))
    if task == "text":
        facts = layout.text()
        ids = tuple(TensorSpec(n, "int64", ("batch", "sequence")) for n in ("input_ids", "attention_mask"))
        for profile in options.profiles:
            if profile.axis("sequence").max > facts.context:
                raise ProfileError(
                    f"profile {profile.name}: sequence up to {profile.axis('sequence').max} tokens, "
                    f"but the model's context is {facts.context}",
                    fix=f"set shapes.sequence's max to {facts.context} or less; longer texts are cut there",
                )
        return GraphSpec(task, ids, (embedding,), _covering(options.profiles, ("batch", "sequence")))
    image = layout.image()
    axes: tuple[str, ...] = ("batch",)
    size: tuple[Dim, Dim] = image.size
    if any(axis.name == "resolution" for p in options.profiles for axis in p.axes):
        _check_resolution(image, options.profiles)
        axes, size = ("batch", "resolution"), ("resolution", "resolution")
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, *size))
    return GraphSpec(task, (pixels,), (embedding,), _covering(options.profiles, axes))


def _check_resolution(image: ImageFacts, profiles: tuple[Profile, ...]) -> None:
    if image.size[0] != image.size[1]:
        raise ProfileError(
            f"the model's images are {image.size[0]} x {image.size[1]}; other resolutions are for square ones",
            fix="leave resolution out of shapes",
        )
    for profile in profiles:
        axis = profile.axis("resolution")
        wrong = [edge for edge in (axis.min, axis.opt, axis.max) if edge % image.patch or edge < 2 * image.patch]
        if wrong:
            raise ProfileError(
                f"profile {profile.name}: resolution {wrong[0]} is not a multiple of the model's patch of "
                f"{image.patch} pixels, two patches at least",
                fix=f"round the values of shapes.resolution to multiples of {image.patch} from {2 * image.patch} on",
            )


def _covering(profiles: tuple[Profile, ...], axes: tuple[str, ...]) -> tuple[Profile, ...]:
    """The profiles with these axes alone, those that are equal then but once."""
    cut = [dataclasses.replace(p, axes=tuple(p.axis(name) for name in axes)) for p in profiles]
    return tuple(p for i, p in enumerate(cut) if p.axes not in [q.axes for q in cut[:i]])


def _varies(spec: GraphSpec) -> bool:
    """True where images of several resolutions are taken."""
    return "resolution" in spec.inputs[0].shape


FAMILY = Clip()
