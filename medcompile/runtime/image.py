"""From an image, however it is stored, to the float32 pixels that a checkpoint's own pipeline would give its tower.

Pillow opens and resizes, numpy normalizes; DICOM is dicom.py's. Threads may share one ImageTransform: it never changes.

What "its own pipeline" means, and where this one differs on purpose:
- convention "open_clip" resizes in the file's own mode and converts to RGB last: palette and 1-bit images are resized
  by nearest neighbour, alpha weighs the resize and is then dropped. "transformers" lays transparent images on white,
  converts to RGB first, and rounds an odd crop margin down. Both are kept to: the evidence is of what runs here.
- EXIF orientation is not applied, because neither pipeline applies it. A photo that lies on its side stays so: pass
  PIL.ImageOps.exif_transpose(image) to have it upright.
- Gray of more than 8 bits (PNG, TIFF, uint16 arrays) is brought to 8 bits by its own range, darkest to 0 and brightest
  to 255, before anything else. Both pipelines would clip at 255, which turns a 16-bit radiograph white. Flat is black.
- Several pages or frames in a file: one must be chosen by frame=, since a silent first one may be the wrong slice.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from medcompile.errors import BundleError, InputError
from medcompile.runtime.dicom import read_dicom
from medcompile.runtime.limits import check_frame, check_size, stretched
from medcompile.runtime.text import read_json

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    Image = str | os.PathLike[str] | bytes | np.ndarray[Any, Any] | PilImage
    """An image as callers may give it: a path, a file's bytes, an array as from_array() takes it, a Pillow image."""

Array = np.ndarray[Any, Any]

WHOLE_LIMIT = 1 << 24
"""Pixels that a resize may hold before its crop: a line of 1 x 50,000 would become 224 x 11,200,000."""

FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000")
"""What Pillow may try: formats that hold pixels alone, none that runs an interpreter."""

# What Pillow's readers raise on broken files, as seen; UnidentifiedImageError is an OSError.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)

MODES = ("shortest", "longest", "squash")
RESAMPLES = ("nearest", "bilinear", "bicubic", "lanczos")
CONVENTIONS = ("open_clip", "transformers")


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop, convert, normalize. Build it with of() or read().

    edge: the wanted (height, width) after resizing, or the int that the "shortest" or "longest" edge gets.
    crop: (height, width) or None for "squash" without a crop; what is smaller than the crop is padded with fill.
    scale, bias: float32 [3]; pixels = 8-bit value * scale + bias.
    """

    edge: int | tuple[int, int]
    mode: str
    crop: tuple[int, int] | None
    resample: str
    fill: int
    scale: Array
    bias: Array
    convention: str

    @classmethod
    def read(cls, assets: Path) -> ImageTransform:
        """From a folder with transform.json. Raises BundleError."""
        path = assets / "transform.json"
        return cls.of(read_json(path, dict), where=str(path))

    @classmethod
    def of(cls, facts: Mapping[str, Any], *, where: str = "transform.json") -> ImageTransform:
        """From transform.json's content; "convention" may be missing and is then "open_clip". Raises BundleError."""
        try:
            size, crop = facts["size"], facts["crop"]
            std = np.array(facts["std"], np.float64)
            mean = np.array(facts["mean"], np.float64)
            if std.shape != (3,) or mean.shape != (3,) or not (std > 0).all():
                raise ValueError("mean and std are three numbers each, std above 0")
            made = cls(
                edge=int(size) if isinstance(size, int) else (int(size[0]), int(size[1])),
                mode=facts["mode"],
                crop=None if crop is None else (int(crop[0]), int(crop[1])),
                resample=facts["resample"],
                fill=int(facts.get("fill", 0)),
                scale=(float(facts["rescale"]) / std).astype(np.float32),
                bias=(-mean / std).astype(np.float32),
                convention=facts.get("convention", "open_clip"),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BundleError(f"{where}: {type(error).__name__}: {error}", fix="rebuild the bundle") from error
        sizes = [*np.atleast_1d(made.edge), *(made.crop or ())]
        wrong = (
            made.mode not in MODES
            or made.resample not in RESAMPLES
            or made.convention not in CONVENTIONS
            or min(sizes) < 1
            or (made.crop is None and made.mode != "squash")
        )
        if wrong:
            raise BundleError(f"{where}: not a transform that this version knows", fix="rebuild the bundle")
        return made

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what pixels() gives where no resolution is asked for."""
        return self.crop or _pair(self.edge)

    def pixels(
        self,
        source: Image,
        *,
        frame: int | None = None,
        resolution: int | None = None,
        out: Array | None = None,
        name: str = "image",
    ) -> Array:
        """The tower's input of one image: float32 [3, height, width].

        frame: counts from 0; must be given where there are several. resolution: another height and width; the edge
        keeps its proportion to it. out: float32 [3, height, width] to fill and return. name: what errors call a source
        that has no file name. Raises InputError naming the image where it can't be used.
        """
        wanted = self.size if resolution is None else (resolution, resolution)
        if out is None:
            out = np.empty((3, *wanted), np.float32)
        elif out.shape != (3, *wanted) or out.dtype != np.float32:
            raise InputError(f"out is {out.dtype} {list(out.shape)}", fix=f"pass float32 {[3, *wanted]}")
        name = source_name(source, name)
        image = open_image(source, frame=frame, name=name)
        with _refusing(name):
            if self.convention == "transformers":
                image = _flat(image, on_white=True)
            image = _flat(self._resized(image, wanted), on_white=False)
            bands = image.split() * (3 // len(image.getbands()))
        for plane, band, scale, bias in zip(out, bands, self.scale, self.bias, strict=True):
            plane[...] = np.asarray(band)
            np.multiply(plane, scale, out=plane)
            np.add(plane, bias, out=plane)
        return out

    def _resized(self, image: PilImage, wanted: tuple[int, int]) -> PilImage:
        """image, still in its mode, resized and cropped or padded to wanted (height, width)."""
        import PIL.Image

        resample = PIL.Image.Resampling[self.resample.upper()]
        (width, height), (full_h, full_w) = image.size, self._scaled(image.size, wanted)
        top, left = self._lead(full_h, wanted[0]), self._lead(full_w, wanted[1])
        y, x, h, w = max(top, 0), max(left, 0), min(full_h, wanted[0]), min(full_w, wanted[1])
        if full_h * full_w <= WHOLE_LIMIT:
            # Whole, then cropped: to resize a part alone saves a fifth of the time, but rounds otherwise.
            image = image.resize((full_w, full_h), resample).crop((x, y, x + w, y + h))
        else:
            box = (x * width / full_w, y * height / full_h, (x + w) * width / full_w, (y + h) * height / full_h)
            image = image.resize((w, h), resample, box=box)
        if (h, w) == wanted:
            return image
        # In the file's own mode, as open_clip pads: a palette's colour 0, a CMYK without ink, which is white.
        color = self.fill if len(image.getbands()) == 1 else (self.fill,) * len(image.getbands())
        canvas = PIL.Image.new(image.mode, wanted[::-1], color)
        if image.palette is not None:
            canvas.putpalette(image.getpalette() or [])
        canvas.paste(image, (max(-left, 0), max(-top, 0)))
        return canvas

    def _scaled(self, size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the whole resized image. size: (width, height) of the original."""
        width, height = size
        edge = self.edge
        if wanted != self.size:
            base = self.size
            edges = tuple(round(e * n / b) for e, n, b in zip(_pair(edge), wanted, base, strict=True))
            edge = edges[0] if isinstance(edge, int) else (edges[0], edges[1])
        if self.mode == "squash":
            return _pair(edge)
        if self.mode == "shortest" and isinstance(edge, int):
            short, long = sorted(size)
            other = int(edge * long / short)
            return (other, edge) if width <= height else (edge, other)
        ratios = [n / e for n, e in zip((height, width), _pair(edge), strict=True)]
        ratio = min(ratios) if self.mode == "shortest" else max(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _lead(self, full: int, wanted: int) -> int:
        """Where the crop starts on one axis; negative: how much padding comes first."""
        if full < wanted:
            return -((wanted - full) // 2)
        return round((full - wanted) / 2) if self.convention == "open_clip" else (full - wanted) // 2


def decode(source: Image, *, frame: int | None = None, name: str = "image") -> PilImage:
    """One image or frame as 8-bit Pillow, mode RGB or L, without metadata; transparency is dropped.

    Raises InputError naming the image.
    """
    name = source_name(source, name)
    image = open_image(source, frame=frame, name=name)
    with _refusing(name):
        image = _flat(image, on_white=False).copy()
    image.info = {}
    return image


def source_name(source: object, name: str = "image") -> str:
    """What errors call a source: a path's file name, else the name given."""
    return Path(source).name or name if isinstance(source, (str, os.PathLike)) else name


def open_image(source: Image, *, frame: int | None, name: str) -> PilImage:
    """One image or frame, decoded, 8-bit, in its own mode (palette, alpha, CMYK kept). Raises InputError."""
    import PIL.Image

    if isinstance(source, np.ndarray):
        check_frame(1, frame, name)
        return from_array(source, name)
    if isinstance(source, PIL.Image.Image):
        check_frame(1, frame, name)  # the page that its owner has it at
        return _loaded(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), frame, name, suffix="")
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"{name} is {type(source).__name__}, not an image",
            fix="pass a path, a file's bytes, a numpy array or a Pillow image",
        )
    path = Path(source)
    try:
        with path.open("rb") as file:
            return _from_file(file, frame, name, suffix=path.suffix.lower())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{name}: {reason}", fix="name an image file that can be read") from None


def from_array(values: Array, name: str = "image") -> PilImage:
    """An array as 8-bit Pillow: L, RGB or RGBA.

    values: [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]. uint8 and bool stand as they are; uint16 of one channel is
    brought to 8 bits by its range, of several by its upper byte; floats are fractions, 0 to 1. Raises InputError.
    """
    import PIL.Image

    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in {2, 3} or (values.ndim == 3 and values.shape[2] not in {3, 4}):
        raise InputError(
            f"{name}: an array of shape {list(values.shape)}",
            fix="pass [height, width], or [height, width, 3] with the channels last",
        )
    check_size(values.shape[1], values.shape[0], name)
    if values.dtype == np.bool_:
        values = values * np.uint8(255)
    elif values.dtype == np.uint16:
        values = stretched(values) if values.ndim == 2 else (values >> 8).astype(np.uint8)
    elif values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise InputError(f"{name}: NaN or infinite pixels", fix="replace them before passing the array")
        if values.min() < 0 or values.max() > 1:
            raise InputError(
                f"{name}: float pixels outside 0 to 1",
                fix="scale them to 0..1 by the window that a reader would use, or pass uint8 or uint16",
            )
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise InputError(f"{name}: pixels of type {values.dtype}", fix="pass uint8, uint16, or floats from 0 to 1")
    return PIL.Image.fromarray(np.ascontiguousarray(values))


def _from_file(file: BinaryIO, frame: int | None, name: str, suffix: str) -> PilImage:
    """Sort by content: DICOM says so after 128 bytes; a .dcm that Pillow doesn't know may be one without a preamble."""
    import PIL.Image

    head = file.read(132)
    file.seek(0)
    if not head:
        raise InputError(f"{name}: an empty file", fix="fetch or export it again")
    dicom = head[128:] == b"DICM"
    if not dicom:
        try:
            with _refusing(name):
                image = PIL.Image.open(file, formats=FORMATS)
        except InputError as error:
            if suffix not in {".dcm", ".dicom"} or not isinstance(error.__cause__, PIL.UnidentifiedImageError):
                raise
            file.seek(0)
            dicom = True
    if dicom:
        return from_array(read_dicom(file, frame=frame, name=name), name)
    with _refusing(name):
        check_size(*image.size, name)
        _at_frame(image, frame, name)
    return _loaded(image, name)


def _at_frame(image: PilImage, frame: int | None, name: str) -> None:
    """Turn image to the frame asked for."""
    # A camera's JPEG may carry a preview as a second picture; that is no series of frames.
    count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    chosen = check_frame(count, frame, name)
    if count > 1:
        image.seek(chosen)


def _loaded(image: PilImage, name: str) -> PilImage:
    """image decoded and with 8 bits per channel."""
    with _refusing(name):
        check_size(*image.size, name)
        image.load()
        if image.mode == "F":
            return from_array(np.asarray(image), name)
        if image.mode.startswith("I"):
            return from_array(stretched(np.asarray(image)), name)
    return image


def _flat(image: PilImage, *, on_white: bool) -> PilImage:
    """image as RGB, or as L where its channels would be equal."""
    import PIL.Image

    if on_white and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn what Pillow raises on a bad file into InputError."""
    import PIL
    import PIL.Image

    try:
        yield
    except PIL.UnidentifiedImageError as error:
        raise InputError(
            f"{name}: not an image that can be read here",
            fix="pass PNG, JPEG, TIFF or DICOM; the content counts, not the file's ending",
        ) from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise InputError(f"{name}: too many pixels", fix="cut or downscale it first") from None
    except MemoryError:
        raise InputError(f"{name}: more pixels than memory holds", fix="cut or downscale it first") from None
    except BROKEN as error:
        # The reader's own words may quote the file, so only their kind is told.
        raise InputError(
            f"{name}: damaged or cut short ({type(error).__name__})", fix="fetch or export the file again"
        ) from None


def _pair(edge: int | tuple[int, int]) -> tuple[int, int]:
    return (edge, edge) if isinstance(edge, int) else edge
