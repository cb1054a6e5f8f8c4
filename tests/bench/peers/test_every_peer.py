"""What holds of every contender there is, whether it is installed here or not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from medcompile import manifest
from medcompile.bench import peer as peer_types
from medcompile.bench import peers
from medcompile.bench.peer import MODEL, TEXT, Cell, Job, Peer

FAMILIES = {
    "bert": ("embed", "token-classification", "sequence-classification", "fill-mask"),
    "clip": ("image", "text"),
    "llama": ("generate",),
}
HEAVY = {
    "torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "open_clip", "timm", "optimum.onnxruntime",
    "sentence_transformers", "tensorrt", "tensorrt_rtx", "polygraphy", "llama_cpp", "gguf", "vllm",
}  # fmt: skip
UNTRIED = ("tensorrt", "tensorrt_rtx", "vllm")


def jobs(source: str = "checkpoint") -> list[Job]:
    return [
        Job(family, task, source, clock=clock, cells=(Cell(1, 16, 8 if task == "generate" else 0),))
        for family, tasks in FAMILIES.items()
        for task in tasks
        for clock in (MODEL, TEXT)
    ]


@pytest.fixture(params=peers.names())
def peer(request: pytest.FixtureRequest) -> Peer:
    return peers.get(request.param)


def test_a_peer_says_what_it_is(peer: Peer) -> None:
    assert isinstance(peer, Peer)
    assert peer.title
    assert peer.engine or peer.ours
    assert peer.tasks and set(peer.tasks) <= {t for tasks in FAMILIES.values() for t in tasks}
    assert peer.clocks and set(peer.clocks) <= {MODEL, TEXT}
    assert {peer.precision, peer.float_precision} <= {"float32", "bfloat16", "float16", "int8", "int4"}
    assert importlib.import_module(type(peer).__module__).__doc__


def test_titles_are_unique() -> None:
    titles = [peers.get(name).title for name in peers.names()]
    assert len(set(titles)) == len(titles)


def test_what_a_peer_needs_comes_with_a_way_to_install_it(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_types, "importable", lambda module: False)
    assert all("pip install" in line for line in peer.modules.values())
    found = [peer.missing(job) for job in jobs() if job.task in peer.tasks and job.clock in peer.clocks]
    if peer.modules:
        for missing in found:
            assert missing is not None
            assert "is not installed" in missing.reason
            assert missing.fix in peer.modules.values()


def test_a_peer_that_reads_the_checkpoint_says_so_where_there_is_none(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_types, "importable", lambda module: True)
    monkeypatch.setattr(peer_types, "has_cuda", lambda: True)
    for job in jobs(source=""):
        assert peer.missing(job) is not None  # ours has no bundle, all others no checkpoint


def test_a_gpu_is_asked_for_by_those_that_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_types, "importable", lambda module: True)
    monkeypatch.setattr(peer_types, "has_cuda", lambda: False)
    reasons = {name: peers.get(name).missing(Job("bert", "embed", "checkpoint")) for name in peers.names()}
    refused = {name for name, missing in reasons.items() if missing and "no NVIDIA GPU" in missing.reason}
    assert refused == {"tensorrt", "tensorrt_rtx", "onnxruntime_cuda"}


def test_options_are_names_for_a_command_line(peer: Peer) -> None:
    if peer.ours:
        pytest.skip("its options are the artifacts of a bundle")
    for job in jobs():
        options = peer.options(job)
        assert options and len(set(options)) == len(options)
        assert not any(c in option for option in options for c in " ,:")


def test_each_task_and_clock_has_one_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_types, "importable", lambda module: True)
    open_clip = tmp_path / "open_clip"
    open_clip.mkdir()
    (open_clip / "open_clip_config.json").write_text("{}")
    for source in (str(tmp_path), str(open_clip)):
        for job in jobs(source):
            every = [p for p in map(peers.get, peers.names()) if p.reference and p.missing(job) is None]
            if (job.task, job.clock) in (("fill-mask", TEXT), ("generate", TEXT)):
                assert not every  # nobody else runs these from text to answer
            else:
                assert len(every) == 1, (job, every)


def test_a_peer_that_nobody_ran_says_so() -> None:
    for name in peers.names():
        module = importlib.import_module(f"{peers.__name__}.{name}")
        assert ("NOT RUN HERE" in str(module.__doc__)) == (name in UNTRIED)


def test_asking_every_peer_why_not_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import json, sys
from medcompile import manifest
from medcompile.bench import peers
from medcompile.bench.peer import Job
told = [manifest.decode(Job, job, "job") for job in json.loads(sys.argv[1])]
for name in peers.names():
    for job in told:
        missing = peers.get(name).missing(job)
        assert missing is None or missing.reason, name
print(json.dumps(sorted(sys.modules)))
"""
    given = json.dumps([manifest.encode(job) for job in jobs(str(tmp_path))])
    done = subprocess.run([sys.executable, "-c", code, given], check=True, capture_output=True, text=True)
    assert HEAVY.isdisjoint(json.loads(done.stdout))
