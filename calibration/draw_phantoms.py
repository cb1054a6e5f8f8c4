"""Draws medical-phantoms/: images with the statistics of five modalities, from formulas and a seed, of no patient.

Run `python calibration/draw_phantoms.py` to draw them again; numpy computes every pixel, Pillow only writes the PNGs.
Captions say what was drawn. Anatomy is a sketch: the set is for calibration, not for judging a model.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 128
SEED = 20260401
FOLDER = Path(__file__).parent / "medical-phantoms"

Plane = NDArray[np.float64]
"""[SIZE, SIZE], or [SIZE, SIZE, 3] for color; 0 is black and 1 is white."""

Rng = np.random.Generator

Y, X = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]


def draw() -> list[tuple[str, str, NDArray[np.uint8]]]:
    """(label, caption, pixels) of every phantom, in the order of the files."""
    drawn = []
    for label, count, phantom in KINDS:
        for number in range(count):
            rng = np.random.default_rng([SEED, sum(label.encode()), number])
            caption, plane = phantom(rng, number)
            drawn.append((label, caption, np.rint(np.clip(plane, 0, 1) * 255).astype(np.uint8)))
    return drawn


def main() -> None:
    from PIL import Image

    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "index.csv").open("w", newline="", encoding="utf-8") as file:
        index = csv.writer(file, lineterminator="\n")
        index.writerow(["id", "file", "label", "caption", "sha256"])
        for number, (label, caption, pixels) in enumerate(draw(), start=1):
            path = FOLDER / f"{number:03d}.png"
            Image.fromarray(pixels).save(path, optimize=True)
            index.writerow(
                [f"mp-{number:03d}", path.name, label, caption, hashlib.sha256(path.read_bytes()).hexdigest()]
            )


def radiograph(rng: Rng, number: int) -> tuple[str, Plane]:
    return _limb(rng) if number % 3 == 2 else _chest(rng, number)


def _chest(rng: Rng, number: int) -> tuple[str, Plane]:
    tilt, width = rng.normal(0, 0.03), rng.uniform(0.3, 0.38)
    image = 0.1 + 0.42 * _disc(tilt, 0.15, 0.95, 1.15, soft=0.12) + 0.12 * _disc(0, 0.9, 1.2, 0.5, soft=0.4)
    lungs = _disc(-0.42 + tilt, -0.05, width, 0.62, soft=0.1) + _disc(0.42 + tilt, -0.05, width, 0.62, soft=0.1)
    image -= (0.34 + 0.08 * _cloud(rng, 5)) * lungs
    for rib in range(8):
        ring = np.abs(Y - (-0.75 + 0.2 * rib) - 0.28 * (X - tilt) ** 2 + 0.1 * np.abs(X)) < 0.028
        image += 0.07 * _soft(ring, 1.2) * (np.abs(X) > 0.12) * _disc(tilt, 0, 0.85, 0.9, soft=0.1)
    image += 0.22 * np.exp(-(((X - tilt) / 0.09) ** 2)) * (0.8 + 0.2 * np.sign(np.sin(18 * Y)))
    heart = rng.uniform(0.26, 0.42)
    image += 0.2 * _disc(0.14 + tilt, 0.3, heart, 0.36, soft=0.15, turn=0.5)
    parts = ["two dark lung fields", "an enlarged heart shadow" if heart > 0.36 else "a central heart shadow"]
    side = int(rng.choice([-1, 1]))
    finding = number % 4
    if finding == 1:
        image += 0.3 * _soft(_cloud(rng, 4) > 0.2, 2) * _disc(side * 0.45, rng.uniform(-0.1, 0.3), 0.25, 0.22, soft=0.3)
        parts.append(f"a patchy opacity on the image's {_side(side)}")
    elif finding == 2:
        level = 1 / (1 + np.exp(-(Y - 0.3 - 0.25 * (1 - np.abs(X))) / 0.04))
        image += 0.3 * level * _disc(side * 0.5, 0.3, 0.42, 0.5, soft=0.15)
        parts.append(f"a fluid level at the base on the image's {_side(side)}")
    elif finding == 3:
        image += 0.25 * _disc(side * rng.uniform(0.3, 0.5), rng.uniform(-0.4, 0.2), 0.07, 0.07, soft=0.2)
        parts.append(f"a small round nodule on the image's {_side(side)}")
    return f"Chest radiograph phantom with {_listed(parts)}.", image + rng.normal(0, 0.012, X.shape)


def _limb(rng: Rng) -> tuple[str, Plane]:
    turn, joint = rng.uniform(-0.35, 0.35), rng.uniform(-0.2, 0.2)
    u, v = X * np.cos(turn) + Y * np.sin(turn), Y * np.cos(turn) - X * np.sin(turn)
    image = 0.05 + 0.28 / (1 + np.exp((np.abs(u) - 0.6 - 0.08 * np.cos(3 * v)) / 0.03))
    bones = int(rng.integers(1, 3))
    for centre in (-0.2, 0.2) if bones == 2 else (0.0,):
        radius = (0.13 if bones == 2 else 0.2) * (1 + 0.7 * np.exp(-(((v - joint) / 0.22) ** 2)))
        inside = np.clip(1 - ((u - centre) / radius) ** 2, 0, 1)
        shaft = 0.5 * np.sqrt(inside) - 0.22 * inside**2 * (np.abs(v - joint) > 0.2)
        image += shaft * (np.abs(v - joint - 0.04 * np.cos(4 * u)) > 0.025)
    text = (
        f"Limb radiograph phantom with {['one long bone', 'two long bones'][bones - 1]} above and below a joint space"
    )
    if rng.random() < 0.5:
        image -= 0.3 * (np.abs(v - 0.55 - 0.4 * u) < 0.015) * (image > 0.4)
        text += " and an oblique dark fracture line in the shaft"
    return f"{text}.", image + rng.normal(0, 0.012, X.shape)


def ct(rng: Rng, number: int) -> tuple[str, Plane]:
    if number % 2:
        image = 0.85 * _disc(0, 0, 0.72, 0.88) - 0.5 * _disc(0, 0, 0.66, 0.82)
        image += 0.03 * _disc(0, 0, 0.66, 0.82) * _cloud(rng, 3)
        spread = rng.uniform(0.06, 0.13)
        for side in (-1, 1):
            image -= 0.15 * _disc(side * 0.18, -0.05, spread, rng.uniform(0.24, 0.32), turn=side * 0.3)
        parts = ["a bright skull ring", "wide dark ventricles" if spread > 0.1 else "slim dark ventricles"]
        if number % 4 == 1:
            image += 0.3 * _disc(
                rng.uniform(-0.35, 0.35), rng.uniform(-0.4, 0.5), 0.12, 0.09, soft=0.15, turn=rng.random()
            )
            parts.append("a bright rounded focus in the brain")
        region = "Head"
    else:
        image = 0.28 * _disc(0, 0, 0.9, 0.68) + 0.2 * _disc(0, 0, 0.84, 0.61)
        image += 0.12 * _disc(-0.38, -0.1, 0.4, 0.36, turn=0.3) + 0.1 * _disc(0.55, -0.05, 0.15, 0.22, turn=-0.4)
        image += 0.45 * _disc(0, 0.36, 0.13, 0.12) - 0.3 * _disc(0, 0.4, 0.05, 0.05)
        for side in (-1, 1):
            image += rng.uniform(0.12, 0.25) * _disc(side * 0.38, 0.28, 0.12, 0.15, turn=side * 0.4)
        for _ in range(int(rng.integers(3, 7))):
            image -= rng.uniform(0.1, 0.45) * _disc(
                rng.uniform(0, 0.5), rng.uniform(-0.4, 0.1), 0.08, 0.06, turn=rng.random()
            )
        parts = ["a large organ on the image's left", "two kidneys", "a vertebra", "loops that hold gas"]
        if number % 4 == 2:
            image -= 0.12 * _disc(rng.uniform(-0.55, -0.3), rng.uniform(-0.25, 0.05), 0.09, 0.09)
            parts.append("a dark round lesion in the large organ")
        region = "Abdominal"
    streaks = 0.01 * np.sin(40 * np.arctan2(Y, X) + rng.uniform(0, 6))
    image += (streaks + rng.normal(0, 0.018, X.shape)) * (image > 0.1)
    return f"{region} CT slice phantom with {_listed(parts)}.", image


def mr(rng: Rng, number: int) -> tuple[str, Plane]:
    bright_water = bool(number % 2)
    water, white, grey, scalp = (0.95, 0.35, 0.55, 0.7) if bright_water else (0.12, 0.72, 0.5, 0.9)
    folds = _cloud(rng, 4)
    head, brain = _disc(0, 0, 0.78, 0.92), _disc(0, 0, 0.64, 0.78, soft=0.03)
    image = scalp * (head - _disc(0, 0, 0.72, 0.86)) + water * 0.8 * _disc(0, 0, 0.67, 0.81) * (1 - brain)
    core = _soft(np.hypot(X / 0.55, Y / 0.68) + 0.25 * folds < 0.85, 1)
    image += brain * (grey + (white - grey) * core)
    spread = rng.uniform(0.05, 0.12)
    for side in (-1, 1):
        inside = _disc(side * 0.15, -0.04, spread, 0.28, turn=side * 0.25)
        image += (water - white) * inside
    parts = ["a scalp ring, cortical folds and paired ventricles"]
    if number % 3 == 0:
        count = int(rng.integers(1, 5))
        for _ in range(count):
            r = rng.uniform(0.03, 0.1)
            image += (0.4 if bright_water else -0.3) * _disc(
                rng.uniform(-0.4, 0.4), rng.uniform(-0.5, 0.5), r, r, soft=0.2
            )
        parts.append(
            f"{['one', 'two', 'three', 'four'][count - 1]} {'bright' if bright_water else 'dark'} "
            f"focal lesion{'s' if count > 1 else ''}"
        )
    image *= 1 + 0.18 * np.sin(X * rng.uniform(0.5, 1.5) + rng.uniform(0, 6)) * np.cos(Y * rng.uniform(0.5, 1.5))
    image = np.hypot(0.92 * image + rng.normal(0, 0.02, X.shape), rng.normal(0, 0.02, X.shape))
    weight = "bright fluid, as T2-weighted" if bright_water else "dark fluid, as T1-weighted"
    return f"Axial brain MR phantom with {_listed(parts)}; {weight}.", image


def ultrasound(rng: Rng, number: int) -> tuple[str, Plane]:
    echo = 0.35 + 0.15 * _cloud(rng, 6)
    depth, side = rng.uniform(0.0, 0.35), rng.uniform(-0.25, 0.25)
    a, b = rng.uniform(0.16, 0.3), rng.uniform(0.14, 0.24)
    shape, below = _disc(side, depth, a, b, soft=0.06), (np.abs(X - side) < a * 0.8) * (depth < Y)
    found = [
        "a dark cyst with bright echoes behind it",
        "a bright mass with a shadow behind it",
        "a dark irregular mass",
        "layered tissue and no mass",
    ][number % 4]
    if number % 4 == 0:
        echo = echo * (1 - 0.97 * shape) + 0.25 * _soft(below, 3) * (1 - shape)
    elif number % 4 == 1:
        echo = (echo + 0.5 * shape) * (1 - 0.75 * _soft(below, 3) * (1 - shape))
    elif number % 4 == 2:
        echo *= 1 - 0.75 * _soft(np.hypot((X - side) / a, (Y - depth) / b) + 0.35 * _cloud(rng, 5) < 1, 1.5)
    else:
        echo += 0.9 * np.sin(14 * Y + 1.5 * np.sin(2 * X) + rng.uniform(0, 6)) ** 8
    wave = _blur(rng.normal(size=X.shape), 0.9, 1.5) + 1j * _blur(rng.normal(size=X.shape), 0.9, 1.5)
    speckle = np.abs(wave) / np.abs(wave).mean()
    level = np.log1p(30 * np.clip(echo, 0.002, None) * speckle * np.exp(-0.35 * (Y + 1))) / np.log(31)
    radius, angle = np.hypot(X, Y + 1.35), np.abs(np.arctan2(X, Y + 1.35))
    fan = (radius > 0.42) & (radius < 2.28) & (angle < rng.uniform(0.5, 0.68))
    return f"Ultrasound sector phantom with speckle and {found}.", 0.9 * level * fan


def histology(rng: Rng, number: int) -> tuple[str, Plane]:
    eosin, blue = np.array([0.87, 0.6, 0.76]), np.array([0.36, 0.22, 0.55])
    eosin = np.clip(eosin + rng.normal(0, 0.03, 3), 0, 1)
    fibres = _blur(rng.normal(size=X.shape), rng.uniform(0.8, 3), rng.uniform(2, 7))
    image = eosin + 0.05 * (fibres / fibres.std())[..., None] * np.array([0.5, 1, 0.7])
    crowd = int(rng.integers(40, 90)) if number % 3 else int(rng.integers(160, 240))
    rings = int(rng.integers(2, 5)) if number % 3 == 1 else 0
    spots = [tuple(rng.uniform(-1, 1, 2)) for _ in range(crowd)]
    for _ in range(rings):
        cx, cy, r = rng.uniform(-0.7, 0.7), rng.uniform(-0.7, 0.7), rng.uniform(0.2, 0.35)
        image += (0.97 - image) * _disc(cx, cy, r * 0.6, r * 0.6, soft=0.1)[..., None]
        spots += [(cx + r * np.cos(t), cy + r * np.sin(t)) for t in np.arange(0, 6.28, 0.075 / r)]
    if number % 3 == 2:
        for _ in range(int(rng.integers(4, 8))):
            r = rng.uniform(0.12, 0.28)
            image += (0.96 - image) * _disc(rng.uniform(-1, 1), rng.uniform(-1, 1), r, r * 0.9, soft=0.05)[..., None]
    for cx, cy in spots:
        r = rng.uniform(0.025, 0.05)
        nucleus = _disc(cx, cy, r, r * rng.uniform(0.5, 1), soft=0.25, turn=rng.uniform(0, 3))[..., None]
        image += (blue + rng.normal(0, 0.04) - image) * 0.85 * nucleus
    parts = "crowded purple nuclei" if number % 3 == 0 else "scattered purple nuclei"
    parts += f" and {rings} gland-like rings" if rings else " and pale round fat spaces" if number % 3 == 2 else ""
    return f"Histology phantom in pink and purple as of hematoxylin and eosin, with {parts}.", image


KINDS: tuple[tuple[str, int, Callable[[Rng, int], tuple[str, Plane]]], ...] = (
    ("radiograph", 21, radiograph),
    ("ct", 20, ct),
    ("mr", 20, mr),
    ("ultrasound", 20, ultrasound),
    ("histology", 15, histology),
)


def _disc(x: float, y: float, a: float, b: float, *, soft: float = 0.02, turn: float = 0.0) -> Plane:
    """1 inside an ellipse with half-axes a and b at (x, y), 0 outside, over an edge that is soft wide."""
    u = (X - x) * np.cos(turn) + (Y - y) * np.sin(turn)
    v = (Y - y) * np.cos(turn) - (X - x) * np.sin(turn)
    return 1 / (1 + np.exp(np.clip((np.hypot(u / a, v / b) - 1) / (soft / 2), -60, 60)))


def _blur(plane: NDArray[Any], down: float, across: float) -> Plane:
    """Gaussian blur by standard deviations in pixels, the edges joined."""
    f = np.fft.fftfreq(SIZE)
    weight = np.exp(-2 * np.pi**2 * ((down * f[:, None]) ** 2 + (across * f[None, :]) ** 2))
    return np.real(np.fft.ifft2(np.fft.fft2(plane) * weight))


def _soft(mask: NDArray[np.bool_], pixels: float) -> Plane:
    return _blur(mask.astype(np.float64), pixels, pixels)


def _cloud(rng: Rng, pixels: float) -> Plane:
    """Smooth noise of mean 0 and standard deviation 0.5."""
    plane = _blur(rng.normal(size=X.shape), pixels, pixels)
    return 0.5 * (plane - plane.mean()) / plane.std()


def _side(sign: int) -> str:
    return "left" if sign < 0 else "right"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


if __name__ == "__main__":
    main()
