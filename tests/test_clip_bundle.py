"""Bundles of two towers from the recipe to the answers: built, loaded without torch, verified, asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import medcompile
from medcompile import bundle
from medcompile.bundle import Bundle
from medcompile.errors import InputError, UsageError
from tests import command_line, tiny, tiny_pair
from tests.command_line import call
from tests.models.tiny_clip import hf_model
from tests.tiny import Workshop
from tests.tiny_pair import CLASSES, drawn

ANSWER = """
import json, sys
import medcompile
with medcompile.load(sys.argv[1], variant=sys.argv[2]) as session:
    images, prompts = sys.argv[4:6], json.loads(sys.argv[3])
    print(json.dumps({
        "images": session.embed_images(images).tolist(),
        "texts": session.embed_texts(prompts).tolist(),
        "match": session.match(images, prompts, ["{}"]).tolist(),
        "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
    }))
"""
PROMPTS = list(CLASSES.values())
BUILD_LIBRARIES = {"torch", "transformers", "open_clip", "timm", "onnx", "onnx_ir", "onnxscript", "pydantic", "yaml"}


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Two images of other sizes than the model's, one gray and one in colour, by path."""
    rng = np.random.default_rng(3)
    colour = PIL.Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))
    drawn("disc", 77, edge=90).save(tmp_path / "gray.png")
    colour.save(tmp_path / "colour.jpg")
    return [str(tmp_path / "gray.png"), str(tmp_path / "colour.jpg")]


def original(folder: Path, images: list[str], texts: list[str]) -> np.ndarray[Any, Any]:
    """Probabilities by transformers' own pipeline."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    pixels = kind([PIL.Image.open(path).convert("RGB") for path in images], return_tensors="pt")
    words = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.inference_mode():
        answer = hf_model(folder)(**pixels, **words)
    return np.asarray(answer.logits_per_image.softmax(dim=-1).numpy())


def test_a_fresh_process_answers_as_the_original_does_and_loads_no_build_library(
    pair: Workshop, images: list[str]
) -> None:
    command = [sys.executable, "-c", ANSWER, str(pair.bundle), "fp32", json.dumps(PROMPTS), *images]
    environment = {**os.environ, "PYTHONPATH": str(command_line.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert not BUILD_LIBRARIES & set(answer["loaded"])
    embedded, texts = np.array(answer["images"]), np.array(answer["texts"])
    assert embedded.shape == texts.shape == (2, 40)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([embedded, texts]), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(answer["match"], original(pair.root / "model", images, PROMPTS), atol=1e-5)


def test_every_variant_is_judged_on_both_towers_and_one_of_them_is_picked(pair: Workshop) -> None:
    built = bundle.read(pair.bundle)
    assert {(a.variant, a.graph) for a in built.artifacts} == {
        (v, g) for v in ("fp32", "int8", "int8-images") for g in ("image", "text")
    }
    for artifact in built.artifacts:
        judged = {e.metric for e in artifact.evidence if e.verdict}
        assert judged == set(tiny_pair.BUDGET)
        told = {e.metric for e in artifact.evidence}
        assert {"accuracy", "accuracy[disc]", "auroc", "image_to_text_recall@1", "text_to_image_recall@5"} <= told
    exact = {e.metric: e for a in built.artifacts if a.variant == "fp32" for e in a.evidence}
    assert exact["agreement"].value == 1 and exact["cosine_worst"].value > 1 - 1e-5
    with medcompile.load(pair.bundle) as session:
        assert session.variant.name in built.variants


def test_a_variant_of_the_image_tower_alone_leaves_the_text_tower_as_it_was(pair: Workshop) -> None:
    layers = json.loads((pair.bundle / "layers.json").read_bytes())["int8-images"]
    precisions = {graph: {row["precision"] for row in rows} for graph, rows in layers.items()}
    assert any("int8" in found for found in precisions["image"]) and precisions["text"] == {"float32"}
    with (
        medcompile.load(pair.bundle, variant="fp32") as exact,
        medcompile.load(pair.bundle, variant="int8-images") as s,
    ):
        np.testing.assert_array_equal(s.embed_texts(PROMPTS), exact.embed_texts(PROMPTS))
        one = drawn("bars", 5)
        assert 0 < np.abs(s.embed_images(one) - exact.embed_images(one)).max() < 0.2


def lone(pair: Workshop, tmp_path: Path, task: str) -> Bundle:
    model = tiny_pair.recipe()["model"] | {"tasks": [task]}
    variants = {"fp32": {}, "int8": {**tiny_pair.INT8, "symmetric": False}}
    budget = {"cosine": tiny_pair.BUDGET["cosine"]}
    document = tiny_pair.recipe(model=model, variants=variants, budget=budget, name=task)
    return pair.build(path=tiny.write_recipe(pair.root, document), out=tmp_path / task)


def test_an_image_tower_alone_is_built_judged_by_its_embeddings_and_answers(
    pair: Workshop, tmp_path: Path, images: list[str]
) -> None:
    built = lone(pair, tmp_path, "image")
    assert set(built.assets) == {"transform", "towers"} and set(built.graphs) == {"image"}
    assert {e.metric for a in built.artifacts for e in a.evidence} == {"cosine", "cosine_worst"}
    with medcompile.load(built.root, variant="fp32") as s, medcompile.load(pair.bundle, variant="fp32") as both:
        np.testing.assert_allclose(s.embed_images(images), both.embed_images(images), atol=1e-6)
        with pytest.raises(UsageError, match="no task text here; the tasks are: image") as caught:
            s.match(images, PROMPTS)
        assert "rebuild" in caught.value.fix
    done = call("run", built.root, *images, "--json")
    assert done.exit_code == 0, done.stderr
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == images


def test_a_text_tower_alone_is_built_judged_by_its_embeddings_and_answers(
    pair: Workshop, tmp_path: Path, images: list[str]
) -> None:
    built = lone(pair, tmp_path, "text")
    assert set(built.assets) == {"tokenizer", "text", "towers"} and set(built.graphs) == {"text"}
    assert {e.metric for a in built.artifacts for e in a.evidence} == {"cosine", "cosine_worst"}
    with medcompile.load(built.root, variant="fp32") as s, medcompile.load(pair.bundle, variant="fp32") as both:
        np.testing.assert_allclose(s.embed_texts(PROMPTS), both.embed_texts(PROMPTS), atol=1e-6)
        with pytest.raises(UsageError, match="no task image here; the tasks are: text"):
            s.embed_images(images)
    done = call("run", built.root, PROMPTS[0], "--json")
    assert done.exit_code == 0 and len(json.loads(done.stdout)) == 40


def test_verify_makes_the_evidence_again_where_there_is_no_torch(pair: Workshop) -> None:
    from tests.test_verify import NO_BUILD_LIBRARY

    manifest = pair.root / "calibration/held-out.yaml"
    done = command_line.spawn("verify", pair.bundle, "--data", manifest, "--json", before=NO_BUILD_LIBRARY)
    assert done.returncode == 0, done.stderr
    again = {(a["variant"], a["graph"]): a for a in json.loads(done.stdout)}
    for artifact in bundle.read(pair.bundle).artifacts:
        made = {e["metric"]: e["value"] for e in again[artifact.variant, artifact.graph]["evidence"]}
        assert made == pytest.approx({e.metric: e.value for e in artifact.evidence}, abs=1e-6)


def test_run_answers_good_images_and_tells_of_a_bad_one_between_them(
    pair: Workshop, tmp_path: Path, images: list[str]
) -> None:
    bad = tmp_path / "note.png"
    bad.write_text(f"dictated for {tiny.PLANTED}")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    done = call("run", pair.bundle, images[0], bad, images[1], *prompts, "--variant", "fp32", "--json")
    assert done.exit_code == 1
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["image"] for a in answers] == images
    with medcompile.load(pair.bundle, variant="fp32") as session:
        expected = session.match(images, PROMPTS)
    for answer, row in zip(answers, expected, strict=True):
        assert [s["score"] for s in answer["scores"]] == sorted(row.tolist(), reverse=True)
        assert {s["label"]: s["score"] for s in answer["scores"]} == dict(zip(PROMPTS, row.tolist(), strict=True))
    assert "note.png" in done.stderr and "1 of 3 images can't be used" in done.stderr and "fix: " in done.stderr
    assert not any(word in done.stderr for word in tiny.PLANTED.split())
    told = call("run", pair.bundle, images[0], *prompts)
    assert told.exit_code == 0 and told.stdout.splitlines()[0] == images[0] and PROMPTS[0] in told.stdout


def test_calls_of_another_kind_of_model_name_the_bundles_tasks(pair: Workshop, small: Workshop) -> None:
    with medcompile.load(pair.bundle, variant="fp32") as session:
        for call_ in (session.embed, session.extract, session.classify, session.fill_mask, session.generate):
            with pytest.raises(UsageError, match="its tasks are: image, text") as caught:
                call_("no pain")
            assert caught.value.fix
    with medcompile.load(small.bundle, variant="fp32") as session:
        for ask in (
            lambda: session.match(drawn("disc", 1), PROMPTS),
            lambda: session.embed_images(drawn("disc", 1)),
            lambda: session.embed_texts("no pain"),
        ):
            with pytest.raises(UsageError, match="not a model of images and texts; its tasks are: embed"):
                ask()


def test_an_image_that_cannot_be_decoded_stops_a_build_by_its_name(pair: Workshop, tmp_path: Path) -> None:
    manifest = tiny_pair.write_images(tmp_path, "spoilt", 6, 9)
    raw = (tmp_path / "spoilt/3.png").read_bytes()
    (tmp_path / "spoilt/3.png").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match=r"3\.png") as caught:
        pair.build(out=tmp_path / "out", overrides=[f"evaluation.data={manifest}"])
    assert not any(word in str(caught.value) for word in tiny.PLANTED.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_word_of_captions_or_patients_reaches_bundle_cache_or_screen(pair: Workshop, tmp_path: Path) -> None:
    shutil.copytree(pair.root, tmp_path / "w", ignore=shutil.ignore_patterns("cache", "engines"))
    arguments = ("build", tmp_path / "w/recipes/tiny.yaml", "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    done = command_line.spawn(*arguments, "-v")
    assert done.returncode == 0, done.stderr
    checked = command_line.spawn("verify", tmp_path / "out", "--data", tmp_path / "w/calibration/held-out.yaml")
    assert checked.returncode == 0, checked.stderr
    said = (done.stdout + done.stderr + checked.stdout + checked.stderr).encode()
    found = {"said": said, **tiny.contents(tmp_path / "out"), **tiny.contents(tmp_path / "cache")}
    assert len(found) > 50
    for word in tiny.PLANTED.split():
        forms = [word.encode(), word.lower().encode(), word.encode("utf-16-le"), word.encode().hex().encode()]
        assert [name for name, raw in found.items() for form in forms if form in raw] == []
