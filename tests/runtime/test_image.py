"""The image transform against open_clip's and transformers' own, and what bad images meet."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL import ImageFile

from medcompile.errors import BundleError, InputError
from medcompile.runtime import limits
from medcompile.runtime.image import ImageTransform, decode

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def facts(**changed: Any) -> dict[str, Any]:
    base = {"size": 224, "mode": "shortest", "crop": [224, 224], "resample": "bicubic", "fill": 0}
    return base | {"rescale": 1 / 255, "mean": MEAN, "std": STD} | changed


def levels(ours: Any, theirs: Any) -> float:
    """The largest difference in 8-bit levels."""
    assert ours.shape == theirs.shape
    return float(np.abs((ours - theirs) * np.array(STD, np.float32)[:, None, None] * 255).max())


def scene(height: int, width: int, channels: int, seed: int) -> np.ndarray[Any, Any]:
    """Edges, ramps and noise: uint8 [height, width, channels]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = []
    for c in range(channels):
        ramp = (x * (3 + c) + y * (2 + seed % 5)) % 256
        disc = 255 * ((x - width / 2) ** 2 + (y - height / (2 + c)) ** 2 < (min(height, width) / 3) ** 2)
        planes.append(np.where(rng.random((height, width)) < 0.3, rng.integers(0, 256, (height, width)), ramp ^ disc))
    return np.stack(planes, -1).astype(np.uint8)


SIZES = [(1, 1), (3, 500), (500, 3), (7, 5), (224, 224), (225, 224), (300, 451), (512, 512), (640, 333), (1000, 1501)]


def encoded(image: PIL.Image.Image, format_: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def varied() -> Iterator[tuple[str, bytes]]:
    """100 image files: ten kinds in ten sizes (h, w), and among them each kind of color that files hold."""
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    for seed, (h, w) in enumerate(SIZES):
        rgb = PIL.Image.fromarray(scene(h, w, 3, seed))
        gray = PIL.Image.fromarray(scene(h, w, 1, seed)[..., 0])
        rgba = PIL.Image.fromarray(scene(h, w, 4, seed))
        deep = scene(h, w, 1, seed)[..., 0].astype(np.uint16) * 16 + 7
        size = f"{h}x{w}"
        yield f"gray PNG {size}", encoded(gray, "PNG")
        yield f"gray JPEG {size}", encoded(gray, "JPEG")
        yield f"LA PNG {size}", encoded(PIL.Image.fromarray(scene(h, w, 2, seed)), "PNG")
        yield f"RGBA PNG {size}", encoded(rgba, "PNG")
        yield f"palette {size}", encoded(rgb.quantize(17), "PNG", **({"transparency": 0} if seed % 2 else {}))
        yield f"16-bit {size}", encoded(PIL.Image.fromarray(deep), "PNG" if seed % 2 else "TIFF")
        yield f"CMYK JPEG {size}", encoded(rgb.convert("CMYK"), "JPEG")
        yield f"1-bit {size}", encoded(gray.convert("1"), "PNG")
        yield f"turned JPEG {size}", encoded(rgb, "JPEG", exif=turned, quality=90)
        yield f"TIFF {size}", encoded(rgb, "TIFF", compression="tiff_lzw")


FILES = list(varied())


def eight_bit(name: str, data: bytes) -> PIL.Image.Image:
    """What the other pipelines are given: 16 bits are scaled first, since they would clip them at 255."""
    image = PIL.Image.open(io.BytesIO(data))
    if name.startswith("16-bit"):
        values = np.asarray(image).astype(np.float64)
        span = max(1.0, values.max() - values.min())
        return PIL.Image.fromarray(np.rint((values - values.min()) / span * 255).astype(np.uint8))
    return image


@pytest.mark.parametrize(
    ("size", "mode", "resample", "fill"),
    [
        (224, "shortest", "bicubic", 0),
        (224, "squash", "bilinear", 0),
        (224, "longest", "bicubic", 90),
        ((160, 200), "shortest", "bicubic", 0),
        ((201, 150), "longest", "bilinear", 0),
    ],
)
def test_a_hundred_images_are_as_open_clips_own_transform_gives_them(
    size: Any, mode: str, resample: str, fill: int
) -> None:
    transform = pytest.importorskip("open_clip.transform")
    theirs = transform.image_transform_v2(
        transform.PreprocessCfg(
            size=size, mean=MEAN, std=STD, interpolation=resample, resize_mode=mode, fill_color=fill
        ),
        is_train=False,
    )
    pair = [size, size] if isinstance(size, int) else list(size)
    edge = pair if mode == "squash" or not isinstance(size, int) else size
    ours = ImageTransform.of(facts(size=edge, mode=mode, crop=pair, resample=resample, fill=fill))
    assert len(FILES) == 100
    wrong = {}
    for name, data in FILES:
        try:
            expected = theirs(eight_bit(name, data)).numpy()
        except ValueError as error:  # open_clip rounds a thin image's short edge to 0
            assert "must be > 0" in str(error)
            assert mode == "longest"
            continue
        difference = levels(ours.pixels(data), expected)
        if difference > 0.001:
            wrong[name] = difference
    assert not wrong


@pytest.mark.parametrize("crop", [224, 201, 260])
def test_a_hundred_images_are_as_transformers_gives_them_on_pillow_and_near_it_on_torchvision(crop: int) -> None:
    """transformers' two processors are two levels apart themselves where little is stretched far."""
    transformers = pytest.importorskip("transformers")
    settings = {"size": {"shortest_edge": 224}, "crop_size": {"height": crop, "width": crop}}
    settings |= {"image_mean": MEAN, "image_std": STD}
    pillow, torchvision = transformers.CLIPImageProcessorPil(**settings), transformers.CLIPImageProcessor(**settings)
    ours = ImageTransform.of(facts(crop=[crop, crop], convention="transformers"))
    for name, data in FILES:
        image, got = eight_bit(name, data), ours.pixels(data)
        expected = torchvision(image, return_tensors="np")["pixel_values"][0]
        assert levels(got, expected) <= 2.001, name
        far = np.abs(got - expected) * np.array(STD, np.float32)[:, None, None] * 255 > 1.001
        assert far.mean() < 0.001, name
        if crop == 224:  # the two round odd crop margins and padding apart; ours goes with the default, torchvision
            assert levels(got, pillow(image, return_tensors="np")["pixel_values"][0]) <= 0.001, name


def test_a_huge_image_is_as_open_clip_gives_it() -> None:
    transform = pytest.importorskip("open_clip.transform")
    theirs = transform.image_transform(224, is_train=False, mean=MEAN, std=STD)
    image = PIL.Image.fromarray(np.tile(scene(700, 500, 3, 1), (6, 12, 1)))
    assert image.size == (6000, 4200)
    assert levels(ImageTransform.of(facts()).pixels(image), theirs(image).numpy()) <= 0.001


@pytest.mark.parametrize("resample", ["nearest", "lanczos"])
def test_every_filter_gives_pillows_own_resize(resample: str) -> None:
    image = PIL.Image.fromarray(scene(333, 640, 3, 2))
    own = image.resize((430, 224), PIL.Image.Resampling[resample.upper()]).crop((103, 0, 327, 224))
    same = ImageTransform.of(facts(size=[224, 224], mode="squash"))
    got = ImageTransform.of(facts(resample=resample)).pixels(image)
    assert levels(got, same.pixels(own)) <= 0.001


def test_a_line_of_pixels_takes_no_memory_beyond_its_crop() -> None:
    line = PIL.Image.fromarray(np.arange(200_000, dtype=np.uint32).astype(np.uint8)[None])
    assert ImageTransform.of(facts()).pixels(line).shape == (3, 224, 224)


def test_another_resolution_keeps_the_proportion_of_edge_and_crop() -> None:
    image = PIL.Image.fromarray(scene(300, 451, 3, 3))
    at_224 = ImageTransform.of(facts(size=256))
    assert at_224.size == (224, 224)
    got = at_224.pixels(image, resolution=336)
    assert np.array_equal(got, ImageTransform.of(facts(size=384, crop=[336, 336])).pixels(image))
    squash = ImageTransform.of(facts(size=[224, 224], mode="squash", crop=None))
    assert squash.pixels(image, resolution=100).shape == (3, 100, 100)


def test_out_is_filled_and_returned_and_another_shape_is_refused() -> None:
    transform, image = ImageTransform.of(facts()), scene(50, 60, 3, 4)
    batch = np.zeros((2, 3, 224, 224), np.float32)
    row = batch[1]
    assert transform.pixels(image, out=row) is row
    assert np.array_equal(batch[1], transform.pixels(image))
    assert not batch[0].any()
    with pytest.raises(InputError, match="out is float64"):
        transform.pixels(image, out=np.zeros((3, 224, 224)))


def test_orientation_tags_are_left_alone_as_the_checkpoints_own_pipeline_does() -> None:
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    image = PIL.Image.fromarray(scene(60, 40, 3, 5))
    with_tag, without = encoded(image, "PNG", exif=turned), encoded(image, "PNG")
    assert decode(with_tag).size == (40, 60)
    transform = ImageTransform.of(facts())
    assert np.array_equal(transform.pixels(with_tag), transform.pixels(without))


def test_sixteen_bit_gray_is_scaled_by_its_range_and_not_clipped_white() -> None:
    deep = (np.arange(300 * 300, dtype=np.uint32).reshape(300, 300) % 4096).astype(np.uint16)
    expected = np.rint(deep.astype(np.float64) / 4095 * 255)
    files = [encoded(PIL.Image.fromarray(deep), f) for f in ("PNG", "TIFF")]
    for source in (deep, deep[..., None], deep[:200, :200], *files):
        got = np.asarray(decode(source))
        assert np.array_equal(got, expected[: got.shape[0], : got.shape[1]])
    assert not np.asarray(decode(np.full((4, 4), 60_000, np.uint16))).any()


def test_arrays_of_each_kind_mean_the_same_image() -> None:
    rgb = scene(20, 30, 3, 6)
    assert np.array_equal(np.asarray(decode(rgb)), rgb)
    assert np.array_equal(np.asarray(decode(rgb / np.float32(255))), rgb)
    assert np.array_equal(np.asarray(decode(rgb.astype(np.uint16) * 257)), rgb)
    assert np.array_equal(np.asarray(decode(np.asfortranarray(rgb))), rgb)
    assert np.array_equal(np.asarray(decode(np.dstack([rgb, np.full((20, 30), 9, np.uint8)]))), rgb)
    assert np.array_equal(np.asarray(decode(rgb[..., :1])), rgb[..., 0])
    assert np.array_equal(np.asarray(decode(rgb[..., 0] > 100)), (rgb[..., 0] > 100) * 255)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), 200.0), "outside 0 to 1"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]"),
        (np.zeros((0, 8), np.uint8), "8 x 0 pixels"),
        (np.zeros((4, 4), np.int16), "int16"),
        (np.zeros(4, np.uint8), r"shape \[4\]"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000)), "above the limit"),
    ],
)
def test_an_array_that_is_no_image_is_refused_by_name(array: Any, told: str) -> None:
    with pytest.raises(InputError, match=rf"^image 7: .*{told}") as caught:
        ImageTransform.of(facts()).pixels(array, name="image 7")
    assert caught.value.fix


def test_pages_and_frames_must_be_chosen_and_exist() -> None:
    pages = [PIL.Image.fromarray(np.full((8, 8), 50 * i, np.uint8)) for i in range(4)]
    for format_ in ("TIFF", "GIF"):
        data = encoded(pages[0], format_, save_all=True, append_images=pages[1:])
        with pytest.raises(InputError, match="4 frames, and none was chosen") as caught:
            decode(data)
        assert "0 to 3" in caught.value.fix
        assert [np.asarray(decode(data, frame=i).convert("L"))[0, 0] for i in (2, 0, 3)] == [100, 0, 150]
        for absent in (4, -1):
            with pytest.raises(InputError, match="no frame"):
                decode(data, frame=absent)
    assert decode(encoded(pages[1], "PNG"), frame=0).getpixel((0, 0)) == 50


def test_a_camera_jpeg_with_a_preview_is_one_picture() -> None:
    first, preview = (PIL.Image.fromarray(scene(h, 40, 3, h)) for h in (60, 6))
    data = encoded(first, "MPO", save_all=True, append_images=[preview])
    assert PIL.Image.open(io.BytesIO(data)).format == "MPO"
    assert decode(data).size == (40, 60)


def jpeg() -> bytes:
    return encoded(PIL.Image.fromarray(scene(300, 300, 3, 8)), "JPEG")


def png() -> bytes:
    return encoded(PIL.Image.fromarray(scene(300, 300, 3, 8)), "PNG")


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels, in a few kilobytes."""
    data = bytearray(encoded(PIL.Image.new("1", (8, 8)), "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "cut.jpg": (lambda: jpeg()[:5000], "damaged or cut short"),
    "cut.png": (lambda: png()[:5000], "damaged or cut short"),
    "flipped.png": (lambda: png()[:3000] + b"\0" * 3000 + png()[6000:], "damaged or cut short"),
    "empty.png": (lambda: b"", "an empty file"),
    "zeros.png": (lambda: bytes(5000), "not an image"),
    "bomb.png": (bomb, "pixels"),
    "text.png": (lambda: b"Patient: Jane Roe\n" * 40, "not an image"),
    "text.dcm": (lambda: b"Patient: Jane Roe\n" * 40, "without an image|damaged"),
    "page.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_its_name_with_a_fix_and_none_of_its_content(name: str, tmp_path: Path) -> None:
    make, told = BAD[name]
    (tmp_path / name).write_bytes(make())
    with warnings.catch_warnings(), pytest.raises(InputError, match=told) as caught:
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        ImageTransform.of(facts()).pixels(tmp_path / name)
    assert caught.value.message.startswith(f"{name}: ")
    assert caught.value.fix
    assert "Roe" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_every_cut_and_many_flips_of_a_file_give_an_image_or_an_input_error() -> None:
    rng = np.random.default_rng(9)
    transform = ImageTransform.of(facts())
    small = PIL.Image.fromarray(scene(24, 31, 3, 9))
    refused = 0
    for format_ in ("PNG", "JPEG", "TIFF", "GIF", "BMP"):
        whole = encoded(small, format_)
        spoilt = [whole[: len(whole) * i // 40] for i in range(1, 40)]
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, min(len(data), 400), 4):
                data[at] = rng.integers(0, 256)
            spoilt.append(bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for data in spoilt:
                try:
                    assert transform.pixels(data).shape == (3, 224, 224)
                except InputError:
                    refused += 1
    assert refused > 100


def test_a_folder_a_missing_file_and_another_type_are_refused(tmp_path: Path) -> None:
    for source, told in ((tmp_path, "directory"), (tmp_path / "gone.png", "gone.png: No such"), (42, "is int")):
        with pytest.raises(InputError, match=told):
            decode(source)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="null"):
        decode("a\0b.png")


def test_the_limit_of_pixels_holds_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PIXELS_LIMIT", 1000)
    with pytest.raises(InputError, match="300 x 300 pixels, above the limit of 1,000"):
        decode(jpeg()[:2000])  # cut short, which decoding would notice first


def test_cut_files_are_refused_whatever_was_refused_before() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(InputError):
        decode(jpeg()[:5000])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_decoded_images_carry_no_metadata() -> None:
    described = PIL.Image.Exif()
    described[0x010E] = "Jane Roe"
    image = decode(encoded(PIL.Image.fromarray(scene(9, 9, 3, 1)), "JPEG", exif=described, comment=b"Jane Roe"))
    assert image.info == {}
    assert not image.getexif()


def test_threads_share_one_transform() -> None:
    transform = ImageTransform.of(facts())
    files = [data for _, data in FILES[:24]]
    alone = [transform.pixels(f) for f in files]
    start = threading.Barrier(4)

    def work(_: int) -> list[Any]:
        start.wait()
        return [transform.pixels(f) for f in files]

    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(work, range(4)):
            assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_transform_is_read_from_a_bundles_assets_and_a_wrong_one_refused(tmp_path: Path) -> None:
    (tmp_path / "transform.json").write_text(json.dumps(facts()))
    assert ImageTransform.read(tmp_path).size == (224, 224)
    for wrong in ({"mode": "stretch"}, {"std": [0, 1, 1]}, {"mean": [1]}, {"crop": None}, {"size": "x"}, {"size": 0}):
        (tmp_path / "transform.json").write_text(json.dumps(facts(**wrong)))
        with pytest.raises(BundleError, match=r"transform\.json"):
            ImageTransform.read(tmp_path)


def test_importing_the_room_loads_neither_pillow_nor_pydicom_nor_torch() -> None:
    code = "import sys, medcompile.runtime.image; print([m for m in ('PIL', 'pydicom', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
