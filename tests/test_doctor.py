"""Doctor: it looks at everything, and where something is missing it says exactly what to do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from medcompile import backends, doctor
from medcompile.errors import BackendUnavailable
from tests.command_line import call


def found(what: str) -> doctor.Finding:
    return next(f for f in doctor.examine() if f.what == what)


def test_every_finding_that_is_not_good_has_a_fix() -> None:
    findings = doctor.examine()
    assert {f.what for f in findings} >= {"machine", "memory", "build", "cache", "hub", "target onnxruntime-cpu"}
    assert all(f.found for f in findings)
    assert all(f.good or f.fix for f in findings)


def test_json_and_table_tell_the_same_and_no_bracket_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: object, target: str) -> None:
        raise BackendUnavailable("no library [x]", fix='pip install "medcompile[cpu]"')

    monkeypatch.setattr(type(backends.get("onnxruntime")), "probe", missing)
    findings = json.loads(call("doctor", "--json").stdout)
    broken = next(f for f in findings if f["what"] == "target onnxruntime-cpu")
    assert broken == {
        "what": "target onnxruntime-cpu",
        "good": False,
        "found": "no library [x]",
        "fix": 'pip install "medcompile[cpu]"',
    }
    table = call("doctor")
    assert table.exit_code == 0
    assert 'no  no library [x]; fix: pip install "medcompile[cpu]"' in table.stdout


def test_a_missing_build_library_is_answered_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx_ir" else honest(name))
    finding = found("build")
    assert not finding.good
    assert finding.found == "missing: onnx-ir"
    assert finding.fix == 'pip install "medcompile[build]"'


def test_a_cache_that_cannot_be_made_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDCOMPILE_CACHE", str(tmp_path / "file"))
    finding = found("cache")
    assert not finding.good and "MEDCOMPILE_CACHE" in finding.fix


def test_a_cache_on_a_full_disk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    finding = found("cache")
    assert not finding.good and finding.fix == "free some disk space"


def test_the_hubs_offline_switch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not found("hub").good
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    assert found("hub").good and "secret-token" not in found("hub").found
