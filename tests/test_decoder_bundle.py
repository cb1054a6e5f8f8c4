"""Decoders end to end: a recipe becomes a bundle that generates without torch, judged and verified as any other."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import medcompile
from medcompile import bundle
from medcompile.errors import BackendUnavailable, InputError, UsageError
from medcompile.runtime.sampling import Sampling
from medcompile.spec import GRAPH_VERIFIED
from medcompile.verify import DID_NOT_RUN
from tests import command_line, decoders, tiny
from tests.command_line import call
from tests.tiny import Workshop

GREEDY = Sampling(max_tokens=12)
PROMPTS = ["chest pain", "no fever", "a", "known atrial fibrillation"]
VARIANTS = {"fp32": {}, "int4": {"weights": "int4", "block_size": 32, "method": "gptq"}}
TORCH_FREE = """
import json, sys, medcompile
from medcompile.runtime.sampling import Sampling
with medcompile.load(sys.argv[1], backend=sys.argv[2], variant="fp32") as session:
    done = session.generate(sys.argv[3:], Sampling(max_tokens=12))
heavy = {"torch", "transformers", "onnx", "onnx_ir", "pydantic", "yaml"} & set(sys.modules)
print(json.dumps([sorted(heavy), [list(c.token_ids) for c in done]]))
"""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = tmp_path_factory.mktemp("decoder")
    decoders.write_checkpoint("window", root / "model")
    tiny.write_data(root / "calibration", "notes", tiny.records(48, 1), role="calibration")
    tiny.write_data(root / "calibration", "held-out", tiny.records(40, 2))
    recipe = tiny.write_recipe(
        root,
        tiny.recipe(
            model={"family": "llama", "tasks": ["generate"], "source": "path:../model"},
            shapes={"batch": [1, 4, 8], "sequence": [1, 32, decoders.POSITIONS]},
            budget={"perplexity": {"max_drop": 0.5}, "top1_agreement": {"max_drop": 0.9}},
            variants=VARIANTS,
            targets=["onnxruntime-cpu", "openvino-cpu"],
        ),
    )
    made = Workshop(root, recipe, root / "cache", root / "engines" / "tiny")
    made.build()
    return made


def test_every_artifact_is_judged_on_this_machine_and_timed(decoder: Workshop) -> None:
    found = bundle.read(decoder.bundle)
    assert {(a.variant, a.target.name) for a in found.artifacts} == {
        (v, t) for v in VARIANTS for t in ("onnxruntime-cpu", "openvino-cpu")
    }
    assert all(a.ran and a.latency_ms and a.verdict == "non-inferior" for a in found.artifacts)
    exact = [e for a in found.artifacts if a.variant == "fp32" for e in a.evidence]
    assert {e.metric for e in exact} >= {"perplexity", "top1_agreement", "kl"}
    assert all(abs(e.difference) < 1e-4 for e in exact)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_bundle_generates_without_torch_what_transformers_generates(decoder: Workshop, backend: str) -> None:
    code = [sys.executable, "-c", TORCH_FREE, str(decoder.bundle), backend, *PROMPTS]
    done = subprocess.run(code, capture_output=True, text=True, check=False, cwd=command_line.ROOT)
    assert done.returncode == 0, done.stderr
    heavy, answers = json.loads(done.stdout)
    assert heavy == []
    assert answers == [_transformers(decoder.root / "model", prompt) for prompt in PROMPTS]


def test_a_session_generates_at_once_and_piece_by_piece_alike(decoder: Workshop) -> None:
    with medcompile.load(decoder.bundle, backend="onnxruntime", variant="fp32", kv_blocks=8) as session:
        whole = session.generate(PROMPTS, GREEDY)
        pieces = ["".join(chunk.text for chunk in session.chunks(prompt, GREEDY)) for prompt in PROMPTS]
        assert [c.text for c in whole] == pieces
        with pytest.raises(UsageError, match="tiny is not a text encoder; its tasks are: generate"):
            session.embed("x")
        with pytest.raises(InputError, match="the model's window is 96"):
            session.generate("x" * 200)
    with pytest.raises(UsageError, match="closed"):
        session.generate("x")


def test_verify_repeats_the_evidence_of_a_decoder(decoder: Workshop) -> None:
    data = decoder.root / "calibration/held-out.yaml"
    done = call("verify", decoder.bundle, "--data", data, "--json")
    assert done.exit_code == 0, done.stderr
    assert all(row["made"] and row["verdict"] == "non-inferior" for row in json.loads(done.stdout))


def test_the_command_line_prints_answers_and_their_facts(decoder: Workshop) -> None:
    plain = call("run", decoder.bundle, "chest pain", "--max-tokens", "6", "--variant", "fp32")
    facts = call("run", decoder.bundle, "chest pain", "--max-tokens", "6", "--variant", "fp32", "--json")
    assert plain.exit_code == facts.exit_code == 0, plain.stderr + facts.stderr
    assert json.loads(facts.stdout)["text"] == plain.stdout.removesuffix("\n")


def test_no_word_of_the_data_reaches_a_decoders_bundle(decoder: Workshop) -> None:
    words = [word.encode() for word in tiny.PLANTED.split()]
    for place in (decoder.bundle, decoder.cache):
        for path, content in tiny.contents(place).items():
            assert not any(word in content for word in words), path


def test_a_batch_that_is_wider_than_the_model_is_told_before_anything_is_built(
    decoder: Workshop, tmp_path: Path
) -> None:
    with pytest.raises(medcompile.errors.ProfileError, match="up to 500 tokens, but the model has 96"):
        decoder.build(out=tmp_path / "out", overrides=["shapes.sequence=[1, 32, 500]"])


@pytest.mark.slow
def test_an_engine_of_a_decoder_is_judged_by_its_graph_where_no_gpu_runs_it(decoder: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason='no TensorRT-RTX: pip install "medcompile[rtx]"')
    document = yaml.safe_load(decoder.recipe.read_text())
    variants = {"fp32": {}, "int4": {"weights": "int4", "block_size": 32, "float": "float16"}}
    document |= {"name": "engine", "variants": variants, "targets": ["tensorrt-rtx"]}
    found = decoder.build(path=tiny.write_recipe(decoder.root, document), out=tmp_path / "engine")
    assert {a.variant for a in found.artifacts} == set(variants)
    if any(a.ran for a in found.artifacts):
        pytest.skip("this machine has a GPU that runs them")
    for artifact in found.artifacts:
        assert artifact.verified_on == GRAPH_VERIFIED == "graph verified on CPU, engine not yet run"
        assert artifact.verdict == "non-inferior" and artifact.latency_ms is None
        assert artifact.notes[-1].startswith(DID_NOT_RUN + "there is no CUDA device to run on")
        table = json.loads((found.root / artifact.path).with_name("layers.json").read_text())
        assert table["profiles"] == ["decode", "prefill"]
        assert table["target"] == dataclasses.asdict(artifact.target)
    with pytest.raises(BackendUnavailable, match="no cuda device to run it on"):
        medcompile.load(found.root)


def _transformers(folder: Path, prompt: str) -> list[int]:
    import torch

    model: Any = decoders.reference(folder)
    ids = torch.tensor([decoders.tokenizer().encode(prompt).ids])
    found = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return [int(i) for i in found]
