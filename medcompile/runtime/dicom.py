"""From a DICOM file to the 8-bit pixels that a viewer would show first. Needs pydicom, imported once a file is read.

The standard's steps (PS3.3 C.11 and C.7.6.3): stored values, Modality LUT or rescale, VOI LUT or window, photometric.
- A VOI LUT comes before a window, and of several the first counts. With neither, or with a window of no width, the
  frame's own range of modality values is shown, darkest to 0 and brightest to 255.
- MONOCHROME1 is inverted. Pixel padding counts for no range and is black. RGB, YBR and palettes become RGB.
- Several frames: one must be chosen. An enhanced file's rescale and window are that frame's own.
- Only the tags named here are read, and only pixels leave. Errors tell the file's name and never a tag's value, except
  for the transfer syntax, whose decoder may have to be installed.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from medcompile.errors import BackendUnavailable, InputError
from medcompile.runtime.limits import check_frame, check_size, stretched

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

Array = np.ndarray[Any, Any]

_PALETTE = "{}PaletteColorLookupTable{}"
PIXEL_TAGS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(_PALETTE.format(c, part) for c in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
    *("Segmented" + _PALETTE.format(c, "Data") for c in ("Red", "Green", "Blue")),
]
"""All that is read beside the pixels. Of the functional groups, only rescale and window are looked at."""

FRAME_TAGS = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}

DEFLATED = b"1.2.840.10008.1.2.1.99"

# What pydicom and its decoders raise on broken files. Their words may quote tags, so only the kind is told.
BROKEN = (
    *(AttributeError, AssertionError, EOFError, IndexError, KeyError, NotImplementedError, OSError, OverflowError),
    *(RuntimeError, TypeError, ValueError, struct.error, zlib.error),
)


def read_dicom(file: BinaryIO, *, frame: int | None, name: str) -> Array:
    """One frame of an open file as uint8 [h, w] or [h, w, 3].

    Raises InputError naming the file where it can't be used, and BackendUnavailable without pydicom.
    """
    try:
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
        from pydicom.pixels.utils import pixel_array
    except ImportError:
        raise BackendUnavailable(
            f"{name}: DICOM is read by pydicom, which is not installed", fix='pip install "medcompile[dicom]"'
        ) from None

    if DEFLATED in file.read(4096):
        raise InputError(
            f"{name}: a deflated DICOM file, which may unpack to any size",
            fix="convert it to Explicit VR Little Endian, for example with dcmconv +te",
        )
    file.seek(0)
    syntax: UID | None = None
    try:
        ds = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=list(PIXEL_TAGS))
        if ds.get("Rows") is None or ds.get("Columns") is None or ds.get("PhotometricInterpretation") is None:
            raise InputError(f"{name}: a DICOM file without an image", fix="leave reports, plans and notes out")
        check_size(int(ds.Columns), int(ds.Rows), name)
        chosen = check_frame(int(ds.get("NumberOfFrames") or 1), frame, name)
        syntax = _transfer_syntax(ds, name)
        file.seek(0)
        stored = pixel_array(file, index=chosen, transfer_syntax_uid=syntax)
        _take_frame_tags(ds, chosen)
        return _color(stored, ds, name) if _is_color(ds, name) else _gray(stored, ds, name)
    except (*BROKEN, BytesLengthException, InvalidDicomError) as error:
        if syntax is not None and syntax.is_compressed:
            raise InputError(
                f"{name}: pixels compressed as {syntax.name} could not be decoded ({type(error).__name__})",
                fix="fetch it again, or pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, which decode more",
            ) from None
        raise InputError(
            f"{name}: a DICOM file that is damaged, cut short or without pixels ({type(error).__name__})",
            fix="fetch or export it again",
        ) from None


def _transfer_syntax(ds: Dataset, name: str) -> UID:
    """How the pixels are stored. Raises InputError where nothing here decodes that."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax: UID | None = ds.file_meta.get("TransferSyntaxUID")
    if not syntax:
        implicit, little = ds.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    known = syntax.name if syntax.name != syntax else "an unknown transfer syntax"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise InputError(
            f"{name}: stored as {known}, which pydicom doesn't decode",
            fix="convert it to Explicit VR Little Endian, for example with gdcmconv --raw",
        ) from None
    if not decoder.is_available:
        packages = re.findall(r"[\w-]+(?=>=)", decoder.missing_dependencies[-1])
        raise InputError(
            f"{name}: compressed as {known}, and no decoder of it is installed",
            fix=f"pip install {' '.join(packages)}",
        )
    return syntax


def _take_frame_tags(ds: Dataset, frame: int) -> None:
    """Put an enhanced file's rescale and window for that frame where a classic file has them."""
    groups = [*(ds.get("SharedFunctionalGroupsSequence") or [])[:1]]
    groups += (ds.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in groups:
        for sequence, keywords in FRAME_TAGS.items():
            for item in (group.get(sequence) or [])[:1]:
                for keyword in keywords:
                    if keyword in item:
                        setattr(ds, keyword, item.get(keyword))


def _is_color(ds: Dataset, name: str) -> bool:
    photometric = ds.PhotometricInterpretation
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        return False
    if photometric in ("RGB", "PALETTE COLOR") or photometric.startswith("YBR_"):
        return True
    raise InputError(f"{name}: a photometric interpretation that is not read here", fix="convert it to RGB")


def _color(stored: Array, ds: Dataset, name: str) -> Array:
    """stored, already RGB or palette indices, as uint8 [h, w, 3]."""
    bits = int(ds.BitsStored)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        stored = apply_color_lut(stored, ds)[..., :3]
        # Entries of 8 bits may lie in 16, in the lower byte.
        bits = 8 if stored.max() < 256 and ds.RedPaletteColorLookupTableDescriptor[2] == 8 else stored.itemsize * 8
    if stored.ndim != 3:
        raise InputError(f"{name}: a color image of one channel", fix="fetch or export it again")
    return (stored >> max(0, bits - 8)).astype(np.uint8)


def _gray(stored: Array, ds: Dataset, name: str) -> Array:
    """stored [h, w] as uint8, as a viewer shows it."""
    if stored.ndim != 2:
        raise InputError(f"{name}: a gray image of several channels", fix="fetch or export it again")
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise InputError(f"{name}: NaN or infinite pixels", fix="fetch or export it again")
    if stored.dtype.kind == "f" or stored.itemsize > 2:
        return _shown(stored, np.ones(stored.shape, bool), ds, name)
    # At most 65,536 values can occur: work each out once, and look the pixels up.
    index = stored.astype(np.int32) - int(stored.min())
    seen = np.bincount(index.ravel()) > 0
    return _shown(np.arange(len(seen)) + int(stored.min()), seen, ds, name)[index]


def _shown(stored: Array, seen: Array, ds: Dataset, name: str) -> Array:
    """Gray levels, uint8, of stored values of any shape. seen: bool, the values that occur in the frame."""
    padding = _padding(stored, ds)
    values = stored
    if ds.get("ModalityLUTSequence"):
        values = _look_up(stored, ds.ModalityLUTSequence[0], ds)
    elif ds.get("RescaleSlope") is not None and ds.get("RescaleIntercept") is not None:
        values = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    fractions = _window(values, ds, name)
    if ds.get("VOILUTSequence"):
        item = ds.VOILUTSequence[0]
        fractions = _look_up(values, item, ds) / (2.0 ** int(item.LUTDescriptor[2]) - 1)
    if fractions is None:
        shown = stretched(values, seen & ~padding)
    else:
        shown = np.rint(np.clip(fractions, 0, 1) * 255).astype(np.uint8)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        shown = 255 - shown
    shown[padding] = 0
    return shown


def _padding(stored: Array, ds: Dataset) -> Array:
    """bool: where stored is no measurement but what fills the image up to a rectangle (PS3.3 C.7.5.1.1.2)."""
    value = ds.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = ds.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _look_up(values: Array, item: Dataset, ds: Dataset) -> Array:
    """A Modality or VOI LUT's outputs: below its first value the first entry, past its end the last (PS3.3 C.11.1)."""
    count, first = int(item.LUTDescriptor[0]) or 1 << 16, int(item.LUTDescriptor[1])
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if ds.original_encoding[1] else ">"
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * count else f"{order}u2", count)
    table = np.atleast_1d(np.asarray(data, np.int64))
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]


def _window(values: Array, ds: Dataset, name: str) -> Array | None:
    """values as fractions of the window, or None where there is none (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    center, width = _first(ds.get("WindowCenter")), _first(ds.get("WindowWidth"))
    if center is None or width is None:
        return None
    function = (ds.get("VOILUTFunction") or "LINEAR").upper()
    if width < 1 if function == "LINEAR" else width <= 0:
        return None
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if function in ("LINEAR", "LINEAR_EXACT"):
        return (values - center) / width + 0.5 if width else (values > center) * 1.0
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))))
    raise InputError(f"{name}: a VOI LUT function that the standard doesn't know", fix="export it with a LINEAR window")


def _first(value: Any) -> float | None:
    """The first of a tag's values, or None where it has none."""
    if value is None or isinstance(value, (str, bytes)):
        return float(value) if value else None
    if hasattr(value, "__len__"):
        return float(value[0]) if len(value) else None
    return float(value)
