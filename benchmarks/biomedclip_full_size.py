"""BiomedCLIP's full-size architecture with random weights, through the real recipe: time, memory, sizes, int8 fidelity.

    python benchmarks/biomedclip_full_size.py FOLDER --data DATA [--samples 16] [--calibration 64]
        [--targets onnxruntime-cpu openvino-cpu tensorrt-rtx] [--out benchmarks/results/biomedclip_full_size.md]

FOLDER is scratch (12 GB), removed at the end unless --keep is given. DATA is what MEDCOMPILE_DATA names, for the images
of calibration/mednist.yaml. open_clip builds the model from its config, offline: timm's vit_base_patch16_224 beside a
BERT-base whose vocabulary is a stand-in. The recipe is recipes/biomedclip.yaml, changed by settings alone; the build is
one process of its own, whose events give the times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import medcompile
from medcompile import bundle
from medcompile.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, **SIZES}
CONTEXT = 256
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VARIANTS = {
    "int8-symmetric": "{weights: int8, activations: int8, float: float16}",
    "fp16": "{float: float16}",
}
Array = np.ndarray[Any, Any]


def write_checkpoint(folder: Path) -> Path:
    """A folder as BiomedCLIP ships it, of the same sizes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import BertWordPieceTokenizer

    (folder / "text_config").mkdir(parents=True)
    text = {"hf_model_name": "text_config", "hf_tokenizer_name": "text_config", "hf_proj_type": "mlp"}
    text |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": CONTEXT}
    vision = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    scale = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": scale}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "text_config/config.json").write_text(json.dumps(BERT))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    words += [f"[unused{i}]" for i in range(int(BERT["vocab_size"]) - len(words))]
    tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, lowercase=True)
    tokenizer.add_special_tokens(words[:5])
    for place in (folder, folder / "text_config"):
        tokenizer.save(str(place / "tokenizer.json"))
    torch.manual_seed(0)
    model = load_original(folder, load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def load_original(folder: Path, **how: Any) -> Any:
    """The folder in open_clip's own class; its text config named absolutely, since open_clip looks in the cwd."""
    import open_clip

    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    text |= {"hf_model_name": str(folder.resolve() / "text_config"), "hf_model_pretrained": False}
    return open_clip.create_model(f"local-dir:{folder}", text_cfg=text, **how).eval()


def settings(folder: Path, targets: list[str], samples: int, calibration: int) -> list[str]:
    """What the recipe is changed by. The budget is wide: random weights have no accuracy to keep."""
    return [
        f"model.source=path:{folder}",
        "model.revision=null",
        f"calibration.samples={calibration}",
        f"evaluation.samples={samples}",
        "budget={cosine: {max_drop: 0.5}}",
        *(f"variants.{name}={variant}" for name, variant in VARIANTS.items()),
        f"targets=[{', '.join(targets)}]",
    ]


def build(work: Path, changed: list[str]) -> tuple[Bundle, list[dict[str, Any]], int]:
    """The bundle, the ends of its steps, and the peak RSS in bytes of the build with all processes that it started."""
    command = [sys.executable, "-m", "medcompile.cli", "build", str(ROOT / "recipes/biomedclip.yaml"), "--json"]
    command[1:3] = ["-c", "from medcompile.cli import main; main()"]
    command += ["--out", str(work / "bundle"), "--cache", str(work / "cache")]
    command += [word for setting in changed for word in ("--set", setting)]
    ends = []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        said = log.read()
    if status:
        raise SystemExit(f"the build ended with {os.waitstatus_to_exitcode(status)}\n{said[-4000:]}")
    for line in said.splitlines():
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "end":
            ends.append(event)
    peaks = [usage.ru_maxrss * 1024, *(end["peak_rss_bytes"] for end in ends)]  # the build resets its own between steps
    return bundle.read(work / "bundle", check=False), ends, max(peaks)


def step_rows(ends: list[dict[str, Any]]) -> list[str]:
    return [f"| {e['name']} | {e['seconds']:.1f} | {e['peak_rss_bytes'] / 2**20:.0f} |" for e in ends]


def artifact_rows(found: Bundle) -> list[str]:
    lines = []
    for variant in found.variants:
        for target in sorted({a.target.name for a in found.artifacts}):
            both = {a.graph: a for a in found.artifacts if (a.variant, a.target.name) == (variant, target)}
            if not both:
                continue
            cells = []
            for graph in ("image", "text"):
                folder = found.folder_of(both[graph])
                size = sum(found.files[p].size for p in found.under(folder))
                cosine = {e.metric: e.value for e in both[graph].evidence}
                told = f"{cosine['cosine']:.5f} / {cosine['cosine_worst']:.5f}" if cosine else ""
                cells += [f"{size / 1e6:.0f}", told]
                cells += [centred(found, variant, target)] if graph == "image" else []
            ran = "artifact" if both["image"].ran else "its graph, on the CPU"
            lines.append(f"| {variant} | {target} | {' | '.join(cells)} | {ran} |")
    return lines


def centred(found: Bundle, variant: str, target: str) -> str:
    """Mean cosine to the reference once the reference's mean embedding is taken off both; empty where it can't run."""
    if not target.endswith("-cpu"):
        return ""
    from medcompile import data

    judged = data.load_manifest(ROOT / "calibration/mednist.yaml")
    items = data.read(judged, limit=int(found.provenance["evaluation"]["items"])).items
    with np.load(found.root / "reference/image.npz") as kept:
        reference = kept["values"].astype(np.float64)
    with medcompile.load(found.root, backend=target, variant=variant) as session:
        got = session.embed_images(item.image.open() for item in items if item.image is not None).astype(np.float64)
    mean = reference.mean(axis=0)
    return f"{cosines(reference - mean, got - mean).mean():.4f}"


def cosines(a: Array, b: Array) -> Array:
    return np.asarray((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))


def alike(found: Bundle) -> float:
    """Mean cosine of the reference's embeddings of two different images."""
    with np.load(found.root / "reference/image.npz") as kept:
        rows = kept["values"].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similar = rows @ rows.T
    return float(similar[np.triu_indices(len(rows), 1)].mean())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--samples", type=int, default=16)
    arguments.add_argument("--calibration", type=int, default=64)
    arguments.add_argument("--targets", nargs="+", default=["onnxruntime-cpu", "openvino-cpu", "tensorrt-rtx"])
    arguments.add_argument("--keep", action="store_true")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    os.environ["MEDCOMPILE_DATA"] = str(given.data.resolve())
    work = given.folder.resolve()
    work.mkdir(parents=True)
    try:
        checkpoint = write_checkpoint(work / "checkpoint")
        changed = settings(checkpoint, given.targets, given.samples, given.calibration)
        found, ends, peak = build(work, changed)
        weights = (checkpoint / "open_clip_model.safetensors").stat().st_size
        lines = report(found, ends, peak, weights, given)
    finally:
        if not given.keep:
            shutil.rmtree(work)
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(found: Bundle, ends: list[dict[str, Any]], peak: int, weights: int, given: argparse.Namespace) -> list[str]:
    versions = found.provenance["versions"]
    named = ", ".join(f"{n} {versions[n]}" for n in ("torch", "onnxruntime", "openvino") if n in versions)
    cores = len(os.sched_getaffinity(0))
    busy = os.getloadavg()[1]
    skipped = found.provenance["skipped"]
    return [
        "# BiomedCLIP's full-size architecture",
        "",
        f"Made by `benchmarks/biomedclip_full_size.py`. {platform.machine()}, {cores} cores, load {busy:.0f} when it "
        f"ended; Python {platform.python_version()}, {named}.",
        f"ViT-B/16 at 224 pixels and BERT-base, {weights / 1e6:.0f} MB of weights in fp32; `recipes/biomedclip.yaml`,",
        f"calibrated on {given.calibration} items of each set, judged on {given.samples} images.",
        "",
        "The weights are random. So sizes, times and memory are BiomedCLIP's, and the cosines say that int8 arithmetic",
        "of this size works, not what a trained model loses: random layers have no outlier channels, and a random",
        f"tower tells images apart less than a trained one (mean cosine of two images {alike(found):.2f}). Centred:",
        "cosine once the mean embedding is taken off, which is what is left to tell images apart.",
        "",
        f"The whole build took {sum(e['seconds'] for e in ends):.0f} s and {peak / 2**20:.0f} MiB at its peak.",
        "",
        "## Artifacts",
        "",
        "Cosine to the original in fp32: mean / worst. TensorRT's engines were built here without a GPU and not run.",
        "",
        "| variant | target | image MB | image cosine | centred | text MB | text cosine | what ran |",
        "|---|---|---|---|---|---|---|---|",
        *artifact_rows(found),
        "",
        *(
            f"- not built: {s.get('variant', '')} for {s['target']}: {s['reason'].partition(chr(10))[0]}"
            for s in skipped
        ),
        "",
        "## Steps",
        "",
        "| step | seconds | peak RSS MiB |",
        "|---|---|---|",
        *step_rows(ends),
    ]


if __name__ == "__main__":
    main()
