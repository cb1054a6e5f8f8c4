"""DICOM pixels against pydicom's own functions, on its packaged files and on files made here."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile.errors import BackendUnavailable, InputError
from medcompile.runtime import limits
from medcompile.runtime.image import ImageTransform, decode

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
SECRET = "Roe^Jane"


def packaged(name: str) -> Path:
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this pydicom carries no {name}")
    return Path(path)


def made(stored: Any, **tags: Any) -> bytes:
    """A file that holds stored [h, w], [frames, h, w] or [h, w, 3], with a patient's name in it."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.PatientName = SECRET
    color = stored.ndim == 3 and stored.shape[-1] == 3
    frames = stored.ndim == 3 and not color
    ds.Rows, ds.Columns = stored.shape[1:] if frames else stored.shape[:2]
    if frames:
        ds.NumberOfFrames = len(stored)
    ds.SamplesPerPixel = 3 if color else 1
    if color:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = stored.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def pixels(source: Any, frame: int | None = None) -> Any:
    return np.asarray(decode(source, frame=frame))


def viewed(ds: Dataset) -> Any:
    """What pydicom's functions give, brought from their output range to 0..255."""
    values = apply_modality_lut(ds.pixel_array, ds)
    shown = apply_voi_lut(values, ds).astype(np.float64)
    bits, signed = int(ds.BitsStored), int(ds.PixelRepresentation)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if ds.get("VOILUTSequence"):
        low, high = 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif ds.get("ModalityLUTSequence"):
        low, high = 0, 2 ** ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    elif ds.get("RescaleSlope") is not None:
        low, high = (v * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for v in (low, high))
    shown = np.rint((shown - low) / (high - low) * 255)
    return 255 - shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown


def ct() -> Any:
    """Stored values of a CT-like slice, int16 [64, 48]."""
    y, x = np.mgrid[:64, :48]
    return (x * 31 + y * 17 - 400).astype(np.int16)


def lut(first: int, bits: int, count: int, signed: bool) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", [count, first, bits])
    item.add_new("LUTData", "US", [int(v) for v in np.linspace(0, 1, count) ** 2 * (2**bits - 1)])
    return item


RESCALE = {"RescaleSlope": "1.5", "RescaleIntercept": "-1000"}
WINDOW = {"WindowCenter": "40", "WindowWidth": "400"}
CASES = {
    "window": WINDOW,
    "window of rescaled values": RESCALE | WINDOW,
    "negative slope": {"RescaleSlope": "-2", "RescaleIntercept": "100"} | WINDOW,
    "exact window": RESCALE | WINDOW | {"VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid window": RESCALE | WINDOW | {"VOILUTFunction": "SIGMOID"},
    "inverted": RESCALE | WINDOW | {"PhotometricInterpretation": "MONOCHROME1"},
    "window of one value": {"WindowCenter": "40", "WindowWidth": "1"},
    "the first of two windows": {"WindowCenter": ["40", "900"], "WindowWidth": ["400", "90"]},
    "VOI LUT": {"VOILUTSequence": [lut(-100, 12, 700, True)]},
    "VOI LUT before a window": WINDOW | {"VOILUTSequence": [lut(-100, 10, 300, True)]},
    "modality LUT": {"ModalityLUTSequence": [lut(-400, 16, 2000, True)]}
    | {"WindowCenter": "9000", "WindowWidth": "9000"},
}


@pytest.mark.parametrize("case", CASES)
def test_gray_levels_are_those_of_pydicoms_own_functions(case: str) -> None:
    data = made(ct(), **CASES[case])
    got, expected = pixels(data), viewed(pydicom.dcmread(io.BytesIO(data)))
    assert got.dtype == np.uint8
    assert np.abs(got - expected).max() <= 1  # a half may round to either side
    assert len(np.unique(got)) > (1 if case == "window of one value" else 40)


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
                                  "examples_overlay.dcm", "693_J2KI.dcm"])  # fmt: skip
def test_packaged_windows_are_shown_as_pydicom_shows_them(name: str) -> None:
    ds = pydicom.dcmread(packaged(name))
    expected = viewed(ds)
    got = pixels(packaged(name))
    kept = np.ones(got.shape, bool) if "PixelPaddingValue" not in ds else ds.pixel_array != ds.PixelPaddingValue
    assert np.abs(got - expected)[kept].max() <= 1


@pytest.mark.parametrize("name", ["CT_small.dcm", "JPEG2000.dcm", "rtdose_1frame.dcm", "liver_1frame.dcm"])
def test_without_a_window_the_frames_own_range_is_shown(name: str) -> None:
    ds = pydicom.dcmread(packaged(name))
    values = ds.pixel_array.astype(np.float64)
    kept = values != ds.get("PixelPaddingValue", np.inf)
    low, high = values[kept].min(), values[kept].max()
    expected = np.where(kept, np.clip((values - low) / (high - low) * 255, 0, 255), 0)
    assert np.abs(pixels(packaged(name)) - expected).max() <= 0.51


@pytest.mark.parametrize("name", ["examples_rgb_color.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_ybr_full_422_uncompressed.dcm",
                                  "examples_jpeg2k.dcm", "ExplVR_BigEnd.dcm", "SC_rgb_rle.dcm"])  # fmt: skip
def test_color_is_pydicoms_rgb(name: str) -> None:
    path = packaged(name)
    assert np.array_equal(pixels(path), pixel_array(path))


def test_palettes_and_sixteen_bit_color_become_eight_bit_rgb() -> None:
    path = packaged("examples_palette.dcm")
    ds = pydicom.dcmread(path)
    table = apply_color_lut(ds.pixel_array, ds)
    assert np.array_equal(pixels(path), table >> 8 if table.dtype == np.uint16 else table)
    deep = packaged("SC_rgb_rle_16bit.dcm")
    assert np.array_equal(pixels(deep), pixel_array(deep) >> 8)


def test_padding_counts_for_no_range_and_is_black_also_when_inverted() -> None:
    stored = ct()
    stored[:5] = -2000
    plain = pixels(made(stored, PixelPaddingValue=-2000))
    assert not plain[:5].any()
    assert (plain[5:].min(), plain[5:].max()) == (0, 255)
    inverted = pixels(made(stored, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1"))
    assert not inverted[:5].any()
    assert np.array_equal(inverted[5:], 255 - plain[5:])
    stored[:5, :3] = -1990
    ranged = pixels(made(stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1980))
    assert np.array_equal(ranged, plain)


def test_bits_above_those_stored_are_ignored() -> None:
    stored = (np.arange(64 * 48).reshape(64, 48) % 4096).astype(np.uint16)
    clean = made(stored, BitsStored=12, HighBit=11, WindowCenter="2048", WindowWidth="4096")
    dirty = made(stored | np.uint16(0xA000), BitsStored=12, HighBit=11, WindowCenter="2048", WindowWidth="4096")
    assert np.array_equal(pixels(clean), pixels(dirty))


def test_a_frame_must_be_chosen_among_several() -> None:
    stored = np.stack([ct(), ct()[::-1], ct() * 2])
    data = made(stored, **WINDOW)
    with pytest.raises(InputError, match="3 frames, and none was chosen"):
        decode(data)
    with pytest.raises(InputError, match="no frame 3"):
        decode(data, frame=3)
    for i in range(3):
        assert np.array_equal(pixels(data, frame=i), pixels(made(stored[i], **WINDOW)))


def test_an_enhanced_files_rescale_and_window_are_the_frames_own() -> None:
    def group(**tags: Any) -> Dataset:
        outer = Dataset()
        for sequence, names in (("PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")),
                                ("FrameVOILUTSequence", ("WindowCenter", "WindowWidth"))):  # fmt: skip
            if inner := {n: tags[n] for n in names if n in tags}:
                item = Dataset()
                for name, value in inner.items():
                    setattr(item, name, value)
                setattr(outer, sequence, [item])
        return outer

    windows = [WINDOW, {"WindowCenter": "300", "WindowWidth": "80"}]
    data = made(
        np.stack([ct(), ct()]),
        SharedFunctionalGroupsSequence=[group(**RESCALE)],
        PerFrameFunctionalGroupsSequence=[group(**w) for w in windows],
    )
    for i, window in enumerate(windows):
        assert np.array_equal(pixels(data, frame=i), pixels(made(ct(), **RESCALE, **window)))


def test_dicom_is_told_by_its_content_whatever_it_is_called(tmp_path: Path) -> None:
    data = packaged("MR_small.dcm").read_bytes()
    expected = pixels(data)
    for name in ("scan.png", "scan", "scan.dcm"):
        (tmp_path / name).write_bytes(data)
        assert np.array_equal(pixels(tmp_path / name), expected)
    whole = pydicom.dcmread(io.BytesIO(data))
    bare = io.BytesIO()
    del whole.file_meta
    whole.preamble = None
    pydicom.dcmwrite(bare, whole, implicit_vr=False, little_endian=True, enforce_file_format=False)
    assert bare.getvalue()[128:132] != b"DICM"
    (tmp_path / "bare.dcm").write_bytes(bare.getvalue())
    assert np.array_equal(pixels(tmp_path / "bare.dcm"), expected)


def test_the_transform_takes_dicom() -> None:
    transform = ImageTransform.of(
        {"size": 32, "mode": "shortest", "crop": [32, 32], "resample": "bicubic", "rescale": 1 / 255}
        | {"mean": [0.5] * 3, "std": [0.5] * 3}
    )
    data = made(ct(), **WINDOW)
    assert np.array_equal(transform.pixels(data), transform.pixels(decode(data)))


BAD = {
    "no image": ("test-SR.dcm", "without an image"),
    "a plan": ("rtplan.dcm", "without an image"),
    "cut short": ("MR_truncated.dcm", "damaged, cut short or without pixels"),
    "no decoder": ("SC_rgb_jpeg_gdcm.dcm", "compressed as JPEG Lossless"),
    "JPEG-LS": ("MR_small_jpeg_ls_lossless.dcm", "compressed as JPEG-LS Lossless"),
    "12-bit JPEG": ("JPGExtended.dcm", "compressed as JPEG Extended"),
    "deflated": ("image_dfl.dcm", "deflated"),
    "bad number": ("badVR.dcm", "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_can_not_be_shown_is_refused_by_its_name_with_a_fix(case: str) -> None:
    name, told = BAD[case]
    path = packaged(name)
    if "compressed" in told:
        from pydicom.pixels import get_decoder

        decoder = get_decoder(pydicom.dcmread(path).file_meta.TransferSyntaxUID)
        if {"gdcm", "pylibjpeg", "pyjpegls"} & set(decoder.available_plugins):
            pytest.skip("a decoder is installed here")
    with pytest.raises(InputError, match=told) as caught:
        decode(path)
    assert caught.value.message.startswith(f"{name}: ")
    assert caught.value.fix
    if case == "JPEG-LS":
        assert caught.value.fix == "pip install pyjpegls"


def test_no_error_shows_a_tags_value() -> None:
    data = made(ct(), **WINDOW)
    no_pixels = data[: data.rindex(b"\xe0\x7f\x10\x00")]
    broken = [
        no_pixels,
        data[:-100],
        made(ct(), VOILUTFunction=SECRET.upper(), **WINDOW),
        made(ct(), PhotometricInterpretation=SECRET.upper()),
        data.replace(b"400 ", b"Roe "),
    ]
    for source in broken:
        with warnings.catch_warnings(record=True) as caught_warnings, pytest.raises(InputError) as caught:
            warnings.simplefilter("always")
            decode(source)
        assert "Roe" not in str(caught.value)
        assert "ROE" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        assert not any("Jane" in str(w.message) for w in caught_warnings)


def test_huge_dimensions_are_refused_before_any_pixel_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="65535 x 65535 pixels, above the limit"):
        decode(made(ct(), Rows=65535, Columns=65535))
    monkeypatch.setattr(limits, "PIXELS_LIMIT", 100)
    with pytest.raises(InputError, match="48 x 64 pixels, above the limit of 100"):
        decode(made(ct()))


def test_nan_pixels_are_refused() -> None:
    values = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(64, 48)

    def floats(stored: Any) -> bytes:
        ds = pydicom.dcmread(io.BytesIO(made(ct())))
        del ds.PixelData
        ds.FloatPixelData = stored.tobytes()
        ds.BitsAllocated = 32
        file = io.BytesIO()
        ds.save_as(file)
        return file.getvalue()

    assert np.abs(pixels(floats(values)) - values * 255).max() <= 0.51
    values[3, 3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        decode(floats(values))


def test_every_cut_and_many_flips_give_pixels_or_an_input_error() -> None:
    rng = np.random.default_rng(3)
    whole = made(ct()[:16, :16], **RESCALE, **WINDOW)
    spoilt = [whole[: len(whole) * i // 60] for i in range(8, 60)]
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(132, len(whole) - 500, 3):
            data[at] = rng.integers(0, 256)
        spoilt.append(bytes(data))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in spoilt:
            try:
                assert pixels(data).dtype == np.uint8
            except InputError:
                refused += 1
    assert refused >= 40


def test_without_pydicom_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(ct())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BackendUnavailable) as caught:
        decode(data)
    assert caught.value.fix == 'pip install "medcompile[dicom]"'
