"""Relower: more targets for a finished bundle, on a machine that has neither the checkpoint nor torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import medcompile
from medcompile import bundle
from medcompile.errors import BackendError, BundleError, DataError
from medcompile.relower import relower
from medcompile.spec import GRAPH_VERIFIED, NOT_VERIFIED
from tests import command_line, fake_device, tiny
from tests.command_line import call
from tests.fake_device import NAME
from tests.tiny import Workshop

NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "safetensors", "onnxscript"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def copy(small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A bundle of one's own, seen from a folder that holds its evaluation data."""
    monkeypatch.chdir(small.root)
    return small.copy(tmp_path / "w")


def test_a_bundle_gets_a_target_without_torch_and_is_judged_by_its_kept_reference(copy: Workshop) -> None:
    before = bundle.read(copy.bundle)
    data = copy.root / "calibration/held-out.yaml"
    arguments = ("--from", copy.bundle, "--targets", "openvino-cpu", "--data", data, "--cache", copy.root / "fresh")
    done = command_line.spawn("build", *arguments, before=NO_TORCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{copy.bundle}\n" and "openvino-cpu" in done.stderr
    after = bundle.read(copy.bundle)
    assert after.artifacts[: len(before.artifacts)] == before.artifacts
    added = after.artifacts[len(before.artifacts) :]
    assert {(a.variant, a.target.name) for a in added} == {("fp32", "openvino-cpu"), ("int8", "openvino-cpu")}
    assert all(a.ran and a.latency_ms and a.verdict == "non-inferior" for a in added)
    changed = {f for f in before.files if after.files[f] != before.files[f]}
    assert changed == {"evidence.json", "report.html"}
    assert after.provenance["relowered"] == [{"targets": ["openvino-cpu"], "medcompile": medcompile.__version__}]
    with medcompile.load(copy.bundle, backend="openvino") as session:
        assert session.embed("no fever").shape == (1, tiny.HIDDEN)


def test_out_leaves_the_old_bundle_as_it_was(copy: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(monkeypatch)
    before = tiny.contents(copy.bundle)
    made = relower(copy.bundle, [NAME], out=tmp_path / "new")
    assert made.root == tmp_path / "new" and tiny.contents(copy.bundle) == before
    assert {a.verified_on for a in bundle.read(tmp_path / "new").artifacts if a.target.name == NAME} == {GRAPH_VERIFIED}


def test_building_for_a_target_again_replaces_its_artifacts(copy: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_device.install(monkeypatch)
    first = relower(copy.bundle, [NAME])
    fake.here = True
    second = relower(copy.bundle, [NAME])
    assert len(second.artifacts) == len(first.artifacts) == 4
    assert {a.verified_on for a in second.artifacts if a.target.name == NAME} == {"verified on device: gpu fk_90"}
    assert set(second.files) == set(first.files)


def test_without_its_evaluation_data_an_artifact_carries_no_evidence_and_says_so(
    copy: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    done = call("build", "--from", copy.bundle, "--targets", NAME)
    assert done.exit_code == 0, done.stderr
    assert "is not verified: the evidence can't be made again: no manifest" in done.stderr
    found = bundle.read(copy.bundle)
    added = [a for a in found.artifacts if a.target.name == NAME]
    assert {(a.verified_on, a.verdict, a.evidence) for a in added} == {(NOT_VERIFIED, None, ())}
    assert any("is not verified" in note for note in found.provenance["notes"])
    assert f"{NAME}, embed: not verified; it was not judged" in call("inspect", copy.bundle).stdout
    done = call("verify", copy.bundle, "--data", copy.root / "calibration/held-out.yaml")  # where the data is
    assert done.exit_code == 0, done.stderr
    for artifact in bundle.read(copy.bundle).artifacts:
        if artifact.target.name == NAME:
            assert (artifact.verified_on, artifact.verdict) == (GRAPH_VERIFIED, "non-inferior")
            assert artifact.notes[0] == "a note" and "no fake GPU" in artifact.notes[1]


def test_other_data_is_refused_and_the_bundle_stays(copy: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(monkeypatch)
    before = bundle.read(copy.bundle).digest
    with pytest.raises(DataError, match="is not the data"):
        relower(copy.bundle, [NAME], data=copy.root / "calibration/notes.yaml")
    assert bundle.read(copy.bundle).digest == before


def test_an_altered_graph_is_found_before_anything_is_built(copy: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(monkeypatch)
    weights = copy.bundle / "graphs/int8/weights.bin"
    raw = bytearray(weights.read_bytes())
    raw[100] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(BundleError, match=r"weights\.bin differ"):
        relower(copy.bundle, [NAME])


def test_a_variant_that_a_target_refuses_is_stated_and_nothing_at_all_is_an_error(
    copy: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device.install(monkeypatch, refuses=("int8",))
    made = relower(copy.bundle, [NAME])
    assert {(a.variant, a.target.name) for a in made.artifacts if a.target.name != "onnxruntime-cpu"} == {
        ("fp32", NAME)
    }
    assert [(s["variant"], s["target"]) for s in made.provenance["skipped"]] == [("int8", NAME)]
    fake_device.install(monkeypatch, refuses=("int8", "fp32"))
    with pytest.raises(BackendError, match=r"none of its variants can be built for tensorrt-rtx\nfp32 for"):
        relower(copy.bundle, [NAME])
    assert bundle.read(copy.bundle).digest == made.digest


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a RECIPE, or --from BUNDLE"),
        (["recipe.yaml", "--from", "b"], "not both"),
        (["recipe.yaml", "--targets", "null"], "--targets needs --from"),
        (["recipe.yaml", "--data", "d.yaml"], "--data needs --from"),
        (["--from", "b", "--targets", "null", "--set", "a=1"], "--set needs a recipe"),
    ],
)
def test_a_recipe_and_from_exclude_each_other(arguments: list[str], says: str) -> None:
    done = call("build", *arguments)
    assert done.exit_code == 2 and says in done.stderr and "fix: " in done.stderr


@pytest.mark.parametrize(
    ("targets", "says"), [((), "no target to build for"), (("--targets", "cpu"), "no backend builds for target 'cpu'")]
)
def test_from_needs_targets_that_there_are(copy: Workshop, targets: tuple[str, ...], says: str) -> None:
    done = call("build", "--from", copy.bundle, *targets)
    assert done.exit_code == 2 and says in done.stderr


def test_the_summary_for_machines_is_that_of_a_build(copy: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(monkeypatch)
    done = call("build", "--from", copy.bundle, "--targets", NAME, "--json")
    assert {a["target"]["name"] for a in json.loads(done.stdout)["artifacts"]} == {"onnxruntime-cpu", NAME}
