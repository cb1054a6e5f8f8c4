"""A session over a decoder built for a device: how it is chosen, and what its steps may hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import medcompile
from medcompile import backends
from medcompile.backends import Executor
from medcompile.bundle import Contents, Writer
from medcompile.errors import BackendUnavailable
from medcompile.runtime.sampling import Sampling
from medcompile.spec import Axis, GraphSpec, Profile, Target, TensorSpec, Variant, Verdict
from tests.bundles import CPU, artifact, contents
from tests.runtime.fake_decoder import FakeDecoder, letters
from tests.runtime.fakes import write_assets

GPU = Target("fake-gpu", "gpu", "cuda", "sm_80+", "linux", "1.0")
CONTEXT, BLOCK_SIZE = 32, 4
STEP = Profile("decode", (Axis("tokens", 1, 2, 6), Axis("sequences", 1, 2, 3)))
PREFILL = Profile("prefill", (Axis("tokens", 1, 4, 7), Axis("sequences", 1, 2, 3)))
SPEC = GraphSpec(
    "generate",
    (TensorSpec("input_ids", "int64", ("tokens",)), TensorSpec("block_table", "int32", ("sequences", "table"))),
    (TensorSpec("logits", "float32", ("rows", 24)),),
    (STEP, PREFILL),
)
PROMPTS = ["abcdefghijkl", "bcd", "cafe", "deadbeef", "ace"]


class FakeBackend:
    """Steps decoders, and loads nothing else. refuses: why it does not."""

    def __init__(self, name: str, here: Target) -> None:
        self.name = name
        self.targets = (here.name,)
        self.here = here
        self.refuses: BackendUnavailable | None = None
        self.models: list[FakeDecoder] = []

    def probe(self, target: str) -> Target:
        return self.here

    def build(self, *arguments: object) -> backends.Built:
        raise AssertionError("nothing is built here")

    def load(self, *arguments: object) -> Executor:
        raise AssertionError("a decoder has no executor")

    def load_decoder(self, path: Path, variant: Variant, threads: int | None, blocks: int) -> FakeDecoder:
        if self.refuses:
            raise self.refuses
        self.models.append(FakeDecoder(blocks=blocks, block_size=BLOCK_SIZE))
        return self.models[-1]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeBackend]:
    there = {"fake": FakeBackend("fake", CPU), "gpu": FakeBackend("gpu", dataclasses.replace(GPU, arch="sm_90"))}
    monkeypatch.setattr(backends, "get", there.__getitem__)
    return there


@pytest.fixture
def place(tmp_path: Path) -> Path:
    def of(target: Target, latency_ms: float) -> medcompile.spec.Artifact:
        return artifact("fp32", Verdict.NON_INFERIOR, latency_ms, graph="generate", target=target)

    gpu = dataclasses.replace(of(GPU, 1.0), verified_on=dataclasses.replace(GPU, arch="sm_90").verified_on)
    plain: Contents = contents([gpu, of(CPU, 9.0)])
    what = dataclasses.replace(plain, family="llama", tasks=("generate",), graphs={"generate": SPEC}, assets={})
    with Writer(tmp_path / "bundle") as writer:
        assets = writer.path("assets/tokenizer.json").parent
        write_assets(assets)
        letters().save(str(assets / "tokenizer.json"))
        (assets / "decoder.json").write_text(json.dumps({"context": CONTEXT, "block_size": BLOCK_SIZE}))
        (assets / "generation.json").write_text(json.dumps({"eos_ids": [], "sampling": {}}))
        writer.path("graphs/fp32/generate.onnx").write_bytes(b"graph")
        for each in what.artifacts:
            writer.path(each.path).write_bytes(b"weights")
        writer.commit(what)
    return tmp_path / "bundle"


def test_a_devices_decoder_is_tried_before_it_is_chosen_and_given_back(
    place: Path, fakes: dict[str, FakeBackend]
) -> None:
    with medcompile.load(place) as session:
        assert session.target.name == GPU.name
        (tried,) = fakes["gpu"].models
        assert (tried.blocks, tried.closed) == (1, True)
        session.generate("abc", Sampling(max_tokens=2))
        assert [m.blocks for m in fakes["gpu"].models] == [1, 8 * CONTEXT // BLOCK_SIZE]
        assert fakes["gpu"].models[1].batches and not tried.batches
    assert all(model.closed for model in fakes["gpu"].models)


def test_a_decoder_that_the_device_here_does_not_take_is_passed_over(
    place: Path, fakes: dict[str, FakeBackend]
) -> None:
    fakes["gpu"].refuses = BackendUnavailable("built for another GPU", fix="rebuild it here")
    with medcompile.load(place) as session:
        assert session.target.name == CPU.name
        assert fakes["fake"].models == []  # nothing but a device is tried
    with pytest.raises(BackendUnavailable, match="fp32 for fake-gpu: built for another GPU"):
        medcompile.load(place, backend="gpu")


@pytest.mark.parametrize(("backend", "tokens", "sequences"), [("gpu", 7, 3), ("fake", 256, 32)])
def test_no_step_on_a_device_is_larger_than_its_profiles_and_answers_are_the_same(
    place: Path, fakes: dict[str, FakeBackend], backend: str, tokens: int, sequences: int
) -> None:
    with medcompile.load(place, backend=backend) as session:
        done = session.generate(PROMPTS, Sampling(max_tokens=6))
    model = fakes[backend].models[-1]
    tokenizer = letters()
    assert [list(c.token_ids) for c in done] == [model.greedy(tokenizer.encode(p).ids, 6) for p in PROMPTS]
    assert max(len(b.input_ids) for b in model.batches) <= tokens
    assert max(len(b.past_lens) for b in model.batches) <= sequences
    assert (max(len(b.past_lens) for b in model.batches) == len(PROMPTS)) == (backend == "fake")
