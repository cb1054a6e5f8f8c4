"""medcompile batch in a process of its own, over real bundles."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import PIL.Image
import pytest

import medcompile
from tests import tiny_pair
from tests.command_line import call, spawn, start
from tests.serve import batches
from tests.tiny import PLANTED, Workshop

ON_CPU = ("--backend", "onnxruntime", "--variant", "fp32", "--threads", "1")
NOTES = [f"the patient had a chest x-ray number {i}" for i in range(40)]


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"method": "POST"} | r) + b"\n" for r in requests))
    return path


def request(custom_id: str, url: str = "/v1/embeddings", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "url": url, "body": {"model": "text"} | body}


def embeddings(tmp_path: Path, count: int) -> Path:
    return write(tmp_path / "in.jsonl", [request(f"r{i}", input=NOTES[i % len(NOTES)]) for i in range(count)])


def bodies(out: Path) -> dict[str, Any]:
    return {answer["custom_id"]: answer["response"]["body"] for answer in batches.lines(out)}


@pytest.fixture(scope="module")
def text(workshop: Workshop) -> str:
    return f"text={workshop.bundle}"


@pytest.fixture(scope="module")
def session(workshop: Workshop) -> Any:
    with medcompile.load(workshop.bundle, backend="onnxruntime", variant="fp32", threads=1) as loaded:
        yield loaded


def test_lines_of_any_kind_get_what_the_session_answers(tmp_path: Path, text: str, session: Any) -> None:
    note = "the patient had pain"
    requests = [request(f"e{i}", input=one) for i, one in enumerate(NOTES)]
    requests += [request("some", input=NOTES[:3]), request("found", "/v1/entities", input=note)]
    requests += [request("class", "/v1/classify", input=note)]
    done = spawn(
        "batch", write(tmp_path / "in.jsonl", requests), "-o", tmp_path / "out.jsonl", "--bundle", text, *ON_CPU
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "43 lines, 0 failed" in done.stderr
    got = bodies(tmp_path / "out.jsonl")
    assert list(got) == [r["custom_id"] for r in requests]
    vectors = np.array([got[f"e{i}"]["data"][0]["embedding"] for i in range(len(NOTES))], np.float32)
    np.testing.assert_allclose(vectors, session.embed(NOTES), atol=1e-5)
    assert [d["index"] for d in got["some"]["data"]] == [0, 1, 2]
    assert [e["text"] for e in got["found"]["data"][0]["entities"]] == [e.text for e in session.extract(note)]
    assert got["class"]["data"][0]["label"] == session.classify(note)[0][0].label


def test_bad_lines_are_told_in_the_file_the_others_answered_and_nothing_is_quoted_on_screen(
    tmp_path: Path, text: str
) -> None:
    requests = [request("same", input=PLANTED), request("same", input=["x", PLANTED]), request("other", input=[])]
    requests += [request("gone", input="x", model=PLANTED), request("odd", "/v1/entities", input="x", planted=PLANTED)]
    path = write(tmp_path / "in.jsonl", requests)
    path.write_bytes(path.read_bytes() + PLANTED.encode() + b"\n")
    done = spawn("batch", path, "-o", tmp_path / "out.jsonl", "--bundle", text, "--json", *ON_CPU)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["records"], told["failed"], told["duplicates"], told["duplicate_pairs"]) == (6, 4, 1, [[1, 2]])
    assert "4 of 6 lines failed" in done.stderr and "1 requests bear an earlier one's custom_id" in done.stderr
    statuses = [a["response"] and a["response"]["status_code"] for a in batches.lines(tmp_path / "out.jsonl")]
    assert statuses == [200, 200, 400, 404, 400, None]
    assert not any(word in done.stderr + done.stdout for word in PLANTED.split())


@pytest.mark.slow
def test_a_batch_that_was_killed_ten_times_goes_on_and_leaves_no_process_behind(tmp_path: Path, text: str) -> None:
    count, chance = 20_000, random.Random(5)
    path, out = embeddings(tmp_path, count), tmp_path / "out.jsonl"
    command = ("batch", path, "-o", out, "--bundle", text, "--in-flight", 16, *ON_CPU)
    part = out.with_name("out.jsonl.part")
    kept = [0]
    for _ in range(10):
        process = start(*command)
        size = part.stat().st_size if part.exists() else 0
        _until(lambda: part.exists() and part.stat().st_size > size)  # noqa: B023  # called before it changes
        workers = _children(process.pid)
        assert workers
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        _until(lambda: not any(_alive(pid) for pid in workers))  # noqa: B023
        kept.append(part.read_bytes().count(b"\n"))
    assert kept == sorted(kept) and kept[1] > 0 and kept[-1] < count
    done = spawn(*command)
    assert done.returncode == 0 and "going on after" in done.stderr
    assert list(bodies(out)) == [f"r{i}" for i in range(count)]
    vectors: dict[int, list[list[float]]] = {}
    for custom_id, body in bodies(out).items():
        vectors.setdefault(int(custom_id[1:]) % len(NOTES), []).append(body["data"][0]["embedding"])
    for same in vectors.values():
        np.testing.assert_allclose(np.array(same), np.tile(same[0], (len(same), 1)), atol=1e-5)


def test_a_model_process_that_is_killed_costs_no_line(tmp_path: Path, text: str) -> None:
    path, out = embeddings(tmp_path, 3000), tmp_path / "out.jsonl"
    process = start("batch", path, "-o", out, "--bundle", text, *ON_CPU)
    part = out.with_name("out.jsonl.part")
    _until(lambda: part.exists() and part.stat().st_size > 0)
    for pid in _children(process.pid):
        os.kill(pid, signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert list(bodies(out)) == [f"r{i}" for i in range(3000)]


def test_a_request_to_end_leaves_what_was_answered_and_says_how_to_go_on(tmp_path: Path, text: str) -> None:
    path, out = embeddings(tmp_path, 3000), tmp_path / "out.jsonl"
    part = out.with_name("out.jsonl.part")
    process = start("batch", path, "-o", out, "--bundle", text, "--in-flight", 16, *ON_CPU)
    _until(lambda: part.exists() and part.stat().st_size > 0)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on there" in told
    assert not out.exists() and part.read_bytes().endswith(b"\n")


def test_a_column_of_texts_becomes_columns_of_answers(tmp_path: Path, text: str, session: Any) -> None:
    path = tmp_path / "notes.csv"
    path.write_text('id,note\n1,the patient had pain\n2,"two\nlines, one note"\n3\n4,chest x-ray\n')
    done = spawn(
        *("batch", path, "-o", tmp_path / "out.csv", "--bundle", text, "--column", "note"),
        *("--task", "sequence-classification", *ON_CPU),
    )
    assert done.returncode == 1 and "1 of 4 rows failed" in done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2", "", "4"]
    assert rows[1]["note"] == "two\nlines, one note"
    assert "is no row of 2 columns" in rows[2]["error"] and rows[2]["label"] == ""
    for row in (rows[0], rows[1], rows[3]):
        (wanted,) = session.classify([row["note"]])
        assert row["label"] == wanted[0].label
        assert float(row["score"]) == pytest.approx(wanted[0].score, abs=1e-5)
        assert [s["label"] for s in json.loads(row["scores"])] == [s.label for s in wanted]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.csv", "out.csv"]


@pytest.mark.parametrize("task", ["embed", "token-classification"])
def test_a_parquet_table_keeps_its_columns_and_types(tmp_path: Path, text: str, session: Any, task: str) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    notes = [*NOTES, None, "the patient had pain"]
    table = pa.table({"id": pa.array(range(len(notes)), pa.int32()), "text": notes})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=10)
    done = spawn(
        "batch", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", "--bundle", text, "--task", task, *ON_CPU
    )
    assert done.returncode == 1, done.stderr
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.select(["id", "text"]).equals(table)
    assert found["error"].to_pylist() == [None] * len(NOTES) + ["row 41 holds no text", None]
    if task == "embed":
        assert found.schema.field("embedding").type == pa.list_(pa.float32())
        vectors = np.array([v for v in found["embedding"].to_pylist() if v is not None], np.float32)
        np.testing.assert_allclose(vectors, session.embed([n for n in notes if n is not None]), atol=1e-5)
    else:
        wanted = [[e.label for e in session.extract(n)] for n in notes if n is not None]
        assert [[e["label"] for e in row] for row in found["entities"].to_pylist() if row is not None] == wanted


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    (folder / "ward").mkdir(parents=True)
    for i in range(5):
        tiny_pair.drawn("disc" if i % 2 else "bars", i).save(folder / "ward" / f"{i}.png")
    (folder / "torn.png").write_bytes((folder / "ward" / "0.png").read_bytes()[:40])
    return folder


def test_a_folder_of_images_becomes_a_table_of_embeddings(tmp_path: Path, images: Path, pair: Workshop) -> None:
    done = spawn("batch", images, "-o", tmp_path / "out.csv", "--bundle", pair.bundle, *ON_CPU)
    assert done.returncode == 1 and "1 of 6 files failed" in done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["torn.png", *(f"ward/{i}.png" for i in range(5))]
    assert rows[0]["error"] and not rows[0]["embedding"]
    with medcompile.load(pair.bundle, backend="onnxruntime", variant="fp32", threads=1) as session:
        wanted = session.embed_images([images / row["file"] for row in rows[1:]])
    np.testing.assert_allclose([json.loads(row["embedding"]) for row in rows[1:]], wanted, atol=1e-5)


def test_prompts_are_matched_with_a_folder_of_images(tmp_path: Path, images: Path, pair: Workshop) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    prompts = list(tiny_pair.CLASSES.values())
    more = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = spawn("batch", images, "-o", tmp_path / "out.parquet", "--bundle", pair.bundle, *more, *ON_CPU)
    assert done.returncode == 1, done.stderr
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    with medcompile.load(pair.bundle, backend="onnxruntime", variant="fp32", threads=1) as session:
        wanted = session.match([images / row["file"] for row in rows[1:]], prompts)
    for row, scores in zip(rows[1:], wanted, strict=True):
        assert row["label"] == prompts[int(scores.argmax())]
        assert {s["label"]: s["score"] for s in row["scores"]} == pytest.approx(
            dict(zip(prompts, scores.tolist(), strict=True)), abs=1e-5
        )


def test_a_decoders_lines_are_answered_with_their_usage(tmp_path: Path, decoder: Path) -> None:
    url = "/v1/chat/completions"
    requests = [
        {**request(f"r{i}", url, model="llm", max_tokens=4, temperature=0), "custom_id": f"r{i}"} for i in range(20)
    ]
    for i, one in enumerate(requests):
        one["body"]["messages"] = [{"role": "user", "content": "pain " * (1 + i % 7)}]
    path = write(tmp_path / "in.jsonl", requests)
    done = spawn("batch", path, "-o", tmp_path / "out.jsonl", "--bundle", f"llm={decoder}", "--json", *ON_CPU)
    assert done.returncode == 0, done.stderr
    got = bodies(tmp_path / "out.jsonl")
    assert all(0 < body["usage"]["completion_tokens"] <= 4 for body in got.values())
    assert json.loads(done.stdout)["tokens_out"] == sum(body["usage"]["completion_tokens"] for body in got.values())
    same = [got[f"r{i}"]["choices"][0]["message"]["content"] for i in (1, 8, 15)]
    assert len(set(same)) == 1, "the same prompt was answered in two ways, greedily"


def test_identifiers_are_scrubbed_and_every_request_is_in_the_audit_log(tmp_path: Path, text: str) -> None:
    pytest.importorskip("presidio_analyzer")
    (tmp_path / "names").write_text(f"{PLANTED}\n")
    note = f"{PLANTED} had chest pain"
    requests = [request("a", "/v1/entities", input=note), request("b", "/v1/entities", input="chest pain")]
    requests.append(request("c", model="none", input=note))
    path = write(tmp_path / "in.jsonl", requests)
    more = ("--scrub", "--scrub-names", tmp_path / "names", "--audit-log", tmp_path / "audit")
    done = spawn("batch", path, "-o", tmp_path / "out.jsonl", "--bundle", text, *more, *ON_CPU)
    assert done.returncode == 1, done.stderr
    assert PLANTED not in (tmp_path / "out.jsonl").read_text()
    for entity in bodies(tmp_path / "out.jsonl")["a"]["data"][0]["entities"]:
        assert 0 <= entity["start"] < entity["end"] <= len(note)
    kept = b"".join(p.read_bytes() for p in (tmp_path / "audit").rglob("*") if p.is_file()).decode()
    records = [json.loads(line) for line in kept.splitlines() if '"route"' in line]
    assert sorted((r["route"], r["status"]) for r in records) == [
        *(("/v1/embeddings", 404), ("/v1/entities", 200), ("/v1/entities", 200)),
    ]
    assert {r["caller"] for r in records} == {"batch"} and PLANTED not in kept
    assert call("audit", "verify", tmp_path / "audit").exit_code == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["in.csv", "-o", "out.csv", "--column", "none"], "no column 'none'"),
        (["in.csv", "-o", "out.xlsx"], "not a kind of file"),
        (["in.csv", "-o", "out.csv", "--task", "image"], "has no task 'image'"),
        (["in.csv", "-o", "out.csv", "--prompt", "x"], "--prompt is for images"),
        (["clash.csv", "-o", "out.csv"], "columns named as the answers'"),
        (["in.jsonl", "-o", "out.jsonl", "--task", "embed"], "are for tables and folders"),
        (["none.jsonl", "-o", "out.jsonl"], "no such file"),
        (["in.jsonl", "-o", "none/out.jsonl"], "no such folder"),
        (["in.jsonl", "-o", "there.jsonl"], "is there already"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_loaded(
    tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, more: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medcompile.serve.logs.configure", lambda *_, **__: None)
    monkeypatch.setattr("medcompile.serve.private.no_dumps", lambda: None)
    (tmp_path / "in.csv").write_text("text\na\n")
    (tmp_path / "clash.csv").write_text("text,embedding\na,b\n")
    (tmp_path / "in.jsonl").write_text("{}\n")
    (tmp_path / "there.jsonl").write_text("dear\n")
    done = call("batch", *more, "--bundle", workshop.bundle)
    assert done.exit_code == 2 and told in done.stderr
    assert not list(tmp_path.glob("*.part*"))


def test_images_given_as_files_are_no_larger_than_an_image_may_be(tmp_path: Path, pair: Workshop) -> None:
    folder = tmp_path / "bombs"
    folder.mkdir()
    tiny_pair.drawn("disc", 1).save(folder / "good.png")
    PIL.Image.new("L", (20_000, 20_000)).save(folder / "bomb.png")
    done = spawn("batch", folder, "-o", tmp_path / "out.jsonl", "--bundle", pair.bundle, *ON_CPU)
    assert done.returncode == 1
    statuses = {a["custom_id"]: a["response"]["status_code"] for a in batches.lines(tmp_path / "out.jsonl")}
    assert statuses == {"bomb.png": 400, "good.png": 200}


def _until(condition: Any, timeout_s: float = 90) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen in time"
        time.sleep(0.005)


def _children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
