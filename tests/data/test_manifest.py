"""Data manifests: what good ones become, and what bad ones are told."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medcompile import data
from medcompile.errors import DataError

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted((ROOT / "calibration").glob("*.yaml"))

GOOD = f"""\
name: notes
source: written for a test
licence: CC0-1.0
phi: none
role: calibration
format: jsonl
fields: {{text: note}}
path: notes.jsonl
sha256: {"a" * 64}
"""


def load(folder: Path, text: str) -> data.Manifest:
    path = folder / "notes.yaml"
    path.write_text(text)
    return data.load_manifest(path)


def test_one_path_and_one_digest_count_as_lists_of_one(tmp_path: Path) -> None:
    manifest = load(tmp_path, GOOD)
    assert manifest.paths == ("notes.jsonl",)
    assert manifest.sha256 == ("a" * 64,)
    assert manifest.fields == {"text": "note"}
    assert manifest.language == "en"


BAD = {
    "no phi": ("phi: none\n", "", (1, 1), "missing key 'phi'"),
    "odd phi": ("phi: none", "phi: maybe", (4, 6), "'maybe' is not known here"),
    "unknown key": ("licence:", "license:", (3, 1), "unknown key 'license' in the file. Did you mean 'licence'?"),
    "format not offered": ("jsonl\n", "parquet\n", (6, 9), "'parquet' is not known here"),
    "odd role": ("role: calibration", "role: test", (5, 7), "'test' is not known here"),
    "unknown field": ("{text: note}", "{txt: note}", (7, 10), "unknown key 'txt' in fields. Did you mean 'text'?"),
    "no main field": ("{text: note}", "{label: note}", (7, 9), "exactly one of text, words, query and image"),
    "two main fields": ("{text: note}", "{text: a, query: b}", (7, 9), "exactly one of text, words, query and image"),
    "query alone": ("{text: note}", "{query: b}", (7, 17), "fields.query goes with passage"),
    "labels alone": ("{text: note}", "{text: a, labels: b}", (7, 27), "fields.labels goes with words"),
    "number in jsonl": ("{text: note}", "{text: 0}", (7, 16), "name the jsonl key or column"),
    "words in csv": ("jsonl\nfields: {text: note}", "csv\nfields: {words: w}", (7, 17), "csv holds no lists"),
    "name in conll": ("jsonl\nfields: {text: note}", "conll\nfields: {words: w}", (7, 17), "counted from 0"),
    "text in conll": ("jsonl\nfields: {text: note}", "conll\nfields: {text: 0}", (7, 16), "conll has no text"),
    "short digest": ("a" * 64, "abc", (9, 9), "'abc' is not a sha256"),
    "digest missing": ("sha256: " + "a" * 64 + "\n", "", (1, 1), "missing key 'sha256'"),
    "fewer digests": ("notes.jsonl", "[a, b]", (9, 9), "1 sha256 for 2 files"),
    "keep without labels": ("role:", "keep: [X]\nrole:", (5, 7), "keep needs labels in fields"),
    "map without labels": ("role:", "label_map: {a: b}\nrole:", (5, 12), "label_map needs labels or label"),
    "image in jsonl": ("{text: note}", "{image: f}", (7, 17), "jsonl has no image; its items are texts"),
    "sha256 in jsonl": ("{text: note}", "{text: note, sha256: s}", (7, 30), "fields.sha256 goes with image"),
    "prompts of texts": ("role:", "prompts: {a: b}\nrole:", (5, 10), "prompts needs image and label in fields"),
}
IMAGES = GOOD.replace("jsonl\nfields: {text: note}", "npz\nfields: {image: x, label: y}").replace(
    "notes.jsonl", "a.npz"
)
MAPPED = f"{IMAGES}label_map: {{'0': normal, '1': pneumonia}}\n"
BAD_IMAGES = {
    "image with words": ("label: y", "words: y", (7, 9), "or image with text"),
    "image with query": ("label: y", "query: y, passage: z", (7, 9), "or image with text"),
    "image with a pair": ("label: y", "text: y, text_pair: z", (7, 40), "npz has no text_pair; it has image, text"),
    "no image": ("image: x, label: y", "text: t", (7, 9), "npz needs image in fields"),
    "lists": ("label: y", "labels: y", (7, 28), "npz holds no lists, so no labels"),
    "number for an array": ("label: y", "label: 0", (7, 27), "fields.label: name the array"),
    "digests beside arrays": ("label: y", "sha256: y", (7, 28), "npz has no sha256"),
    "misspelt field": ("image: x", "imag: x", (7, 10), "unknown key 'imag' in fields. Did you mean 'image'?"),
    "misspelt format": ("npz", "image", (6, 9), "'image' is not known here. Did you mean 'images'?"),
    "a folder of images": ("format: npz", "format: images", (8, 7), "'a.npz' is not the name of an index of images"),
    "prompts without label": (", label: y}", "}\nprompts: {a: b}", (8, 10), "prompts needs image and label in fields"),
    "prompt that is no text": (IMAGES, IMAGES + "prompts: {a: 3}\n", (10, 14), "prompts.a must be text, not 3"),
    "empty prompt": (IMAGES, IMAGES + "prompts: {a: ''}\n", (10, 14), "prompts.a is empty"),
    "misspelt label": (
        IMAGES,
        MAPPED + "prompts: {normal: a, pneumonai: b}\n",
        (11, 33),
        "label_map gives no label 'pneumonai'. Did you mean 'pneumonia'?",
    ),
    "label before the map": (
        IMAGES,
        MAPPED + "prompts: {'0': a, pneumonia: b}\n",
        (11, 16),
        "label_map gives no label '0'. Did you mean 'normal'?",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_manifest_of_images_is_told_where_and_what(tmp_path: Path, case: str) -> None:
    old, new, (line, column), message = BAD_IMAGES[case]
    assert old in IMAGES
    with pytest.raises(DataError) as caught:
        load(tmp_path, IMAGES.replace(old, new, 1))
    told = [t for t in str(caught.value).splitlines() if message in t]
    assert told, str(caught.value)
    assert f"notes.yaml:{line}:{column}: " in told[0]


def test_prompts_say_what_the_classes_are_called(tmp_path: Path) -> None:
    prompts = "prompts: {normal: clear lungs, pneumonia: an opacity, foreign body: a coin}\n"
    assert load(tmp_path, MAPPED + prompts).prompts["pneumonia"] == "an opacity"
    assert load(tmp_path, IMAGES).prompts == {}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_manifest_is_told_where_and_what(tmp_path: Path, case: str) -> None:
    old, new, (line, column), message = BAD[case]
    assert old in GOOD
    with pytest.raises(DataError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    told = [t for t in str(caught.value).splitlines() if message in t]
    assert told, str(caught.value)
    assert f"notes.yaml:{line}:{column}: " in told[0]


def test_all_problems_of_a_manifest_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, GOOD.replace("phi: none\n", "").replace("role: calibration", "role: x").replace("text:", "txt:"))
    assert str(caught.value).count("notes.yaml:") == 4


def test_a_missing_manifest_or_a_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        data.load_manifest(tmp_path / "x.yaml")
    with pytest.raises(DataError, match="is a folder"):
        data.load_manifest(tmp_path)


def test_a_file_is_looked_for_beside_the_manifest_and_then_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDCOMPILE_DATA", raising=False)
    manifest = load(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"notes: no file notes\.jsonl") as caught:
        manifest.file("notes.jsonl")
    assert "written for a test" in caught.value.fix
    assert "MEDCOMPILE_DATA" in caught.value.fix
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes.jsonl").write_text("{}")
    monkeypatch.setenv("MEDCOMPILE_DATA", str(elsewhere))
    assert manifest.file("notes.jsonl") == elsewhere / "notes.jsonl"
    (tmp_path / "notes.jsonl").write_text("{}")
    assert manifest.file("notes.jsonl") == tmp_path / "notes.jsonl"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_manifest_names_itself_its_source_and_its_licence(path: Path) -> None:
    manifest = data.load_manifest(path)
    assert manifest.name == path.stem
    assert manifest.phi == "none"
    assert manifest.source
    assert manifest.licence


OWN = [p for p in SHIPPED if p.with_suffix(".jsonl").is_file()]


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_a_set_of_our_own_is_the_one_that_its_manifest_describes(path: Path) -> None:
    manifest = data.load_manifest(path)
    assert manifest.sha256[0] == hashlib.sha256(path.with_suffix(".jsonl").read_bytes()).hexdigest()
    dataset = data.read(manifest)
    assert len(dataset.items) >= 200
    assert len({item.digest for item in dataset.items}) == len(dataset.items)
    assert len({item.id for item in dataset.items}) == len(dataset.items)


def test_our_own_sets_do_not_overlap() -> None:
    sets = [data.read(data.load_manifest(path)) for path in OWN]
    for one in sets:
        for other in sets:
            if one is not other:
                assert data.without_overlap(one, other)[1] == 0


def test_public_sets_read_as_their_manifests_say(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    monkeypatch.setenv("MEDCOMPILE_DATA", str(shared / "data"))
    sets = {n: data.read(data.load_manifest(ROOT / "calibration" / f"{n}.yaml")) for n in PUBLIC}
    assert {n: len(s.items) for n, s in sets.items()} == PUBLIC
    devel, train, cdr = (sets[n] for n in ("ncbi-disease-devel", "ncbi-disease-train", "bc5cdr-disease"))
    assert sum(label == "B-Disease" for item in devel.items for label in item.labels) == 787
    assert {label for item in cdr.items for label in item.labels} == {"O", "B-Disease", "I-Disease"}
    disjoint, dropped = data.without_overlap(train, devel)
    assert dropped == 12
    assert len(disjoint.items) == 5424 - 12
    assert {item.label for item in sets["pubmedqa"].items} == {"yes", "no", "maybe"}


PUBLIC = {
    "ncbi-disease-train": 5424,
    "ncbi-disease-devel": 923,
    "bc5cdr-disease": 9141,
    "pubmedqa": 500,
    "mts-dialog": 1201,
    "roco-captions": 3388,
    "pneumoniamnist": 524,
    "pneumoniamnist-train": 4682,
    "mednist": 900,
    "mednist-train": 3000,
}


def test_public_sets_of_images_have_a_prompt_for_every_label_and_share_nothing(
    monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    monkeypatch.setenv("MEDCOMPILE_DATA", str(shared / "data"))
    for name, classes in (("pneumoniamnist", 2), ("mednist", 6)):
        judged, other = (data.read(data.load_manifest(ROOT / f"calibration/{n}.yaml")) for n in (name, f"{name}-train"))
        assert {i.label for i in judged.items} == {i.label for i in other.items} == set(judged.prompts)
        assert len(judged.prompts) == classes
        assert data.without_overlap(other, judged)[1] == 0


def test_the_phantoms_are_few_small_and_of_every_kind_and_do_not_overlap_other_sets() -> None:
    phantoms = data.read(data.load_manifest(ROOT / "calibration" / "medical-phantoms.yaml"))
    assert len({item.image for item in phantoms.items}) == len({item.id for item in phantoms.items}) == 96
    assert {item.label for item in phantoms.items} == {"radiograph", "ct", "mr", "ultrasound", "histology"}
    assert all("phantom" in item.text for item in phantoms.items)
    assert sum(f.stat().st_size for f in (ROOT / "calibration" / "medical-phantoms").iterdir()) < 1_500_000
    captions = data.read(data.load_manifest(ROOT / "calibration" / "image-captions.yaml"))
    assert len(data.joined([phantoms, captions]).items) == 96 + len(captions.items)
    assert data.without_overlap(phantoms, captions)[1] == 0


def test_the_script_draws_the_phantoms_that_are_there() -> None:
    spec = importlib.util.spec_from_file_location("draw_phantoms", ROOT / "calibration" / "draw_phantoms.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    phantoms = data.read(data.load_manifest(ROOT / "calibration" / "medical-phantoms.yaml"))
    drawn = script.draw()
    assert [(i.label, i.text) for i in phantoms.items] == [(label, caption) for label, caption, _ in drawn]
    for item, (_, _, pixels) in zip(phantoms.items, drawn, strict=True):
        assert item.image is not None
        with Image.open(item.image.open()) as image:  # type: ignore[arg-type]
            stored = np.asarray(image)
        # Another numpy or CPU may round a value the other way.
        assert stored.shape == pixels.shape
        assert np.abs(stored.astype(int) - pixels).mean() < 0.01
