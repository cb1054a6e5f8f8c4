"""Verify: evidence made again without torch, and every way in which bundle or data can be other ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medcompile import bundle, data, exams, verify
from medcompile.errors import BundleError, DataError
from medcompile.exams.text import TextExam
from tests import command_line, tiny
from tests.command_line import call
from tests.tiny import Workshop

NO_BUILD_LIBRARY = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Refuse())
"""


def held_out(workshop: Workshop) -> Path:
    return workshop.root / "calibration/held-out.yaml"


def exam(workshop: Workshop, task: str, manifest: Path | None = None) -> exams.Exam:
    built = bundle.read(workshop.bundle)
    found = (
        verify.evaluation(built, held_out(workshop)) if manifest is None else data.read(data.load_manifest(manifest))
    )
    return exams.of(task, verify.setting(built, found))


@pytest.mark.parametrize("task", tiny.TASKS)
def test_the_reference_comes_back_item_by_item(workshop: Workshop, task: str, tmp_path: Path) -> None:
    kept, asked = workshop.bundle / f"reference/{task}.npz", exam(workshop, task)
    found = verify.read_reference(kept, asked)
    assert len(found.values) == len(asked.digests())
    verify.write_reference(tmp_path / "again.npz", asked, found)
    assert (tmp_path / "again.npz").read_bytes() == kept.read_bytes()


def test_reference_answers_to_other_items_are_a_data_error(workshop: Workshop) -> None:
    with pytest.raises(DataError, match="the 48 items asked about are not the 40"):
        verify.read_reference(workshop.bundle / "reference/embed.npz", exam(workshop, "embed", _notes(workshop)))


def test_a_reference_that_is_no_npz_is_a_bundle_error(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "embed.npz").write_bytes(b"PK nonsense")
    with pytest.raises(BundleError, match="holds no reference answers"):
        verify.read_reference(tmp_path / "embed.npz", exam(workshop, "embed"))


def test_verify_makes_every_verdict_again_where_there_is_no_torch(workshop: Workshop) -> None:
    done = command_line.spawn(
        "verify", workshop.bundle, "--data", held_out(workshop), "--json", before=NO_BUILD_LIBRARY
    )
    assert done.returncode == 0, done.stderr
    repeated = {(a["variant"], a["graph"]): a for a in json.loads(done.stdout)}
    recorded = bundle.read(workshop.bundle).artifacts
    assert len(repeated) == len(recorded) == 2 * len(tiny.TASKS)
    for artifact in recorded:
        again = repeated[artifact.variant, artifact.graph]
        assert again["reason"] == "" and again["verdict"] == artifact.verdict
        for ours, theirs in zip(artifact.evidence, again["evidence"], strict=True):
            assert theirs["value"] == pytest.approx(ours.value, abs=1e-5), ours.metric


def test_verify_finds_its_data_in_the_working_directory(
    small: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(small.root)
    assert call("verify", small.bundle).exit_code == 0
    monkeypatch.chdir(tmp_path)
    lost = call("verify", small.bundle)
    assert lost.exit_code == 2 and "--data FILE" in lost.stderr


def test_digests_only_runs_nothing_and_needs_no_data(small: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    done = call("verify", small.bundle, "--digests-only", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["files"] == len(bundle.read(small.bundle).files)


@pytest.mark.parametrize("how", ["other items", "other labels", "fewer items", "one word more"])
def test_other_data_cannot_repeat_the_evidence(workshop: Workshop, tmp_path: Path, how: str) -> None:
    items = tiny.records(40, 2)
    if how == "other items":
        items = tiny.records(40, 3)
    elif how == "other labels":
        items[3]["labels"] = ["O" for _ in items[3]["labels"]]
        items[4]["labels"] = ["B-Disease" for _ in items[4]["labels"]]
    elif how == "fewer items":
        items = items[:-1]
    else:
        items[0] = {**items[0], "words": [*items[0]["words"], "no"], "labels": [*items[0]["labels"], "O"]}
    other = tiny.write_data(tmp_path, "held-out", items)
    done = call("verify", workshop.bundle, "--data", other)
    assert done.exit_code == 1
    assert "is not the data that tiny was judged on" in done.stderr
    assert "Quokkaville" not in done.stderr


def test_a_bundle_judged_on_a_part_of_the_data_is_verified_on_that_part(small: Workshop, tmp_path: Path) -> None:
    small.build(out=tmp_path / "out", overrides=["evaluation.samples=24"])
    done = call("verify", tmp_path / "out", "--data", held_out(small), "--json")
    assert done.exit_code == 0, done.stderr
    assert {e["samples"] for a in json.loads(done.stdout) for e in a["evidence"]} == {24}


def test_a_verdict_that_no_longer_holds_is_a_failure(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(*args: object) -> object:
        answers = honest(*args)  # type: ignore[arg-type]
        return type(answers)(-answers.values)  # type: ignore[operator]

    honest = TextExam.answers
    monkeypatch.setattr(TextExam, "answers", worse)
    done = call("verify", small.bundle, "--data", held_out(small))
    assert done.exit_code == 1
    assert "does not hold on this machine" in done.stderr and "int8 on onnxruntime-cpu: inferior" in done.stderr


def test_a_flipped_byte_in_any_file_of_a_built_bundle_is_found(small: Workshop, tmp_path: Path) -> None:
    place = small.copy(tmp_path / "w").bundle
    files = [p for p in sorted(place.rglob("*")) if p.is_file()]
    assert len(files) > 10
    for file in files:
        raw = bytearray(file.read_bytes())
        for at in {0, len(raw) // 2, len(raw) - 1}:
            raw[at] ^= 0x10
            file.write_bytes(raw)
            with pytest.raises(BundleError):
                bundle.read(place)
            raw[at] ^= 0x10
        file.write_bytes(raw)
    bundle.read(place)


def _notes(workshop: Workshop) -> Path:
    return workshop.root / "calibration/notes.yaml"
