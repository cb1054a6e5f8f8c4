"""Zero-shot by the original pipelines and by bundles, image by image; and what int8 loses, by calibration data.

    python benchmarks/zero_shot.py FOLDER --models MODELS --data DATA [--samples N]
        [--out benchmarks/results/zero_shot.md]

MODELS holds two small trained checkpoints, tiny-biomedclip (open_clip's layout) and tiny-medclip-hf (transformers'),
DATA what MEDCOMPILE_DATA names: the sets of calibration/pneumoniamnist.yaml and mednist.yaml. FOLDER keeps bundles and
the cache. The recipes are recipes/biomedclip.yaml and pubmedclip.yaml, changed by settings alone.

The originals are run as their users run them: open_clip's preprocess, tokenizer and model; transformers' CLIPModel with
CLIPProcessor, whose image processor is the one of torchvision by default and Pillow's by choice: both are run. Theirs
are classes from one prompt each; ours is load().match(). Nothing of medcompile is in the originals but the arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import PIL.Image

import medcompile
from medcompile import bundle, data
from medcompile.errors import OverBudgetError

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "a medical image: {}"
SETS = ("pneumoniamnist", "mednist")
CALIBRATIONS = {
    "drawn and written here": "[medical-phantoms, image-captions]",
    "public sets": "[mednist-train, roco-captions]",
}
TARGETS = ("onnxruntime-cpu", "openvino-cpu")
BUDGET = "{accuracy: {max_drop: 0.01}, agreement: {max_drop: 0.02}, cosine: {max_drop: 0.02}}"
BATCH = 32
Array = np.ndarray[Any, Any]
Pipeline = Callable[[list[Array], list[str]], Array]


@dataclass(frozen=True)
class Model:
    """folder: of the checkpoint. recipe: whose settings it is built with. context: of its texts, in tokens."""

    folder: Path
    recipe: str
    context: int
    originals: dict[str, Callable[[Path], Pipeline]]


# ---- the originals


def of_open_clip(folder: Path) -> Pipeline:
    import open_clip
    import torch

    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    text |= {"hf_model_name": str(folder / "text_config"), "hf_model_pretrained": False}  # else relative to the cwd
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", text_cfg=text)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()

    def probabilities(images: list[Array], texts: list[str]) -> Array:
        with torch.inference_mode():
            words = model.encode_text(tokenizer(texts), normalize=True)
            rows = []
            for some in batches(images):
                pixels = torch.stack([preprocess(PIL.Image.fromarray(image)) for image in some])
                rows.append(model.encode_image(pixels, normalize=True))
            return (model.logit_scale.exp() * torch.cat(rows) @ words.T).softmax(dim=-1).numpy()

    return probabilities


def of_transformers(backend: str) -> Callable[[Path], Pipeline]:
    def made(folder: Path) -> Pipeline:
        import torch
        import transformers

        model = transformers.CLIPModel.from_pretrained(folder).eval()
        kind = transformers.CLIPImageProcessor if backend == "torchvision" else transformers.CLIPImageProcessorPil
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        processor = transformers.CLIPProcessor(kind.from_pretrained(folder), tokenizer)

        def probabilities(images: list[Array], texts: list[str]) -> Array:
            rows = []
            with torch.inference_mode():
                for some in batches(images):
                    pictures = [PIL.Image.fromarray(image).convert("RGB") for image in some]
                    fed = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
                    rows.append(model(**fed).logits_per_image.softmax(dim=-1))
            return torch.cat(rows).numpy()

        return probabilities

    return made


def batches(images: list[Array]) -> Iterator[list[Array]]:
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH]


# ---- the bundles


def built(model: Model, judged_on: str, calibration: str, work: Path, samples: int | None) -> bundle.Bundle:
    settings = [
        f"name={model.folder.name}",
        f"model.source=path:{model.folder}",
        "model.revision=null",
        f'model.templates=["{TEMPLATE}"]',
        f"shapes.sequence=[4, 16, {model.context}]",
        f"calibration.data={CALIBRATIONS[calibration]}",
        f"evaluation.data={judged_on}",
        f"budget={BUDGET}",
        "variants.int8-symmetric={weights: int8, activations: int8}",
        f"targets=[{', '.join(TARGETS)}]",
    ]
    settings += [f"evaluation.samples={samples}"] if samples else []
    place = work / f"{model.folder.name} {judged_on} {calibration}".replace(" ", "-")
    try:
        return medcompile.build(
            ROOT / "recipes" / model.recipe, overrides=settings, out=place, cache_folder=work / "cache"
        )
    except OverBudgetError:
        return bundle.read(place)


def exact_rows(model: Model, judged_on: str, found: bundle.Bundle, samples: int | None) -> list[str]:
    """Every original beside fp32 of every target, on the same images."""
    dataset = data.read(data.load_manifest(ROOT / f"calibration/{judged_on}.yaml"), limit=samples)
    items = [(item, item.image) for item in dataset.items]
    images = [np.asarray(image.open()) for _, image in items if image is not None]
    labels = sorted(dataset.prompts)
    gold = np.array([labels.index(item.label) for item, _ in items])
    names = [dataset.prompts[label] for label in labels]
    ours = {}
    for target in TARGETS:
        with medcompile.load(found.root, backend=target, variant="fp32") as session:
            ours[target] = session.match(images, names)
    lines = []
    for name, make in model.originals.items():
        theirs = make(model.folder)(images, [TEMPLATE.replace("{}", n) for n in names])
        for target, got in ours.items():
            differ = int((theirs.argmax(1) != got.argmax(1)).sum())
            right = [f"{np.mean(rows.argmax(1) == gold):.4f}" for rows in (theirs, got)]
            lines.append(
                f"| {model.folder.name} | {judged_on} | {len(images)} | {name} | {right[0]} "
                f"| {target} | {right[1]} | {differ} | {np.abs(theirs - got).max():.1e} |"
            )
            print(lines[-1], flush=True)
    return lines


def loss_rows(model: Model, judged_on: str, calibration: str, found: bundle.Bundle) -> list[str]:
    """What each variant below fp32 lost, from the bundle's evidence: the pair in the row of its image tower."""
    lines = []
    for variant in (v for v in found.variants.values() if v.quantized):
        for target in TARGETS:
            both = {a.graph: a for a in found.artifacts if (a.variant, a.target.name) == (variant.name, target)}
            pair = {e.metric: e for e in both["image"].evidence}
            text = {e.metric: e for e in both["text"].evidence}
            accuracy, auroc = pair["accuracy"], pair["auroc"]
            lines.append(
                f"| {model.folder.name} | {judged_on} | {'any' if variant.dynamic else calibration} | {variant.name} "
                f"| {target} | {accuracy.difference:+.4f} ({accuracy.lower:+.4f}) {accuracy.verdict} "
                f"| {pair['agreement'].value:.4f} | {auroc.difference:+.5f} ({auroc.lower:+.4f}) "
                f"| {pair['cosine'].value:.4f} / {pair['cosine_worst'].value:.4f} "
                f"| {text['cosine'].value:.4f} / {text['cosine_worst'].value:.4f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--models", type=Path, required=True)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--samples", type=int, help="images of each set; default: all")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    os.environ["MEDCOMPILE_DATA"] = str(given.data.resolve())
    models, work = given.models.resolve(), given.folder.resolve()
    contenders = (
        Model(models / "tiny-biomedclip", "biomedclip.yaml", 64, {"open_clip": of_open_clip}),
        Model(
            models / "tiny-medclip-hf",
            "pubmedclip.yaml",
            77,
            {
                "transformers, CLIPImageProcessorPil": of_transformers("pil"),
                "transformers, CLIPImageProcessor (torchvision)": of_transformers("torchvision"),
            },
        ),
    )
    exact, lost = [], []
    for model in contenders:
        for judged_on in SETS:
            for calibration in CALIBRATIONS:
                found = built(model, judged_on, calibration, work, given.samples)
                rows = loss_rows(model, judged_on, calibration, found)
                lost += [row for row in rows if row not in lost]  # dynamic scales know no calibration data
            exact += exact_rows(model, judged_on, found, given.samples)
    lines = [
        "# Zero-shot: the original pipelines and bundles",
        "",
        f"Made by `benchmarks/zero_shot.py`, which says how each side is run. {platform.machine()}, "
        f"{', '.join(f'{n} {v}' for n, v in versions())}.",
        "Small trained models, whose prompts were trained on: this shows that nothing is lost on the way, and says",
        "nothing of BiomedCLIP or PubMedCLIP themselves. Validation images, none of them calibrated on.",
        "",
        "## fp32: the same class for every image",
        "",
        "differ: images with another class than the original's. probabilities: largest difference of any.",
        "",
        "| model | images | n | original | its accuracy | target | accuracy | differ | probabilities |",
        "|---|---|---|---|---|---|---|---|---|",
        *exact,
        "",
        "## int8: what is lost, by the data that was calibrated on",
        "",
        "Differences to the original torch model, with the lower bound of 95 % in brackets. Both towers in int8;",
        "accuracy's margin is 0.01. Cosine: mean / worst. int8: static, activations with zero points; int8-symmetric:",
        "static, as TensorRT takes it; int8-dynamic: scales per token (OpenVINO: per group). AUROC is reported, not",
        "judged: with no change at all its bound is about 3 / n, n the images of the rarer side.",
        "",
        "| model | images | calibrated on | variant | target | accuracy | agreement | AUROC | image cosine | text |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *lost,
    ]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def versions() -> list[tuple[str, str]]:
    from importlib.metadata import version

    names = ("open_clip_torch", "transformers", "torch", "onnxruntime", "openvino", "Pillow")
    return [("Python", sys.version.split()[0]), *((name, version(name)) for name in names)]


if __name__ == "__main__":
    main()
