"""BERT-base in int8 on ONNX Runtime: our artifacts beside the fastest graphs that its own tools and fusions give.

    python benchmarks/encoder_onnxruntime.py build FOLDER
    python benchmarks/encoder_onnxruntime.py run FOLDER --cpus 1 --rounds 12 [--shapes 1x128 8x128 1x512]

Weights are random (speed does not depend on them), masks full, outputs a pooled embedding (ours) or the last hidden
state (peers, which so do a little less). One process per contender, pinned to the same cores, taking turns in random
order; ratios are medians of the ratios to the peer within each round, because a shared machine drifts between rounds.

    medcompile static      calibrated W8A8, symmetric, as a recipe's {weights: int8, activations: int8} gives it
    medcompile dynamic     scales per token
    peer dynamic           onnxruntime.transformers' optimizer, then quantize_dynamic, per channel
    peer static            Q/DQ around EmbedLayerNormalization, merged QKV, MultiHeadAttention, SkipLayerNormalization
                           and BiasGelu: what the library would run if its optimizer could fuse a quantized graph
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONTENDERS = ("peer dynamic", "peer static", "medcompile static", "medcompile dynamic")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def build(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=28996, attn_implementation="eager"), add_pooling_layer=False).eval()
    model.save_pretrained(folder / "checkpoint")
    (folder / "checkpoint" / "vocab.txt").write_text("[PAD]\n[UNK]\n")  # a source has a tokenizer; ids are random here
    _build_ours(folder)
    _build_peers(model, folder)


def _build_ours(folder: Path) -> None:
    import numpy as np

    from medcompile import backends, models, onnx_files, sources
    from medcompile.models import ModelOptions
    from medcompile.passes.calibrate import Calibrate
    from medcompile.passes.export import export
    from medcompile.passes.quantize import Quantize
    from medcompile.passes.simplify import Simplify
    from medcompile.program import Context, Silent
    from medcompile.recipe_rules import method_of
    from medcompile.run_onnx import run_onnx
    from medcompile.spec import Axis, Precision, Profile, Variant

    def batches(_: str) -> Any:
        rng = np.random.default_rng(0)
        for _ in range(4):
            ids = rng.integers(0, 28000, (8, 64))
            yield dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))

    profile = Profile("default", (Axis("batch", 1, 8, 64), Axis("sequence", 2, 128, 512)))
    checkpoint = sources.resolve(f"path:{folder / 'checkpoint'}", cache=folder / "cache")
    program = export(models.get("bert"), checkpoint, ModelOptions(("embed",), (profile,)))
    ctx = Context(folder, Silent(), None, batches, run_onnx)
    program = Calibrate()(Simplify()(program, ctx), ctx)
    backend = backends.for_target("onnxruntime-cpu")
    spec = program.graphs["embed"].spec
    (folder / "spec.txt").write_text(repr(spec))
    for name in ("static", "dynamic"):
        dynamic, int8 = name == "dynamic", Precision.INT8
        method = method_of(None, int8, dynamic)
        variant = Variant(name, weights=int8, activations=int8, dynamic=dynamic, method=method)
        typed, out = folder / f"typed {name}", folder / f"medcompile {name}"
        for each in (typed, out):
            each.mkdir(exist_ok=True)
        quantized = Quantize()(program, Context(folder, Silent(), variant))
        onnx_files.save({"embed": quantized.graphs["embed"].model}, typed)
        built = backend.build(typed / "embed.onnx", spec, variant, backend.probe("onnxruntime-cpu"), out)
        print(name, built.notes)


def _build_peers(model: Any, folder: Path) -> None:
    import onnx
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    class LastHidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            return self.model(**dict(zip(INPUTS, tensors, strict=True))).last_hidden_state

    export, fused = str(folder / "eager.onnx"), str(folder / "fused.onnx")
    ids = torch.randint(0, 28000, (2, 16))
    axes = {name: {0: "batch", 1: "sequence"} for name in (*INPUTS, "hidden")}
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    torch.onnx.export(
        LastHidden(), example, export, dynamo=False, opset_version=17, input_names=list(INPUTS),
        output_names=["hidden"], dynamic_axes=axes,
    )  # fmt: skip
    optimizer.optimize_model(export, model_type="bert", num_heads=12, hidden_size=768).save_model_to_file(fused)
    options = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(
        fused, str(folder / "peer dynamic.onnx"), per_channel=True, reduce_range=False, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Attention"], extra_options=options,
    )  # fmt: skip
    _fused_qdq(model, folder / "peer static.onnx")


def _fused_qdq(model: Any, path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    nodes: list[Any] = []
    stored: list[Any] = []

    def const(array: Any) -> str:
        stored.append(numpy_helper.from_array(np.ascontiguousarray(array), f"c{len(stored)}"))
        return str(stored[-1].name)

    def op(kind: str, inputs: list[str], domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        names = [f"t{len(nodes)}_{i}" for i in range(outputs)]
        nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def fused(kind: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> Any:
        return op(kind, inputs, "com.microsoft", outputs, **attributes)

    def product(x: str, weight: Any) -> str:
        """weight: [N, K] float32."""
        scale = np.abs(weight).max(axis=1) / 127
        codes = np.clip(np.round(weight / scale[:, None]), -127, 127).astype(np.int8).T
        step, zero = const(np.float32(0.05)), const(np.uint8(128))
        x = op("DequantizeLinear", [op("QuantizeLinear", [x, step, zero]), step, zero])
        zeros = const(np.zeros(len(scale), np.int8))
        return str(op("MatMul", [x, op("DequantizeLinear", [const(codes), const(scale), zeros], axis=1)]))

    def named(*names: str) -> list[str]:
        return [const(weights[name]) for name in names]

    ids, mask, types = (op("Cast", [name], to=TensorProto.INT32) for name in INPUTS)
    tables = named(*(f"embeddings.{t}_embeddings.weight" for t in ("word", "position", "token_type")))
    norm = named("embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias")
    x, _ = fused("EmbedLayerNormalization", [ids, types, *tables, *norm], 2, epsilon=1e-12)
    for i in range(12):
        layer = f"encoder.layer.{i}"
        parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        qkv = product(x, np.concatenate([weights[f"{part}.weight"] for part in parts]))
        qkv = op("Add", [qkv, const(np.concatenate([weights[f"{part}.bias"] for part in parts]))])
        heads = op("Split", [qkv], outputs=3, axis=-1, num_outputs=3)
        y = fused("MultiHeadAttention", [*heads, "", mask], num_heads=12)
        for name in (f"{layer}.attention.output", f"{layer}.output"):
            if name == f"{layer}.output":
                y = product(x, weights[f"{layer}.intermediate.dense.weight"])
                y = fused("BiasGelu", [y, *named(f"{layer}.intermediate.dense.bias")])
            y = op("Add", [product(y, weights[f"{name}.dense.weight"]), *named(f"{name}.dense.bias")])
            norm = named(f"{name}.LayerNorm.weight", f"{name}.LayerNorm.bias")
            x = fused("SkipLayerNormalization", [y, x, *norm], epsilon=1e-12)
    op("Identity", [x])
    nodes[-1].output[0] = "hidden"
    faces = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"]) for n in INPUTS]
    last = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "peer", faces, last, stored)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def worker(folder: Path, contender: str, cpus: list[int]) -> None:
    """Answers `batch sequence count` on stdin with that many times in ms."""
    os.sched_setaffinity(0, cpus)
    import numpy as np

    run: Any
    if contender.startswith("medcompile"):
        from medcompile import backends, spec

        face = eval((folder / "spec.txt").read_text(), vars(spec))  # written by build() above
        backend = backends.for_target("onnxruntime-cpu")
        target = backend.probe("onnxruntime-cpu")
        run = backend.load(folder / contender / "model.onnx", face, spec.Variant("v"), target, len(cpus)).run
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = len(cpus), 3
        session = onnxruntime.InferenceSession(folder / f"{contender}.onnx", options)
        names = {i.name for i in session.get_inputs()}

        def run(feeds: Any) -> Any:
            return session.run(None, {name: array for name, array in feeds.items() if name in names})

    print("ready", flush=True)
    for line in sys.stdin:
        batch, sequence, count = map(int, line.split())
        ids = np.random.default_rng(1).integers(0, 28000, (batch, sequence))
        feeds = dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
        times = []
        for _ in range(count):
            start = time.perf_counter()
            run(feeds)
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps(times), flush=True)


def run(folder: Path, cpus: list[int], rounds: int, shapes: list[str]) -> None:
    processes = {}
    for contender in CONTENDERS:
        arguments = [sys.executable, __file__, "worker", str(folder), "--contender", contender]
        arguments += ["--cpus", *map(str, cpus)]
        pipe = subprocess.PIPE
        processes[contender] = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True)
        assert processes[contender].stdout.readline() == "ready\n", contender  # type: ignore[union-attr]

    def ask(contender: str, shape: str, count: int) -> list[float]:
        process = processes[contender]
        process.stdin.write(f"{shape.replace('x', ' ')} {count}\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return list(json.loads(process.stdout.readline()))  # type: ignore[union-attr]

    print(f"{len(cpus)} threads, {rounds} rounds\n")
    print("| shape | contender | median ms | best ms | to peer dynamic | to peer static |\n|---|---|---|---|---|---|")
    for shape in shapes:
        for contender in CONTENDERS:
            ask(contender, shape, 2)
        times: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
        best: dict[str, float] = dict.fromkeys(CONTENDERS, float("inf"))
        for _ in range(rounds):
            for contender in random.sample(CONTENDERS, len(CONTENDERS)):
                taken = ask(contender, shape, 3)
                times[contender].append(statistics.median(taken))
                best[contender] = min(best[contender], *taken)
        for contender in CONTENDERS:
            ratios = [
                statistics.median(a / b for a, b in zip(times[contender], times[peer], strict=True))
                for peer in CONTENDERS[:2]
            ]
            print(
                f"| {shape} | {contender} | {statistics.median(times[contender]):.1f} | {best[contender]:.1f} "
                f"| {ratios[0]:.3f} | {ratios[1]:.3f} |",
                flush=True,
            )
    for process in processes.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("build", "run", "worker"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpus", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x128", "1x512"])
    parser.add_argument("--contender")
    args = parser.parse_args()
    if args.step == "build":
        build(args.folder.resolve())
    elif args.step == "run":
        run(args.folder, args.cpus, args.rounds, args.shapes)
    else:
        worker(args.folder, args.contender, args.cpus)


if __name__ == "__main__":
    main()
