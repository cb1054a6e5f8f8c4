"""Images as data: indices of files, arrays of an .npz, digests, overlap, and what a bad index or array is told."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medcompile import data
from medcompile.errors import DataError, PhiError

SECRET = "Zyxwvut"
"""Stands for a patient's words: no message may ever hold it."""

FILE = {"image": "file"}
LABELLED = {"image": "x", "label": "y"}


def described(folder: Path, file: str, content: bytes, fields: dict[str, str], **more: object) -> data.Manifest:
    """A manifest of that one file, which is written, with its right digest."""
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    keys = {"name": "set", "source": "a test", "licence": "CC0-1.0", "phi": "none", "role": "calibration"}
    keys |= {"format": "npz" if file.endswith(".npz") else "images", "fields": fields, "path": file}
    (folder / "set.yaml").write_text(yaml.safe_dump(keys | {"sha256": hashlib.sha256(content).hexdigest()} | more))
    return data.load_manifest(folder / "set.yaml")


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (6, 4), value).save(out, "PNG")
    return out.getvalue()


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def zipped(**entries: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return out.getvalue()


def grey(count: int, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    """count different images of 3 x 2 pixels."""
    return np.arange(6 * count).reshape(count, 3, 2).astype(dtype)


def indexed(folder: Path, *lines: str, images: int = 3, fields: dict[str, str] | None = None) -> data.Manifest:
    """A manifest of an index in sub/, beside which 0.png, 1.png ... lie."""
    (folder / "sub").mkdir(exist_ok=True)
    for number in range(images):
        (folder / "sub" / f"{number}.png").write_bytes(png(number))
    return described(folder, "sub/index.csv", "\n".join(lines).encode(), fields or FILE)


def test_an_index_gives_images_by_file_with_captions_labels_and_patients(tmp_path: Path) -> None:
    fields = {"image": "file", "text": "caption", "label": "kind", "document": "patient", "id": "n"}
    lines = ("n,file,caption,kind,patient", '7,0.png,"Clear lungs, no effusion.",normal,p1', "8,1.png,Effusion.,ill,p1")
    items = data.read(indexed(tmp_path, *lines, fields=fields)).items
    assert [(i.id, i.text, i.label, i.document) for i in items] == [
        ("7", "Clear lungs, no effusion.", "normal", "p1"),
        ("8", "Effusion.", "ill", "p1"),
    ]
    assert [i.image.open() for i in items if i.image] == [tmp_path / "sub/0.png", tmp_path / "sub/1.png"]


def test_an_index_may_be_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    manifest = described(tmp_path, "index.jsonl", b'{"file": "a.png", "y": 3}\n', {"image": "file", "label": "y"})
    item = data.read(manifest).items[0]
    assert (item.label, item.text, item.words) == ("3", "", ())
    assert item.image is not None
    assert item.image.digest == hashlib.sha256(png(1)).hexdigest()


def test_items_of_texts_have_no_image(tmp_path: Path) -> None:
    manifest = described(tmp_path, "t.jsonl", b'{"text": "a"}\n', {"text": "text"}, format="jsonl")
    assert data.read(manifest).items[0].image is None


def test_the_digest_of_an_item_is_of_the_image_and_its_caption_wherever_they_lie(tmp_path: Path) -> None:
    captions = {"image": "file", "text": "caption"}
    lines = ("file,caption", "0.png,a  b", "copy.png,a b", "0.png,c", "1.png,a b")
    manifest = indexed(tmp_path, *lines, fields=captions)
    (tmp_path / "sub" / "copy.png").write_bytes(png(0))
    same, copy, caption, image = data.read(manifest).items
    assert same.digest == copy.digest
    assert len({same.digest, caption.digest, image.digest}) == 3
    assert same.image == copy.image == caption.image != image.image
    assert hash(same.image) == hash(copy.image)
    canonical = json.dumps({"image": hashlib.sha256(png(0)).hexdigest(), "text": "a b"}, separators=(",", ":"))
    assert same.digest == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_digest_of_the_data_set_sees_an_image_change_though_the_index_does_not(tmp_path: Path) -> None:
    manifest = indexed(tmp_path, "file", "0.png")
    before = data.read(manifest).digest
    assert data.read(manifest).digest == before
    (tmp_path / "sub" / "0.png").write_bytes(png(9))
    assert data.read(manifest).digest != before


def test_a_sha256_column_holds_each_image_to_its_content(tmp_path: Path) -> None:
    digests = [hashlib.sha256(png(n)).hexdigest() for n in range(2)]
    lines = ("file,sum", f"0.png,{digests[0]}", f"1.png,{digests[1]}")
    manifest = indexed(tmp_path, *lines, fields={"image": "file", "sha256": "sum"})
    assert len(data.read(manifest).items) == 2
    (tmp_path / "sub" / "1.png").write_bytes(png(9))
    with pytest.raises(DataError, match=r"index\.csv:3: its image is not the one whose sha256 stands there"):
        data.read(manifest)


BAD_IMAGES = {
    "absolute": ("{outside}", "not named by a path inside"),
    "dots": ("../outside.png", "not named by a path inside"),
    "dots inside": ("deep/../../outside.png", "not named by a path inside"),
    "drive": ("C:outside.png", "not named by a path inside"),
    "backslash": ("\\\\server\\outside.png", "not named by a path inside"),
    "link out": ("link.png", "a link that leaves"),
    "folder link out": ("deep/outside.png", "a link that leaves"),
    "link in a circle": ("circle.png", "is not there"),
    "missing": (f"{SECRET}.png", "is not there"),
    "null byte": (f"{SECRET}\0.png", "is not there"),
    "too long": (SECRET * 1000, "is not there"),
    "folder": (".", "is not a file"),
    "pipe": ("pipe", "is not a file"),
    "blank": (" ", "is not the path of a file"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_an_image_out_of_place_is_told_by_line_and_never_by_name(tmp_path: Path, case: str) -> None:
    written, message = BAD_IMAGES[case]
    (tmp_path / "outside.png").write_bytes(png(5))
    row = json.dumps({"file": written.format(outside=tmp_path / "outside.png")})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "0.png").write_bytes(png(0))
    (tmp_path / "sub" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "sub" / "deep").symlink_to(tmp_path)
    (tmp_path / "sub" / "circle.png").symlink_to(tmp_path / "sub" / "circle.png")
    os.mkfifo(tmp_path / "sub" / "pipe")
    manifest = described(tmp_path, "sub/index.jsonl", b'{"file": "0.png"}\n' + row.encode(), FILE)
    for limit in (None, 1):
        with pytest.raises(DataError, match=r"set: sub/index\.jsonl:2: ") as caught:
            data.read(manifest, limit=limit)
        assert message in str(caught.value)
        assert caught.value.fix
        assert SECRET not in str(caught.value)


def test_a_link_that_stays_inside_the_folder_is_followed(tmp_path: Path) -> None:
    manifest = indexed(tmp_path, "file", "link.png")
    (tmp_path / "sub" / "link.png").symlink_to("1.png")
    item = data.read(manifest).items[0]
    assert item.image is not None
    assert item.image.open() == tmp_path / "sub" / "1.png"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f'{{"file": 3, "t": "{SECRET}"}}', "image is not the path of a file"),
        ('{"file": "0.png", "t": "  "}', "text is empty"),
        (f'{{"file": "0.png", "{SECRET}": "x"}}', "has no key 't'"),
    ],
)
def test_a_malformed_line_of_an_index_is_told_as_in_any_file(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    manifest = described(tmp_path, "i.jsonl", row.encode(), {"image": "file", "text": "t"})
    with pytest.raises(DataError, match=r"i\.jsonl:1: ") as caught:
        data.read(manifest)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


def test_an_image_that_may_not_be_read_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = indexed(tmp_path, "file", "0.png")
    opened = Path.open

    def refuse(self: Path, *args: Any, **more: Any) -> Any:
        if self.name == "0.png":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="its image cannot be read: Permission denied"):
        data.read(manifest)


def test_phi_present_stops_before_an_index_or_an_array_is_opened(tmp_path: Path) -> None:
    manifest = described(tmp_path, "a.npz", npz(x=grey(2)), {"image": "x"}, phi="present")
    (tmp_path / "a.npz").unlink()
    with pytest.raises(PhiError):
        data.read(manifest)


def test_a_dicom_file_in_an_index_is_an_image_and_only_its_pixels_are_kept(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    from medcompile.runtime.image import decode

    slice_ = pydicom.Dataset()
    slice_.file_meta = pydicom.dataset.FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    slice_.PatientName, slice_.PhotometricInterpretation = SECRET, "MONOCHROME2"
    slice_.Rows = slice_.Columns = 4
    slice_.SamplesPerPixel, slice_.PixelRepresentation = 1, 0
    slice_.BitsAllocated = slice_.BitsStored = 16
    slice_.HighBit = 15
    slice_.PixelData = np.arange(16, dtype=np.uint16).tobytes()
    slice_.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    found = data.read(described(tmp_path, "index.csv", b"file,label\na.dcm,ct\n", {"image": "file", "label": "label"}))
    item = found.items[0]
    assert item.image is not None
    assert decode(item.image.open()).size == (4, 4)
    assert SECRET not in repr(found)


def test_rows_of_an_npz_are_views_of_one_array_that_nothing_can_change(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2000, 16, 16), np.uint8)
    found = data.read(described(tmp_path, "a.npz", npz(x=pixels), {"image": "x"}))
    rows = [item.image.open() for item in found.items if item.image]
    assert len(rows) == 2000
    assert all(isinstance(row, np.ndarray) and not row.flags.owndata for row in rows)
    starts = [row.__array_interface__["data"][0] for row in rows if isinstance(row, np.ndarray)]
    assert np.ptp(starts) == 1999 * 256
    assert all(np.array_equal(row, pixels[n]) for n, row in enumerate(rows))
    with pytest.raises(ValueError, match="read-only"):
        rows[0][0, 0] = 1  # type: ignore[index]


def test_a_limit_does_not_keep_the_whole_array_in_memory(tmp_path: Path) -> None:
    found = data.read(described(tmp_path, "a.npz", npz(x=grey(40)), {"image": "x"}), limit=3)
    rows = [item.image.open() for item in found.items if item.image]
    assert len(rows) == 3
    assert all(isinstance(row, np.ndarray) and row.flags.owndata and not row.flags.writeable for row in rows)
    whole = data.read(described(tmp_path, "a.npz", npz(x=grey(40)), {"image": "x"}))
    assert {i.digest for i in found.items} < {i.digest for i in whole.items}


def test_the_digest_of_a_row_is_of_its_type_shape_and_values(tmp_path: Path) -> None:
    def digest(array: np.ndarray[Any, Any]) -> str:
        return data.read(described(tmp_path, "a.npz", npz(x=array), {"image": "x"})).items[0].digest

    row = grey(1)
    assert digest(row) == digest(np.asfortranarray(row)) == digest(np.concatenate([row, row + 1]))
    others = [row.reshape(1, 2, 3), row.astype(np.uint16), row.astype(np.float32), row + 1]
    assert len({digest(row), *(digest(other) for other in others)}) == 5


def test_labels_and_captions_of_an_npz_go_by_row(tmp_path: Path) -> None:
    content = npz(x=grey(2), y=np.array([[1], [0]], np.uint8), t=np.array(["one", "two"]), p=np.array([5, 5]))
    fields = LABELLED | {"text": "t", "document": "p"}
    found = data.read(described(tmp_path, "a.npz", content, fields, label_map={"0": "normal", "1": "pneumonia"}))
    assert [(i.label, i.text, i.document) for i in found.items] == [("pneumonia", "one", "5"), ("normal", "two", "5")]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_an_npz_may_hold_color_and_deeper_pixels(tmp_path: Path, dtype: Any) -> None:
    manifest = described(tmp_path, "a.npz", npz(x=np.zeros((2, 5, 4, 3), dtype)), {"image": "x"})
    image = data.read(manifest).items[1].image
    assert image is not None
    row = image.open()
    assert isinstance(row, np.ndarray)
    assert (row.shape, row.dtype) == ((5, 4, 3), dtype)


BAD_ARRAYS: dict[str, tuple[bytes, str]] = {
    "no such array": (npz(x=grey(2), Y=np.zeros(2, int)), "no array 'y', which fields.label names. Did you mean 'Y'?"),
    "no array alike": (npz(x=grey(2), **{SECRET: np.zeros(2, int)}), "no array 'y', which fields.label names"),
    "objects": (npz(x=grey(2), y=np.array([SECRET, 3], object)), "cannot be read as an .npz of plain arrays"),
    "not a zip": (SECRET.encode(), "cannot be read as an .npz of plain arrays"),
    "cut off": (npz(x=grey(2), y=np.zeros(2, int))[:-30], "cannot be read as an .npz of plain arrays"),
    "another zip": (zipped(x=SECRET.encode(), y=b""), "cannot be read as an .npz of plain arrays"),
    "flat": (npz(x=np.zeros((2, 9), np.uint8), y=np.zeros(2, int)), "images have the shape (2, 9)"),
    "volumes": (npz(x=np.zeros((2, 9, 9, 9), np.uint8), y=np.zeros(2, int)), "images have the shape (2, 9, 9, 9)"),
    "no pixels": (npz(x=np.zeros((2, 0, 9), np.uint8), y=np.zeros(2, int)), "images have the shape (2, 0, 9)"),
    "hounsfield": (npz(x=grey(2, np.int16), y=np.zeros(2, int)), "images have the type int16"),
    "fewer labels": (npz(x=grey(3), y=np.zeros(2, int)), "2 rows of label for 3 images"),
    "many labels": (npz(x=grey(2), y=np.zeros((2, 14), int)), "the array 'y' is int64 of shape (2, 14)"),
    "one label": (npz(x=grey(1), y=np.int64(3)), "the array 'y' is int64 of shape ()"),
    "float labels": (npz(x=grey(2), y=np.zeros(2)), "the array 'y' is float64"),
    "no rows": (npz(x=grey(0), y=np.zeros(0, int)), "a.npz holds no records"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_bad_array_is_told_by_name_type_and_shape(tmp_path: Path, case: str) -> None:
    content, message = BAD_ARRAYS[case]
    with pytest.raises(DataError) as caught:
        data.read(described(tmp_path, "a.npz", content, LABELLED))
    assert message in str(caught.value)
    assert caught.value.fix
    assert SECRET not in str(caught.value)


def test_an_empty_caption_in_an_npz_is_told_by_row(tmp_path: Path) -> None:
    content = npz(x=grey(2), t=np.array([SECRET, " "]))
    with pytest.raises(DataError, match=r"set: a\.npz:row 1: text is empty") as caught:
        data.read(described(tmp_path, "a.npz", content, {"image": "x", "text": "t"}))
    assert SECRET not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.integers(0, 600), st.binary(min_size=1, max_size=8))
def test_an_npz_with_bytes_overwritten_reads_or_raises_data_error(
    tmp_path: Path, inside: bool, start: int, patch: bytes
) -> None:
    """Overwritten in the archive, where checksums show it, or in an array's file before it was archived."""
    array = io.BytesIO()
    np.save(array, grey(4))
    raw = bytearray(array.getvalue() if inside else npz(x=grey(4)))
    start %= len(raw) // (2 if inside else 1)
    raw[start : start + len(patch)] = patch
    content = zipped(x=bytes(raw)) if inside else bytes(raw)
    try:
        found = data.read(described(tmp_path, "a.npz", content, {"image": "x"}))
    except DataError:
        return
    assert all(len(item.digest) == 64 and item.image for item in found.items)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=20) | st.lists(st.sampled_from(["..", ".", "/", "\\", "sub", "0.png", "out.png"])).map("/".join)
)
def test_no_path_of_an_index_leads_out_of_its_folder(tmp_path: Path, written: str) -> None:
    (tmp_path / "out.png").write_bytes(png(1))
    (tmp_path / "sub").mkdir(exist_ok=True)
    (tmp_path / "sub" / "0.png").write_bytes(png(0))
    try:
        found = data.read(described(tmp_path, "sub/i.jsonl", json.dumps({"file": written}).encode(), FILE))
    except DataError:
        return
    for item in found.items:
        assert item.image is not None
        assert item.image.open().is_relative_to(tmp_path / "sub")  # type: ignore[union-attr]


def test_the_same_image_in_calibration_and_evaluation_is_dropped_whatever_its_caption(tmp_path: Path) -> None:
    pair = {"image": "file", "text": "caption"}
    evaluation = data.read(indexed(tmp_path, "file", "1.png"))
    lines = ("file,caption", "0.png,a", "1.png,b", "2.png,c")
    kept, dropped = data.without_overlap(data.read(indexed(tmp_path, *lines, fields=pair)), evaluation)
    assert dropped == 1
    assert [i.text for i in kept.items] == ["a", "c"]
    with pytest.raises(DataError, match="1 of 1 calibration items of set also stand in"):
        data.without_overlap(evaluation, evaluation)


def test_the_same_row_of_two_npz_files_is_dropped(tmp_path: Path) -> None:
    calibration = data.read(described(tmp_path, "a.npz", npz(x=grey(4)), {"image": "x"}))
    evaluation = data.read(described(tmp_path, "b.npz", npz(v=grey(6)[3:]), {"image": "v"}))
    kept, dropped = data.without_overlap(calibration, evaluation)
    assert (len(kept.items), dropped) == (3, 1)


def two(folder: Path, **more: object) -> tuple[data.Dataset, data.Dataset]:
    """An image set `set` and a text set `notes`."""
    images = data.read(described(folder, "a.npz", npz(x=grey(3)), {"image": "x"}))
    keys = {"format": "jsonl", "name": "notes", "licence": "CC BY 4.0", "phi": "deidentified"} | more
    return images, data.read(described(folder, "t.jsonl", b'{"text": "a"}\n', {"text": "text"}, **keys))


def test_joined_data_sets_keep_their_order_and_where_they_came_from(tmp_path: Path) -> None:
    images, notes = two(tmp_path)
    both = data.joined([images, notes])
    assert both.name == "set + notes"
    assert both.items == images.items + notes.items
    assert both.manifests == images.manifests + notes.manifests
    assert (both.licence, both.phi, both.source) == ("CC0-1.0; CC BY 4.0", "deidentified", "a test")
    assert len({both.digest, images.digest, notes.digest, data.joined([notes, images]).digest}) == 4
    assert data.joined([images]) == images
    kept, dropped = data.without_overlap(both, notes)
    assert (dropped, kept.name, kept.items, kept.manifests) == (1, both.name, images.items, both.manifests)


def test_a_set_is_not_joined_with_itself_nor_with_one_of_another_role(tmp_path: Path) -> None:
    images, notes = two(tmp_path, role="acceptance")
    with pytest.raises(DataError, match="set \\+ set: the same data set twice"):
        data.joined([images, images])
    with pytest.raises(DataError, match="different roles: set calibration, notes acceptance"):
        data.joined([images, notes])


def test_prompts_are_part_of_the_data_set(tmp_path: Path) -> None:
    content = npz(x=grey(2), y=np.array([0, 1]))
    plain = data.read(described(tmp_path, "a.npz", content, LABELLED))
    asked = data.read(described(tmp_path, "a.npz", content, LABELLED, prompts={"0": "a hand", "1": "a head"}))
    assert asked.prompts == {"0": "a hand", "1": "a head"}
    assert (plain.prompts, plain.items) == ({}, asked.items)
    assert plain.digest != asked.digest


def test_prompts_may_name_further_classes_or_leave_some_out_but_not_both(tmp_path: Path) -> None:
    content = npz(x=grey(2), y=np.array([0, 1]))
    for prompts in ({"0": "a", "1": "b", "2": "c"}, {"0": "a"}):
        assert data.read(described(tmp_path, "a.npz", content, LABELLED, prompts=prompts)).prompts == prompts
    manifest = described(tmp_path, "a.npz", content, LABELLED, prompts={"0": "a", "one": "b"})
    with pytest.raises(DataError, match="no item has the label one that prompts names, and 1 of 2 labels have no"):
        data.read(manifest)
