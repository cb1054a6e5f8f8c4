"""A recipe with TensorRT-RTX among its targets, from checkpoint to bundle, with engines that are really built.

On a machine with no GPU the engines stay judged by their graphs; tests/gpu/ has what runs on one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import medcompile
from medcompile import bundle
from medcompile.bundle import Bundle
from medcompile.errors import BackendUnavailable
from medcompile.spec import GRAPH_VERIFIED, Artifact
from tests import tiny
from tests.command_line import call
from tests.tiny import Workshop

TARGET = "tensorrt-rtx"
VARIANTS = {
    "fp32": {},
    "fp16": {"float": "float16"},
    "int8-symmetric": {"weights": "int8", "activations": "int8"},
    "int8": {"weights": "int8", "activations": "int8", "symmetric": False},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    pytest.importorskip("tensorrt_rtx", reason='no TensorRT-RTX: pip install "medcompile[rtx]"')
    root = tmp_path_factory.mktemp("rtx")
    tiny.write_workshop(root)
    recipe = tiny.write_recipe(root, tiny.recipe(variants=VARIANTS, targets=["onnxruntime-cpu", TARGET]))
    made = Workshop(root, recipe, root / "cache", root / "engines/tiny")
    made.build()
    return made


def engines(found: Bundle) -> dict[str, Artifact]:
    return {a.variant: a for a in found.artifacts if a.target.name == TARGET}


def on_gpu(found: Bundle) -> bool:
    return all(a.ran for a in engines(found).values())


def test_every_variant_that_it_takes_is_built_and_judged_and_the_other_is_stated(built: Workshop) -> None:
    found = bundle.read(built.bundle)
    made = engines(found)
    assert set(made) == {"fp32", "fp16", "int8-symmetric"}
    assert {a.verdict for a in made.values()} == {"non-inferior"}
    for artifact in made.values():
        assert artifact.size_bytes > 10_000 and artifact.target.arch.startswith("sm_")
        assert artifact.verified_on == GRAPH_VERIFIED or artifact.ran
        assert (artifact.latency_ms is None) == (not artifact.ran)
    (skipped,) = found.provenance["skipped"]
    assert (skipped["variant"], skipped["target"]) == ("int8", TARGET)
    assert "zero point other than 0" in skipped["reason"] and "symmetric: true" in skipped["fix"]
    assert {a.variant for a in found.artifacts if a.target.name == "onnxruntime-cpu"} == set(VARIANTS)


def test_inspect_shows_what_the_engines_compute_in(built: Workshop) -> None:
    shown = {row["variant"]: row for row in json.loads(call("inspect", built.bundle, "--engine", "--json").stdout)}
    assert set(shown["int8-symmetric"]["products"].values()) == {"int8 x int8"}
    assert set(shown["fp16"]["products"].values()) == {"float16 x float16"}
    said = call("inspect", built.bundle, "--engine").stdout
    assert "[1, 4], [4, 16], [16, 64]" in said and f"int8-symmetric for {TARGET}, embed" in said
    assert "12 int8 x int8" in said and "encoder.layer.1.output.dense/MatMul" in said


def test_verify_repeats_every_verdict(built: Workshop) -> None:
    done = call("verify", built.bundle, "--data", built.root / "calibration/held-out.yaml", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert all(row["made"] for row in rows) and len(rows) == 4 + 3


def test_load_passes_over_engines_without_a_gpu(built: Workshop) -> None:
    if on_gpu(bundle.read(built.bundle)):
        pytest.skip("this machine has a GPU that runs them")
    with medcompile.load(built.bundle) as session:
        assert session.target.name == "onnxruntime-cpu"
        assert session.embed("no fever").shape == (1, tiny.HIDDEN)
    with pytest.raises(BackendUnavailable, match="no cuda device to run it on"):
        medcompile.load(built.bundle, backend=TARGET)


def test_a_bundle_without_it_gets_the_same_engine_later(built: Workshop, tmp_path: Path) -> None:
    built.build(out=tmp_path / "cpu", overrides=["targets=[onnxruntime-cpu]"])
    data = built.root / "calibration/held-out.yaml"
    done = call("build", "--from", tmp_path / "cpu", "--targets", TARGET, "--data", data, "--cache", tmp_path / "c")
    assert done.exit_code == 0, done.stderr
    ours, theirs = engines(bundle.read(built.bundle)), engines(bundle.read(tmp_path / "cpu"))
    assert {v: a.verdict for v, a in ours.items()} == {v: a.verdict for v, a in theirs.items()}
    assert ours.keys() == theirs.keys()


def test_inspect_engine_of_a_bundle_without_one_says_how_to_get_it(small: Workshop) -> None:
    done = call("inspect", small.bundle, "--engine")
    assert done.exit_code == 2 and "medcompile build --from" in done.stderr


def test_float8_and_int4_go_through_the_whole_build(built: Workshop, tmp_path: Path) -> None:
    variants = {
        "fp32": {},
        "fp8": {"float": "float16", "weights": "float8", "activations": "float8"},
        "int4": {"float": "float16", "weights": "int4", "block_size": 16},
    }
    document = tiny.recipe(name="low", variants=variants, targets=[TARGET])
    recipe = tiny.write_recipe(built.root, document)
    found = built.build(path=recipe, out=tmp_path / "low")
    made = engines(found)
    assert set(made) == set(variants)
    products = {"fp8": "12 float8 x float8", "int4": "12 float16 x int4"}
    for variant, formats in products.items():
        artifact = made[variant]
        assert f"linear layers: {formats}" in artifact.notes
        assert artifact.verified_on == GRAPH_VERIFIED or artifact.ran
