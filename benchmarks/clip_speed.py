"""ViT-B/16 at 224 pixels: our artifacts beside torch and what other tools make; and images per second from JPEG files.

    python benchmarks/clip_speed.py build FOLDER --data DATA
    python benchmarks/clip_speed.py run FOLDER --cpus 0 --rounds 12 [--batches 1 8]
    python benchmarks/clip_speed.py files BUNDLE --cpus 0 1 --rounds 5 [--images 128] [--variant int8]

build: BiomedCLIP's image tower with random weights (speed does not depend on them), by recipes/biomedclip.yaml; DATA is
what MEDCOMPILE_DATA names. run: one process per contender, pinned to the same cores, taking turns in random order;
ratios are medians of the ratios to open_clip in torch within each round, because a shared machine drifts between
rounds. files: Towers.images, which decodes while the model runs, beside decoding a batch and then running it, in turn.

    medcompile VARIANT, LIBRARY    from the bundle; bf16: with compute {float: bfloat16}
    torch                          open_clip's own model, eager
    onnxruntime int8               its quantize_dynamic, per channel, on torch's own export
    openvino int8 bf16             NNCF's post-training quantization of that export, and the hint for bf16
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
VARIANTS = {
    "bf16": "{compute: {float: bfloat16}}",
    "int8-bf16": "{weights: int8, activations: int8, symmetric: false, compute: {float: bfloat16}}",
}
OURS = {
    f"medcompile {variant}, {target.partition('-')[0]}": (variant, target)
    for target, variants in {
        "onnxruntime-cpu": ("fp32", "int8", "int8-dynamic"),
        "openvino-cpu": ("fp32", "bf16", "int8", "int8-bf16", "int8-dynamic"),
    }.items()
    for variant in variants
}
PEERS = ("torch fp32", "torch bf16", "onnxruntime fp32", "onnxruntime int8", "openvino bf16", "openvino int8 bf16")
CONTENDERS = (*PEERS, *OURS)
EDGE = 224
Run = Callable[[Any], Any]


# ---- what is run


def build(folder: Path, data: Path) -> None:
    from biomedclip_full_size import load_original, write_checkpoint

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    if not (folder / "peer nncf.xml").exists():
        _build_peers(load_original(checkpoint).visual, folder)
    import medcompile

    os.environ["MEDCOMPILE_DATA"] = str(data.resolve())
    settings = [
        f"model.source=path:{checkpoint}",
        "model.revision=null",
        "model.tasks=[image]",
        "calibration.samples=32",
        "evaluation.samples=8",
        "budget={cosine: {max_drop: 0.5}}",
        *(f"variants.{name}={variant}" for name, variant in VARIANTS.items()),
    ]
    recipe = ROOT / "recipes/biomedclip.yaml"
    built = medcompile.build(recipe, overrides=settings, out=folder / "bundle", cache_folder=folder / "cache")
    for artifact in built.artifacts:
        print(artifact.variant, artifact.target.name, *artifact.notes)
    print("skipped:", built.provenance["skipped"])


def _build_peers(visual: Any, folder: Path) -> None:
    import nncf
    import numpy as np
    import openvino
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    export = str(folder / "peer.onnx")
    axes = {name: {0: "batch"} for name in ("pixels", "embedding")}
    torch.onnx.export(
        visual, (torch.randn(2, 3, EDGE, EDGE),), export, dynamo=False, opset_version=17,
        input_names=["pixels"], output_names=["embedding"], dynamic_axes=axes,
    )  # fmt: skip
    quantize_dynamic(
        export, str(folder / "peer int8.onnx"), per_channel=True, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(1, 3, EDGE, EDGE)).astype(np.float32) for _ in range(16)]
    model = openvino.Core().read_model(export)
    quantized = nncf.quantize(model, nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=16)
    openvino.save_model(quantized, folder / "peer nncf.xml", compress_to_fp16=False)


def loaded(folder: Path, contender: str, threads: int) -> Run:
    """What takes pixels [n, 3, 224, 224] and runs them."""
    if contender in OURS:
        return _ours(folder / "bundle", *OURS[contender], threads)
    library, precision = contender.split(" ", 1)
    if library == "torch":
        return _torch(folder / "checkpoint", precision, threads)
    if library == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        file = folder / ("peer.onnx" if precision == "fp32" else "peer int8.onnx")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(None, {"pixels": pixels})
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    file = folder / ("peer.onnx" if precision == "bf16" else "peer nncf.xml")
    compiled = openvino.Core().compile_model(file, "CPU", settings | {"INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()
    return lambda pixels: request.infer([pixels])


def _ours(place: Path, variant: str, target: str, threads: int) -> Run:
    from medcompile import backends, bundle

    found = bundle.read(place, check=False)
    artifact = next(a for a in found.artifacts if (a.variant, a.target.name) == (variant, target))
    backend, spec = backends.for_target(target), found.graphs["image"]
    how = found.variants[variant].on("image")
    executor = backend.load(found.root / artifact.path, spec, how, artifact.target, threads)
    return lambda pixels: executor.run({"pixel_values": pixels})


def _torch(checkpoint: Path, precision: str, threads: int) -> Run:
    import torch
    from biomedclip_full_size import load_original

    torch.set_num_threads(threads)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    visual = load_original(checkpoint).visual.to(dtype)

    def run(pixels: Any) -> Any:
        with torch.inference_mode():
            return visual(torch.from_numpy(pixels).to(dtype))

    return run


# ---- in turn


def worker(folder: Path, contender: str, cpus: list[int]) -> None:
    """Answers `batch count` on stdin with that many times in ms."""
    os.sched_setaffinity(0, cpus)
    import numpy as np

    run = loaded(folder, contender, len(cpus))
    print("ready", flush=True)
    for line in sys.stdin:
        batch, count = map(int, line.split())
        pixels = np.random.default_rng(1).normal(size=(batch, 3, EDGE, EDGE)).astype(np.float32)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            run(pixels)
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps(times), flush=True)


def compare(folder: Path, cpus: list[int], rounds: int, batches: list[int]) -> None:
    processes = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cpus))}
    for contender in CONTENDERS:
        arguments = [sys.executable, __file__, "worker", str(folder), "--contender", contender]
        arguments += ["--cpus", *map(str, cpus)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            arguments, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stdout.readline() == "ready\n", contender  # type: ignore[union-attr]
        processes[contender] = process

    def ask(contender: str, batch: int, count: int) -> list[float]:
        process = processes[contender]
        process.stdin.write(f"{batch} {count}\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return list(json.loads(process.stdout.readline()))  # type: ignore[union-attr]

    print(f"## {len(cpus)} threads, {rounds} rounds, load {os.getloadavg()[0]:.0f}\n")
    print("| batch | contender | median ms | best ms | to torch fp32 | to openvino int8 bf16 |")
    print("|---|---|---|---|---|---|")
    for batch in batches:
        for contender in CONTENDERS:
            ask(contender, batch, 1)
        times: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
        best: dict[str, float] = dict.fromkeys(CONTENDERS, float("inf"))
        for _ in range(rounds):
            for contender in random.sample(CONTENDERS, len(CONTENDERS)):
                taken = ask(contender, batch, 3 if batch == 1 else 1)
                times[contender].append(statistics.median(taken))
                best[contender] = min(best[contender], *taken)
        for contender in CONTENDERS:
            ratios = [
                statistics.median(a / b for a, b in zip(times[contender], times[peer], strict=True))
                for peer in ("torch fp32", "openvino int8 bf16")
            ]
            print(
                f"| {batch} | {contender} | {statistics.median(times[contender]):.1f} | {best[contender]:.1f} "
                f"| {ratios[0]:.3f} | {ratios[1]:.3f} |",
                flush=True,
            )
    for process in processes.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()


# ---- from files


def files(place: Path, cpus: list[int], rounds: int, images: int, variant: str) -> None:
    """Images per second from JPEG files of 512 x 512, by model threads."""
    os.sched_setaffinity(0, cpus)
    import tempfile

    import numpy as np
    import PIL.Image

    import medcompile

    with tempfile.TemporaryDirectory() as scratch:
        paths = []
        for i in range(images):
            small = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            paths.append(Path(scratch) / f"{i}.jpg")
            PIL.Image.fromarray(small).resize((512, 512)).save(paths[-1])
        print(f"| model | model threads of {len(cpus)} cores | decode, then run: images/s | while it runs | ratio |")
        print("|---|---|---|---|---|")
        for threads in range(1, len(cpus) + 1):
            with medcompile.load(place, variant=variant, threads=threads) as session:
                turns: dict[Run, list[float]] = {_in_turn(session): [], _ahead(session): []}
                for round_ in range(rounds + 1):
                    for run, rates in turns.items():
                        start = time.perf_counter()
                        assert run(paths) == images
                        if round_:
                            rates.append(images / (time.perf_counter() - start))
                slow, fast = turns.values()
                name = f"{session.bundle.name} {variant}, {session.target.name}"
            ratio = statistics.median(b / a for a, b in zip(slow, fast, strict=True))
            rates = f"{statistics.median(slow):.1f} | {statistics.median(fast):.1f}"
            print(f"| {name} | {threads} | {rates} | {ratio:.3f} |", flush=True)


def _ahead(session: Any) -> Run:
    return lambda paths: sum(result.error is None for result in session.towers.images(paths))


def _in_turn(session: Any) -> Run:
    """The same batches, transform and model as Towers.images, one after the other in one thread."""
    import numpy as np

    from medcompile.runtime.towers import image_batch

    towers, executor = session.towers, session._executors["image"]
    most = image_batch(session.bundle.graphs["image"], towers.transform.size).max

    def run(paths: list[Path]) -> int:
        done = 0
        for start in range(0, len(paths), most):
            arrays = [towers.transform.pixels(path) for path in paths[start : start + most]]
            done += len(executor.run({"pixel_values": np.stack(arrays)})["embedding"])
        return done

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("build", "run", "worker", "files"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cpus", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--contender")
    given = parser.parse_args()
    if given.step == "build":
        folder = given.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, given.data)
    elif given.step == "run":
        compare(given.folder, given.cpus, given.rounds, given.batches)
    elif given.step == "files":
        files(given.folder, given.cpus, given.rounds, given.images, given.variant)
    else:
        worker(given.folder, given.contender, given.cpus)


if __name__ == "__main__":
    main()
