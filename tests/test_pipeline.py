"""The pipeline: what runs again after which change, what a killed build leaves, and whether two builds are the same."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import medcompile
from medcompile import backends, bundle, pipeline, report
from medcompile.errors import (
    BackendUnavailable,
    BundleError,
    CalibrationError,
    OverBudgetError,
    PassError,
    PhiError,
    UsageError,
)
from medcompile.passes.quantize import Quantize
from medcompile.program import Context, Program
from tests import command_line, tiny
from tests.tiny import Events, Workshop

TELL_TIMES = {bundle.MANIFEST, bundle.EVIDENCE, report.REPORT}
"""Files that hold measured times, which no two builds share."""
AFTER_QUANTIZE = {"build int8 for onnxruntime-cpu", "verify int8 for onnxruntime-cpu"}


def ran(workshop: Workshop, tmp_path: Path, **how: Any) -> set[str]:
    """The steps that building again takes, into a place of its own."""
    events = Events()
    workshop.build(**{"out": tmp_path / "out", "progress": events} | how)
    assert not set(events.began) & set(events.cached)
    return set(events.began)


def timeless(place: Path) -> dict[str, Any]:
    """A bundle's manifest without the times that were measured when it was built, and its own digest over them."""
    text = json.loads((place / bundle.MANIFEST).read_text())
    for artifact in text["artifacts"]:
        assert artifact.pop("latency_ms") > 0
    for name in TELL_TIMES - {bundle.MANIFEST}:
        del text["files"][name]
    told = json.loads((place / bundle.EVIDENCE).read_text())
    for artifact in told["artifacts"]:
        assert artifact.pop("latency_ms") > 0
    return {key: value for key, value in text.items() if key not in {"digest", "sha256"}} | {"told": told}


# ---- what runs


def test_an_unchanged_build_runs_nothing_and_gives_the_same_bytes(small: Workshop, tmp_path: Path) -> None:
    assert ran(small, tmp_path) == set()
    assert tiny.contents(tmp_path / "out") == tiny.contents(small.bundle)


def test_a_variants_setting_runs_again_from_quantize_and_for_that_variant_alone(
    small: Workshop, tmp_path: Path
) -> None:
    # A setting that no other test builds, for they all share one cache.
    changed = ran(small, tmp_path, overrides=["variants.int8.keep=[encoder.layer.1.intermediate.dense]"])
    assert changed == {"quantize int8", "cast int8", *AFTER_QUANTIZE}


def test_another_way_to_clip_runs_again_from_quantize(small: Workshop, tmp_path: Path) -> None:
    percentile = ["calibration.method=percentile", "calibration.percentile=99.0", "variants.int8.method=rtn"]
    assert "quantize int8" in ran(small, tmp_path / "a", overrides=percentile)
    graph = tmp_path / "a/out/graphs/int8/embed.onnx"
    percentile[1] = "calibration.percentile=90.0"
    assert ran(small, tmp_path / "b", overrides=percentile) == {"quantize int8", "cast int8", *AFTER_QUANTIZE}
    assert (tmp_path / "b/out/graphs/int8/embed.onnx").read_bytes() != graph.read_bytes()


def test_another_budget_runs_verify_alone(small: Workshop, tmp_path: Path) -> None:
    changed = ran(small, tmp_path, overrides=["budget.cosine.max_drop=0.25"])
    assert changed == {"verify fp32 for onnxruntime-cpu", "verify int8 for onnxruntime-cpu"}


def test_other_calibration_data_runs_again_from_calibrate(small: Workshop, tmp_path: Path) -> None:
    changed = ran(small, tmp_path, overrides=["calibration.samples=36"])
    assert changed == {"calibrate", "quantize int8", "cast int8", *AFTER_QUANTIZE}


def test_other_evaluation_data_asks_the_reference_again_and_lowers_nothing(small: Workshop, tmp_path: Path) -> None:
    changed = ran(small, tmp_path, overrides=["evaluation.samples=30"])
    assert {s.split()[0] for s in changed} == {"reference", "verify"}


def test_a_moved_checkpoint_is_traced_again_and_nothing_more(small: Workshop, tmp_path: Path) -> None:
    shutil.copytree(small.root / "model", tmp_path / "moved")
    changed = ran(small, tmp_path, overrides=[f"model.source=path:{tmp_path / 'moved'}"])
    assert changed == {"export"}


def test_the_steps_come_in_the_order_of_the_passes(small: Workshop, tmp_path: Path) -> None:
    events = Events()
    small.build(out=tmp_path / "out", progress=events)
    passes = [s for s in events.cached if s.split()[0] in {"export", "simplify", "calibrate", "quantize", "cast"}]
    assert passes == ["export", "simplify", "cast fp32", "calibrate", "quantize int8", "cast int8"]


# ---- determinism


@pytest.mark.slow
def test_builds_in_other_folders_processes_and_caches_give_the_same_bytes(workshop: Workshop, tmp_path: Path) -> None:
    recipe = tiny.write_workshop(tmp_path / "else where" / "é", tiny.TASKS)
    out = tmp_path / "another" / "place"
    done = command_line.spawn(
        "build", recipe, "--out", out, "--cache", tmp_path / "c", env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = tiny.contents(workshop.bundle), tiny.contents(out)
    assert sorted(ours) == sorted(theirs)
    assert {f for f in ours if ours[f] != theirs[f]} <= TELL_TIMES
    assert timeless(out) == timeless(workshop.bundle)


# ---- kills and races


@pytest.mark.slow
def test_a_build_killed_at_every_step_in_turn_ends_in_the_same_bundle(small: Workshop, tmp_path: Path) -> None:
    recipe, out = tiny.write_workshop(tmp_path), tmp_path / "engines" / "tiny"
    arguments = ("build", recipe, "--out", out, "--cache", tmp_path / "cache", "--json")
    kills = 0
    while True:
        process = command_line.start(*arguments)
        assert process.stderr is not None
        begun = 0
        for line in process.stderr:
            begun += json.loads(line)["event"] == "begin"
            if begun == 2:  # each run finishes one step and dies in the next
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        with pytest.raises(BundleError):
            medcompile.load(out)
        with pytest.raises(BundleError):
            bundle.read(out, check=False)
    assert kills >= 8
    assert [p.name for p in out.parent.iterdir()] == ["tiny"]
    assert [p.name for p in (tmp_path / "cache/build").glob("tmp-*")] == []
    ours, theirs = tiny.contents(small.bundle), tiny.contents(out)
    assert {f for f in ours if ours[f] != theirs[f]} <= TELL_TIMES
    assert timeless(out) == timeless(small.bundle)


def test_a_build_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    recipe, out = tiny.write_workshop(tmp_path), tmp_path / "engines" / "tiny"
    process = command_line.start("build", recipe, "--out", out, "--cache", tmp_path / "cache", "--json")
    assert process.stderr is not None
    for line in process.stderr:
        if json.loads(line)["event"] == "begin":
            process.terminate()
            break
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list(out.parent.iterdir()) == []
    assert list((tmp_path / "cache/build").glob("tmp-*")) == []


@pytest.mark.slow
def test_two_builds_of_one_recipe_into_one_folder_both_succeed(small: Workshop, tmp_path: Path) -> None:
    recipe, out = tiny.write_workshop(tmp_path), tmp_path / "engines" / "tiny"
    arguments = ("build", recipe, "--out", out, "--cache", tmp_path / "cache")
    both = [command_line.start(*arguments) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert [p.name for p in out.parent.iterdir()] == ["tiny"]
    bundle.read(out)
    assert timeless(out) == timeless(small.bundle)


# ---- the budget


def test_an_impossible_budget_leaves_a_bundle_that_load_takes_only_by_name(small: Workshop, tmp_path: Path) -> None:
    with pytest.raises(OverBudgetError) as caught:
        small.build(out=tmp_path / "out", overrides=["budget.cosine.max_drop=1e-9"])
    message = str(caught.value)
    assert caught.value.bundle == str(tmp_path / "out")
    assert "int8 on onnxruntime-cpu: inferior" in message
    assert "int8 hurts embed most in encoder.layer." in message and "output moves by" in message
    assert "keep" in caught.value.fix
    written = bundle.read(tmp_path / "out")
    assert {a.variant: a.verdict for a in written.artifacts}["int8"] == "inferior"
    with medcompile.load(tmp_path / "out", variant="int8") as session:
        assert session.embed(["pain"]).shape == (1, tiny.HIDDEN)
    with medcompile.load(tmp_path / "out") as session:
        assert session.variant.name == "fp32"


def test_with_no_fp32_to_fall_back_on_load_refuses_what_is_over_budget(small: Workshop, tmp_path: Path) -> None:
    document = tiny.recipe(variants={"int8": {"weights": "int8", "activations": "int8", "dynamic": True}})
    document |= {"calibration": None, "budget": {"cosine": {"max_drop": 1e-9}}, "name": "lone"}
    recipe = tiny.write_recipe(small.root, {k: v for k, v in document.items() if v is not None})
    with pytest.raises(OverBudgetError, match="hurts embed most in"):
        small.build(path=recipe, out=tmp_path / "out")
    with pytest.raises(OverBudgetError, match="no variant is shown to be non-inferior"):
        medcompile.load(tmp_path / "out")
    medcompile.load(tmp_path / "out", variant="int8").close()


# ---- data


def test_calibration_items_that_are_also_judged_on_are_dropped_and_noted(small: Workshop, tmp_path: Path) -> None:
    root = small.copy(tmp_path / "w").root
    held_out = tiny.records(40, 2)
    tiny.write_data(root / "calibration", "notes", tiny.records(48, 1) + held_out[:5], role="calibration")
    events = Events()
    built = small.build(
        path=root / "recipes/tiny.yaml", out=tmp_path / "out", progress=events, overrides=["calibration.samples=99"]
    )
    assert built.provenance["calibration"]["items"] == 48
    assert any(n.startswith("5 calibration items also stand in the evaluation data") for n in events.notes)
    assert built.provenance["notes"] == events.notes


def test_data_with_patient_information_is_read_only_when_this_run_allows_it(small: Workshop, tmp_path: Path) -> None:
    root = small.copy(tmp_path / "w").root
    tiny.write_data(root / "calibration", "held-out", tiny.records(40, 2), phi="present")
    again = {"path": root / "recipes/tiny.yaml", "out": tmp_path / "out"}
    with pytest.raises(PhiError, match="--allow-phi"):
        small.build(**again)
    assert not (tmp_path / "out").exists()
    built = small.build(**again, allow_phi=True)
    assert built.provenance["evaluation"]["phi"] == "present"


@pytest.mark.slow
def test_no_word_of_the_data_reaches_bundle_cache_or_screen(tmp_path: Path) -> None:
    recipe = tiny.write_workshop(tmp_path / "w", tiny.TASKS)
    arguments = ("build", recipe, "--out", tmp_path / "out", "--cache", tmp_path / "cache", "-v")
    done = command_line.spawn(*arguments)
    assert done.returncode == 0, done.stderr
    over = command_line.spawn(*arguments, "--set", "budget.cosine.max_drop=1e-9")
    assert over.returncode == 3, over.stderr
    said = (done.stdout + done.stderr + over.stdout + over.stderr).encode()
    found = {"said": said, **tiny.contents(tmp_path / "out"), **tiny.contents(tmp_path / "cache")}
    assert len(found) > 50
    for word in tiny.PLANTED.split():
        forms = [word.encode(), word.lower().encode(), word.encode("utf-16-le"), word.encode().hex().encode()]
        assert [name for name, raw in found.items() for form in forms if form in raw] == []


# ---- targets


def test_a_target_that_cannot_be_built_here_is_a_stated_reason(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backends.get("openvino")

    def missing(self: object, target: str) -> None:
        raise BackendUnavailable("no OpenVINO here", fix="pip install it")

    monkeypatch.setattr(type(backend), "probe", missing)
    built = small.build(out=tmp_path / "out", overrides=["targets=[onnxruntime-cpu, openvino-cpu, tensorrt]"])
    skipped = {s["target"]: s for s in built.provenance["skipped_targets"]}
    assert skipped["openvino-cpu"] == {
        "target": "openvino-cpu",
        "reason": "no OpenVINO here",
        "fix": "pip install it",
    }
    assert "tensorrt" in skipped
    assert {a.target.name for a in built.artifacts} == {"onnxruntime-cpu"}


def test_no_target_at_all_is_an_error_with_every_reason(small: Workshop, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        small.build(out=tmp_path / "out", overrides=["targets=[tensorrt, onnxruntime-cuda]"])
    assert "none of the recipe's targets" in str(caught.value) and caught.value.fix
    assert "tensorrt:" in caught.value.message and "onnxruntime-cuda:" in caught.value.message
    assert not (tmp_path / "out").exists()


# ---- failures


def test_a_pass_that_fails_names_itself_the_node_and_what_ran_before(small: Workshop, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        small.build(out=tmp_path / "out", overrides=["calibration.samples=8"])
    assert (caught.value.step, caught.value.before) == ("calibrate", ("assets", "export", "simplify", "cast fp32"))
    assert str(caught.value).startswith("calibrate failed: embed: 8 calibration items, and 32 are the least")
    assert "ran before: assets, export, simplify" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_librarys_exception_in_a_pass_is_wrapped_with_its_cause_and_its_place(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Quantize, program: Program, ctx: Context) -> Program:
        ctx.progress.step("embed: encoder.layer.1.output.dense/MatMul", 3, 9)
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(Quantize, "__call__", broken)
    with pytest.raises(PassError) as caught:
        small.build(out=tmp_path / "out", overrides=["variants.int8.keep=['*pooler*']"])
    error = caught.value
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert (error.step, error.at) == ("quantize int8", "embed: encoder.layer.1.output.dense/MatMul")
    assert str(error).startswith(f"quantize int8 failed at {error.at}: ZeroDivisionError: division by zero")
    assert "calibrate" in error.before and "-v" in error.fix
    assert list(tmp_path.iterdir()) == []
    assert list((small.cache / "build").glob("tmp-*")) == []


def test_a_wrong_place_to_write_is_told_before_any_work(small: Workshop, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("keep me")
    events = Events()
    with pytest.raises(UsageError, match="is not a bundle"):
        small.build(out=tmp_path / "mine", progress=events)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="Not a directory"):
        small.build(out=tmp_path / "file" / "x", progress=events)
    assert events.began == events.cached == []
    assert (tmp_path / "mine/letter.txt").read_text() == "keep me"


def test_a_cache_that_cannot_be_written_is_told_with_what_to_check(small: Workshop, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PassError, match=r"assets failed: (NotADirectory|FileExists)Error") as caught:
        small.build(out=tmp_path / "out", cache_folder=tmp_path / "file")
    assert "--cache" in caught.value.fix


def test_the_public_build_is_the_pipelines() -> None:
    assert medcompile.build is pipeline.build


# ---- the real thing


@pytest.mark.slow
def test_the_quickstart_keeps_its_budget_with_trained_weights(minilm: Path, tmp_path: Path) -> None:
    built = medcompile.build(
        command_line.ROOT / "recipes/quickstart.yaml",
        out=tmp_path / "out",
        cache_folder=tmp_path / "cache",
        overrides=["targets=[onnxruntime-cpu]", "calibration.samples=64"],
        offline=True,
    )
    judged = {(a.variant, e.metric): e for a in built.artifacts for e in a.evidence if e.margin is not None}
    assert judged["fp32", "cosine"].value > 0.99999
    assert judged["int8", "cosine"].verdict == "non-inferior"
    assert judged["int8", "cosine"].value > 0.99
    with medcompile.load(tmp_path / "out", variant="int8") as session:
        near, far = (
            session.embed(["kidney failure", "renal insufficiency", "a broken arm"])[1:]
            @ session.embed("kidney failure")[0]
        )
    assert near > far
