"""medcompile bench as a user types it, on a tiny bundle."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from medcompile.bench import results
from tests.command_line import call
from tests.tiny import Workshop

FAKE = str(Path(__file__).parent / "fake.py")
QUICK = ("--rounds", "6", "--threads", "1", "--no-limits", "--shapes", "2x16")


@pytest.fixture(scope="module")
def place(small: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a comparison was written."""
    out = tmp_path_factory.mktemp("out")
    names = f"medcompile,{FAKE}:good,vllm"
    done = call(
        "bench",
        small.bundle,
        "--backends",
        names,
        "--reference",
        "medcompile:fp32@onnxruntime-cpu",
        *QUICK,
        "--out",
        out,
    )
    assert done.exit_code == 0, done.stderr
    (out / "stdout").write_text(done.stdout)
    return out


def test_every_artifact_of_the_bundle_competes_and_the_rest_is_listed_with_its_reason(place: Path) -> None:
    found = results.read(place / "bench.json")
    ours = {e.name for e in found.entries if e.ours}
    assert ours == {"medcompile:fp32@onnxruntime-cpu", "medcompile:int8@onnxruntime-cpu"}
    for entry in found.entries:
        assert (entry.timing("2x16") is None) == (entry.missing is not None)
    vllm = found.entry("vllm")
    assert vllm is not None and vllm.missing is not None and vllm.missing.reason
    assert "does not run embed" in (place / "stdout").read_text()


def test_accuracy_is_told_of_the_runs_that_were_timed(place: Path) -> None:
    found = results.read(place / "bench.json")
    int8, fake = (found.entry(n) for n in ("medcompile:int8@onnxruntime-cpu", "fake:good"))
    assert int8 is not None and fake is not None
    accuracies = [e.timing("2x16").accuracy for e in (int8, fake)]  # type: ignore[union-attr]
    assert accuracies[0] is not None and accuracies[1] is not None
    assert 0.9 < accuracies[0].cosine_mean < 1.0  # type: ignore[operator]
    assert "shape" in accuracies[1].wrong


def test_the_file_names_hardware_versions_inputs_and_the_order_of_the_rounds(place: Path) -> None:
    raw = json.loads((place / "bench.json").read_text())
    assert raw["schema_version"] == 1
    assert raw["digests"]["bundle"] and raw["digests"]["inputs"]
    assert raw["machine"]["arch"]
    assert len(raw["shapes"][0]["orders"]) == 6
    ran = next(e for e in raw["entries"] if e["name"] == "medcompile:int8@onnxruntime-cpu")
    assert ran["versions"]["python"]
    assert len(ran["cells"][0]["turns"]) == 6


def test_the_page_is_one_well_formed_file_that_fetches_and_runs_nothing(place: Path) -> None:
    page = (place / "bench.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    body = page[page.index("<main>") : page.index("</main>") + len("</main>")]
    root = ET.fromstring(body)
    assert len(root.findall(".//svg")) >= 2
    assert "Latency against accuracy" in body
    assert "Not run" in body


def test_a_run_compared_with_itself_slower_exits_1(small: Workshop, place: Path, tmp_path: Path) -> None:
    raw = json.loads((place / "bench.json").read_text())
    for entry in raw["entries"]:
        for cell in entry["cells"]:
            if entry["name"] == "medcompile:int8@onnxruntime-cpu":
                cell["turns"] = [t / 50 for t in cell["turns"]]
    (tmp_path / "old.json").write_text(json.dumps(raw))
    names = "medcompile"
    again = ("--backends", names, "--reference", "medcompile:fp32@onnxruntime-cpu", *QUICK, "--out", tmp_path)
    worse = call("bench", small.bundle, *again, "--compare", tmp_path / "old.json")
    assert worse.exit_code == 1
    assert "medcompile:int8@onnxruntime-cpu at 2x16" in worse.stderr
    other = call("bench", small.bundle, *again[:-3], "2x8", "--out", tmp_path, "--compare", tmp_path / "old.json")
    assert other.exit_code == 2
    assert "no cell" in other.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--clock", "wall"), "--clock wall"),
        (("--threads", "999"), "--threads 999"),
        (("--backends", "nobody"), "no contender 'nobody'"),
        (("--python", "vllm=/nowhere"), "no such interpreter"),
        (("--task", "image"), "no task 'image'"),
        (("--compare", "nothing.json"), "nothing.json"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(
    small: Workshop, tmp_path: Path, wrong: tuple[str, str], said: str
) -> None:
    done = call("bench", small.bundle, *QUICK, "--out", tmp_path, *wrong)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "fix:" in done.stderr
