"""Inside a contender's process: what is made once, what each run is given, when it has warmed up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medcompile import manifest
from medcompile.bench import peers, worker
from medcompile.bench.peer import Answer, Batch, Cell, Job, Note, Peer, Runner
from medcompile.errors import UsageError
from tests.bench.fake import PEER as FAKE


class Recorder:
    notes: Mapping[str, Note]

    def __init__(self) -> None:
        self.notes = {}
        self.prompts: list[list[int]] = []
        self.new = 4

    def run(self, batch: Batch) -> Answer:
        ids = batch.feeds["input_ids"]
        self.prompts += ids.tolist()
        return Answer(ids[:, : self.new], first_ns=5, steps_ns=(1, 2))

    def close(self) -> None: ...


class Made(Peer):
    name = "made"
    title = "made"
    tasks = ("generate", "embed")
    needs_source = False

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.prepared = 0

    def prepare(self, job: Job) -> None:
        assert not any(Path(job.work).iterdir())
        self.prepared += 1
        (Path(job.work) / "model").write_text(job.option)
        if job.option == "fails":
            raise RuntimeError("half-way")

    def open(self, job: Job) -> Runner:
        return self.recorder


def job(folder: Path, **facts: object) -> Job:
    (folder / "source").mkdir(exist_ok=True)
    (folder / "source" / "weights").write_text("1")
    return replace(Job("llama", "generate", source=str(folder / "source"), work=str(folder / "work")), **facts)  # type: ignore[arg-type]


def test_files_are_made_once_for_a_checkpoint_an_option_and_a_calibration(tmp_path: Path) -> None:
    peer, asked = Made(), job(tmp_path)
    assert "reused" not in worker.prepare(peer, asked)
    assert worker.prepare(peer, asked)["reused"]
    assert worker.prepare(peer, asked)["seconds"] == worker.prepare(peer, asked)["seconds"]
    assert peer.prepared == 1
    for other in (replace(asked, option="x"), replace(asked, task="embed"), replace(asked, pooling="cls")):
        worker.prepare(peer, other)
    assert peer.prepared == 4
    (tmp_path / "source" / "weights").write_text("22")
    worker.prepare(peer, asked)
    assert peer.prepared == 5


def test_files_of_a_preparation_that_failed_are_made_anew(tmp_path: Path) -> None:
    peer, asked = Made(), job(tmp_path, option="fails")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            worker.prepare(peer, asked)
    assert peer.prepared == 2


def host(tmp_path: Path, prompts: int = 3) -> tuple[worker.Host, Recorder]:
    peer = Made()
    cell = Cell(1, 4, 4)
    asked = job(tmp_path, cells=(cell,), inputs=str(tmp_path))
    np.savez(tmp_path / f"{cell.name}.npz", input_ids=np.arange(4 * prompts).reshape(prompts, 4))
    made = worker.Host(peer, asked)
    made.load()
    return made, peer.recorder


def test_a_decoder_meets_no_prompt_twice(tmp_path: Path) -> None:
    made, recorder = host(tmp_path, prompts=24)
    made.warm(0, limit_s=5)
    for k in range(60):
        made.run(first=k, count=1, lead=0)
    timed, before = ([tuple(p) for p in part] for part in (recorder.prompts[-60:], recorder.prompts[:-60]))
    assert len(set(timed)) == 60
    assert timed[0] == (0, 1, 2, 3)
    assert not set(timed) & set(before)


def test_the_answers_that_are_kept_are_those_to_the_inputs_as_they_are(tmp_path: Path) -> None:
    made, _ = host(tmp_path)
    made.warm(0, limit_s=5)
    made.run(first=0, count=7, lead=1)
    made.answers(str(tmp_path / "answers.npz"))
    with np.load(tmp_path / "answers.npz") as held:
        found = {name: held[name].tolist() for name in held.files}
    assert found == {"values-0": [[0, 1, 2, 3]], "values-1": [[4, 5, 6, 7]], "values-2": [[8, 9, 10, 11]]}


def test_runs_tell_the_time_to_the_first_token_and_of_each_later_one(tmp_path: Path) -> None:
    made, recorder = host(tmp_path)
    made.warm(0, limit_s=5)
    before = len(recorder.prompts)
    told = made.run(first=0, count=2, lead=1)
    assert (told["first_ns"], told["steps_ns"]) == ([5, 5], [1, 2, 1, 2])
    assert len(told["ns"]) == 2
    assert len(recorder.prompts) - before == 3
    assert told["cpu_ns"] >= told["run_cpu_ns"]


def test_a_decoder_that_stops_early_is_not_timed(tmp_path: Path) -> None:
    made, recorder = host(tmp_path)
    recorder.new = 3
    with pytest.raises(ValueError, match="generated 3 tokens, not 4 as asked"):
        made.warm(0, limit_s=5)


def test_warming_up_ends_when_five_runs_agree_or_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = host(tmp_path)
    times = iter([900, 500, 300, 200, 100, 101, 102, 100, 99, 1])
    monkeypatch.setattr(made, "_timed", lambda k: (next(times) * 10**6, Answer()))
    assert len(made.warm(0, limit_s=60)["ns"]) == 9
    times = iter([2000, 1000, 900])
    assert len(made.warm(0, limit_s=1.5)["ns"]) == 2
    times = iter(range(10**6, 10**9, 10**6))
    assert len(made.warm(0, limit_s=10**9)["ns"]) == worker.WARM_RUNS


def test_the_process_runs_in_a_python_that_has_no_medcompile_installed(tmp_path: Path) -> None:
    asked = Job("bert", "embed", option="good", work=str(tmp_path))
    (tmp_path / "job.json").write_text(json.dumps(manifest.encode(asked)))
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "sys.path = [p for p in sys.path if not p.endswith('main')];"
        "import importlib.util, runpy; assert importlib.util.find_spec('medcompile') is None;"
        f"sys.argv = ['worker.py', {str(Path(__file__).parent / 'fake.py')!r}, {str(tmp_path / 'job.json')!r}, 'look'];"
        f"runpy.run_path({worker.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["missing"] is None


def test_contenders_are_found_by_name_and_by_path() -> None:
    assert peers.get(str(Path(__file__).parent / "fake.py")).name == FAKE.name
    assert {"medcompile", "torch_fp32"} <= set(peers.names())
    with pytest.raises(UsageError, match="no contender 'x'"):
        peers.get("x")
    with pytest.raises(UsageError, match="no such Python file"):
        peers.get("nowhere.py")
    with pytest.raises(UsageError, match="has no PEER"):
        peers.get(__file__)


def test_importing_every_contender_loads_no_engine() -> None:
    code = (
        "import sys; from medcompile.bench import peers; [peers.get(n) for n in peers.names()];"
        "print(sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for library in ("torch", "transformers", "onnx", "onnxruntime", "openvino", "yaml", "pydantic"):
        assert f"'{library}'" not in done.stdout
