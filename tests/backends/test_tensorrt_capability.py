"""Polygraphy's report about a graph that the parser refuses, in the words of an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from medcompile.backends import _tensorrt_capability as capability
from medcompile.backends import _tensorrt_job as job
from tests import graphs


def test_the_report_names_the_nodes_in_no_part() -> None:
    nodes = ["a (Add)", "b (Mish2)", "c (Mul)"]
    expected = "Polygraphy: the parser takes 2 of 3 nodes, in 2 parts; not b (Mish2)"
    assert capability.words([[0], [2]], nodes) == expected


def test_a_long_report_is_cut_and_counted() -> None:
    said = capability.words([[0]], [f"n{i} (Add)" for i in range(9)])
    assert said.endswith("in 1 part; not n1 (Add), n2 (Add), n3 (Add), n4 (Add), n5 (Add) and 3 more")


def test_without_polygraphy_there_is_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "find_spec", lambda name: None)
    assert capability.parts("tensorrt_rtx", Path("embed.onnx")) == []
    assert capability.words([], ["a (Add)"]) == ""


def test_a_fault_in_the_report_costs_the_report_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import json, os
from pathlib import Path
Path("outcome.json").write_text(json.dumps({"built": False, "problems": ["no such operator"], "unparsed": True}))
os.abort()
"""
    monkeypatch.setattr(job, "_command", lambda: [sys.executable, "-c", code])
    outcome = job.run(job.Job("no_library", "embed.onnx", [], []), tmp_path, "graph embed", 30, tmp_path)
    assert outcome.problems == ["no such operator"] and not outcome.parts


def test_polygraphy_finds_the_node_that_the_parser_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason='pip install "medcompile[rtx]"')
    pytest.importorskip("polygraphy", reason='pip install "medcompile[rtx]"')
    path = graphs.write(graphs.VARIANTS["fp32"], tmp_path)
    raw = path.read_bytes()
    assert raw.count(b"\x22\x04Gelu") == 1
    path.write_bytes(raw.replace(b"\x22\x04Gelu", b"\x22\x04Golu"))
    code = f"""
from pathlib import Path
import json
from medcompile.backends import _tensorrt_capability as capability
print(json.dumps(capability.parts("tensorrt_rtx", Path({str(path)!r}))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parts = json.loads(done.stdout.splitlines()[-1])
    assert len(parts) == 2 and parts[1][0] == parts[0][-1] + 2
