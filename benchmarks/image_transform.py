"""The image transform against open_clip's own: the same files, in turn, in one process.

    python benchmarks/image_transform.py [--rounds 40] [--out benchmarks/results/image_transform.md]

Files are made here (smooth shapes and some noise, as scans have), so nothing needs to be fetched. "from file" decodes
the bytes and transforms; "transform alone" starts from an image that is decoded already. One thread each. Every round
times each contender once, in turn and with the order turned around each time; the ratio is the median over rounds of
theirs / ours. The largest difference of their outputs is taken in the same run.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import PIL
import PIL.Image
import torch
from open_clip.transform import image_transform

from medcompile.runtime.image import ImageTransform

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
FACTS = {"size": 224, "mode": "shortest", "crop": [224, 224], "resample": "bicubic", "fill": 0}
FACTS |= {"rescale": 1 / 255, "mean": MEAN, "std": STD}


def scan(height: int, width: int, channels: int) -> PIL.Image.Image:
    """Soft discs over a gradient with a little noise."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    planes = []
    for c in range(channels):
        plane = 60 + 80 * x + 40 * y + rng.normal(0, 4, (height, width))
        for cx, cy, r in rng.random((6, 3)):
            plane += 60 * np.exp(-(((x - cx) ** 2 + (y - cy) ** 2) / (0.02 + 0.05 * r)) * (1 + 0.1 * c))
        planes.append(plane)
    return PIL.Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8).squeeze())


def encoded(image: PIL.Image.Image, format_: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **({"quality": 90} if format_ == "JPEG" else {}))
    return file.getvalue()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compared(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median ratio theirs / ours."""
    calls, times = (ours, theirs), ([], [])  # type: tuple[Any, Any], tuple[list[float], list[float]]
    for i in range(rounds + 2):
        for which in (0, 1) if i % 2 else (1, 0):
            took = seconds(calls[which])
            if i >= 2:
                times[which].append(took)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return statistics.median(times[0]) * 1000, statistics.median(times[1]) * 1000, ratio


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=40)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    ours, theirs = ImageTransform.of(FACTS), image_transform(224, is_train=False, mean=MEAN, std=STD)
    out = np.empty((3, 224, 224), np.float32)
    files = {
        "gray PNG 224 x 224": (scan(224, 224, 1), "PNG"),
        "gray JPEG 1024 x 1024": (scan(1024, 1024, 1), "JPEG"),
        "gray PNG 2048 x 2500": (scan(2500, 2048, 1), "PNG"),
        "RGB JPEG 320 x 240": (scan(240, 320, 3), "JPEG"),
        "RGB JPEG 640 x 480": (scan(480, 640, 3), "JPEG"),
        "RGB PNG 600 x 450": (scan(450, 600, 3), "PNG"),
        "RGB JPEG 3000 x 2000": (scan(2000, 3000, 3), "JPEG"),
    }
    lines = [
        "# The image transform against open_clip's",
        "",
        f"{platform.machine()}, one thread, {given.rounds} rounds; Pillow {PIL.__version__}, torch {torch.__version__}",
        "Medians in milliseconds; ratio: median over the rounds of open_clip / medcompile. Difference: largest, in",
        "levels of 8 bits. Made by `benchmarks/image_transform.py`.",
        "",
        "| file (width x height) | step | medcompile | open_clip | ratio | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, (image, format_) in files.items():
        data = encoded(image, format_)
        decoded = PIL.Image.open(io.BytesIO(data))
        decoded.load()
        apart = np.abs(ours.pixels(data) - theirs(decoded).numpy()) * np.array(STD)[:, None, None] * 255
        for step, a, b in (
            ("from file", lambda d=data: ours.pixels(d, out=out), lambda d=data: theirs(PIL.Image.open(io.BytesIO(d)))),
            ("transform alone", lambda i=decoded: ours.pixels(i, out=out), lambda i=decoded: theirs(i)),
        ):
            mine, other, ratio = compared(a, b, given.rounds)
            lines.append(f"| {name} | {step} | {mine:.2f} | {other:.2f} | {ratio:.2f} | {apart.max():.4f} |")
            print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
