"""Artifacts that can be built and not run: judged by their graph, told apart from those that ran, and renewed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import medcompile
from medcompile import bundle, report, verify
from medcompile.errors import BackendError, BackendUnavailable, MedcompileError, OverBudgetError
from medcompile.spec import GRAPH_VERIFIED, NOT_VERIFIED, Artifact, Verdict
from tests import fake_device
from tests.command_line import call
from tests.fake_device import NAME
from tests.tiny import Events, Workshop

BOTH = f"targets=[onnxruntime-cpu, {NAME}]"


@pytest.fixture
def built(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[bundle.Bundle, fake_device.FakeGpu]:
    """A bundle of both targets, made where there is no fake GPU."""
    fake = fake_device.install(monkeypatch)
    monkeypatch.chdir(small.root)
    return small.build(out=tmp_path / "out", overrides=[BOTH]), fake


Built = tuple[bundle.Bundle, fake_device.FakeGpu]


def on_gpu(found: bundle.Bundle) -> dict[str, Artifact]:
    return {a.variant: a for a in found.artifacts if a.target.name == NAME}


def test_what_cannot_run_here_is_judged_by_its_graph_and_says_so(built: Built) -> None:
    found, _ = built
    cpu = {a.variant: a for a in found.artifacts if a.target.name == "onnxruntime-cpu"}
    assert {a.verified_on for a in cpu.values()} == {"verified on device: cpu x86_64"}
    assert all(a.ran and a.latency_ms for a in cpu.values())
    for variant, artifact in on_gpu(found).items():
        assert artifact.verified_on == "graph verified on CPU, engine not yet run" == GRAPH_VERIFIED
        assert artifact.latency_ms is None and not artifact.ran
        assert artifact.verdict is Verdict.NON_INFERIOR
        assert any("no fake GPU in this machine" in note for note in artifact.notes)
        for ours, theirs in zip(artifact.evidence, cpu[variant].evidence, strict=True):
            assert ours.value == pytest.approx(theirs.value, abs=0.02)
    rows = json.loads((found.root / "evidence.json").read_text())["artifacts"]
    assert {(r["target"], r["verified_on"]) for r in rows} == {
        ("onnxruntime-cpu", "verified on device: cpu x86_64"),
        (NAME, GRAPH_VERIFIED),
    }


def test_what_ran_at_build_time_names_the_device_and_its_latency(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device.install(monkeypatch, here=True)
    for artifact in on_gpu(small.build(out=tmp_path / "out", overrides=[BOTH])).values():
        assert artifact.verified_on == "verified on device: gpu fk_90"
        assert artifact.latency_ms and artifact.notes == ("a note",)


def test_a_graph_that_cannot_run_on_the_cpu_either_is_not_verified(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device.install(monkeypatch)
    variants = "variants={fp32: {}, bf16: {float: bfloat16}}"
    with pytest.raises(OverBudgetError, match="bf16 on tensorrt-rtx: not judged"):
        small.build(out=tmp_path / "out", overrides=[f"targets=[{NAME}]", variants, "calibration=null"])
    bf16 = on_gpu(bundle.read(tmp_path / "out"))["bf16"]
    assert bf16.verified_on == NOT_VERIFIED and bf16.verdict is None and bf16.evidence == ()
    assert any("nor does its graph run here" in note for note in bf16.notes)


def test_an_engine_that_this_device_does_not_take_is_judged_by_its_graph(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device.install(monkeypatch, here=True, misfit=True)
    for artifact in on_gpu(small.build(out=tmp_path / "out", overrides=[BOTH, "budget.cosine.max_drop=0.4"])).values():
        assert artifact.verified_on == GRAPH_VERIFIED
        assert any("the library refuses it on fk_90" in note for note in artifact.notes)


def test_an_engine_for_just_this_device_that_does_not_load_is_a_failed_build(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device.install(monkeypatch, here=True, misfit=True, takes="fk_90", refuses=("x",))
    with pytest.raises(BackendError, match="the library refuses it"):
        small.build(out=tmp_path / "out", overrides=[BOTH])
    assert not (tmp_path / "out").exists()


def test_inspect_and_the_evidence_table_tell_engines_from_graphs(built: Built) -> None:
    found, _ = built
    said = call("inspect", found.root).stdout
    assert f"int8 for {NAME}, embed: {GRAPH_VERIFIED}; it did not run: no fake GPU in this machine" in said
    rows = [line for line in said.splitlines() if "cosine" in line]
    assert sum("graph on CPU" in line for line in rows) == sum("engine" in line for line in rows) == 2


def test_load_passes_over_an_engine_whose_device_is_missing(built: Built) -> None:
    found, _ = built
    with medcompile.load(found.root) as session:
        assert session.target.name == "onnxruntime-cpu"
    with pytest.raises(BackendUnavailable, match="no gpu device to run it on"):
        medcompile.load(found.root, backend=NAME)


def test_load_takes_the_engine_where_its_device_is(built: Built) -> None:
    found, fake = built
    fake.here = True
    with medcompile.load(found.root, backend=NAME, variant="int8") as session:
        assert session.embed("no fever").shape == (1, 32)


def test_a_latency_counts_only_on_the_device_that_it_was_timed_on(built: Built) -> None:
    found, fake = built
    fake.here = True
    for device, fastest in (("fk_90", NAME), ("fk_89", "onnxruntime-cpu")):
        timed_on = f"verified on device: gpu {device}"  # the engines are for fk_80+, this machine has fk_90
        timed = [
            replace(a, latency_ms=0.001, verified_on=timed_on) if a.target.name == NAME else a for a in found.artifacts
        ]
        bundle.rewrite(found, found.root, timed, told=report.texts)
        with medcompile.load(found.root) as session:
            assert session.target.name == fastest


# ---- verify where the device is


def test_verify_without_the_device_repeats_the_graphs_evidence_and_writes_nothing(built: Built) -> None:
    found, _ = built
    done = call("verify", found.root, "--json")
    assert done.exit_code == 0, done.stderr
    rows = {(r["target"]["name"], r["variant"]): r for r in json.loads(done.stdout)}
    assert rows[NAME, "int8"]["verified_on"] == GRAPH_VERIFIED and not rows[NAME, "int8"]["renewed"]
    assert "no fake GPU" in rows[NAME, "int8"]["reason"] and rows[NAME, "int8"]["made"]
    assert bundle.read(found.root).digest == found.digest


def test_verify_where_the_device_is_puts_its_evidence_into_the_bundle_once(built: Built) -> None:
    found, fake = built
    fake.here, fake.noise = True, 1e-3
    done = call("verify", found.root, "--json")
    assert done.exit_code == 0, done.stderr
    assert {r["variant"] for r in json.loads(done.stdout) if r["renewed"]} == {"fp32", "int8"}
    assert "for the first time" in done.stderr
    after = bundle.read(found.root)
    assert after.digest != found.digest
    for variant, artifact in on_gpu(after).items():
        before = on_gpu(found)[variant]
        assert artifact.verified_on == "verified on device: gpu fk_90" and artifact.latency_ms
        assert artifact.notes == ("a note",) and artifact.sha256 == before.sha256
        assert artifact.evidence != before.evidence
    others = [a for a in found.artifacts if a.target.name != NAME]
    assert [a for a in after.artifacts if a.target.name != NAME] == others
    told = {"evidence.json", "report.html"}
    assert {f for f in found.files if after.files[f] != found.files[f]} == told
    assert set(after.files) == set(found.files)
    assert {f.stat().st_nlink for f in found.root.rglob("*") if f.is_file()} == {1}
    again = call("verify", found.root, "--json")
    assert again.exit_code == 0 and not any(r["renewed"] for r in json.loads(again.stdout))
    assert bundle.read(found.root).digest == after.digest


def test_evidence_from_a_device_is_not_replaced_by_evidence_from_a_graph(built: Built) -> None:
    found, fake = built
    fake.here = True
    assert call("verify", found.root).exit_code == 0
    after, fake.here = bundle.read(found.root), False
    done = call("verify", found.root, "--json")
    assert done.exit_code == 0
    assert {r["target"]["name"] for r in json.loads(done.stdout) if not r["made"]} == {NAME}
    assert bundle.read(found.root).digest == after.digest


def test_an_engine_that_is_worse_than_its_graph_is_recorded_and_told(built: Built) -> None:
    found, fake = built
    fake.here, fake.noise = True, 50.0
    done = call("verify", found.root)
    assert done.exit_code == 1 and f"int8 on {NAME}: inferior" in done.stderr
    assert on_gpu(bundle.read(found.root))["int8"].verdict is Verdict.INFERIOR


def test_a_bundle_that_cannot_be_written_keeps_its_old_evidence(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    found, fake = built
    fake.here = True

    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verify, "rewrite", full)
    done = call("verify", found.root)
    assert done.exit_code == 1 and "No space left" in done.stderr and "fix: " in done.stderr
    assert bundle.read(found.root).digest == found.digest


# ---- variants that a target can't take


def test_a_variant_that_one_target_refuses_is_built_for_the_others_and_stated(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device.install(monkeypatch, refuses=("int8",))
    events = Events()
    found = small.build(out=tmp_path / "out", overrides=[BOTH], progress=events)
    assert {(a.variant, a.target.name) for a in found.artifacts} == {
        ("fp32", "onnxruntime-cpu"),
        ("fp32", NAME),
        ("int8", "onnxruntime-cpu"),
    }
    assert found.provenance["skipped"] == [
        {"variant": "int8", "target": NAME, "reason": "it does not take int8", "fix": "leave out int8"}
    ]
    assert any(f"variant int8 is not built for {NAME}: it does not take int8" in n for n in events.notes)
    assert found.provenance["notes"] == events.notes


def test_a_variant_that_every_target_refuses_fails_the_build(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device.install(monkeypatch, refuses=("int8",))
    with pytest.raises(BackendError, match="it does not take int8") as caught:
        small.build(out=tmp_path / "out", overrides=[f"targets=[{NAME}]"])
    assert isinstance(caught.value, MedcompileError) and caught.value.fix == "leave out int8"
    assert not (tmp_path / "out").exists()
