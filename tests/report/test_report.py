"""The report: right, complete, accessible, closed to the network, the same twice, and without a word of the data."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medcompile import bundle, report
from medcompile.bundle import Bundle, Contents
from medcompile.errors import BundleError
from medcompile.report import words
from medcompile.spec import LayerRule, Margin, Precision, Variant, Verdict
from tests import bundles
from tests.command_line import call
from tests.report import full
from tests.report.reading import Element, Page
from tests.tiny import PLANTED, Workshop

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "pydantic", "yaml"}


@pytest.fixture
def found(tmp_path: Path) -> Bundle:
    return full.write(tmp_path / "full")


def read(found: Bundle) -> tuple[Page, dict[str, Any]]:
    page = Page((found.root / "report.html").read_text(encoding="utf-8"))
    return page, json.loads((found.root / "evidence.json").read_text(encoding="utf-8"))


def table(page: Page, caption: str) -> Element:
    return next(t for t in page.root.all("table") if t.all("caption")[0].words.startswith(caption))


def test_the_page_is_well_formed_and_can_be_read_by_everybody(found: Bundle) -> None:
    page, _ = read(found)
    assert page.problems == []
    assert [len(page.root.all(tag)) for tag in ("header", "nav", "main", "footer", "title")][:4] == [1, 1, 1, 1]
    (html,) = page.root.all("html")
    assert html.attributes["lang"] == "en"
    assert page.root.all("a")[0].words == "To the report"
    assert len(page.root.all("svg")) >= 8


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize(
    "what", [full.contents(), bundles.contents(), bundles.contents([])], ids=["full", "old", "empty"]
)
def test_a_bundle_that_lacks_things_has_a_whole_page_too(tmp_path: Path, what: Contents, bare: bool) -> None:
    if not what.artifacts or what.name == "sample":
        bare = True
    what = dataclasses.replace(what, assets={})
    page, evidence = read(full.write(tmp_path / "b", what, bare=bare))
    assert page.problems == []
    assert evidence["name"] == what.name


def test_the_verdict_comes_first_and_names_variant_target_and_margin(found: Bundle) -> None:
    page, evidence = read(found)
    verdict = page.root.all("section")[0].words
    assert verdict.startswith("Verdict Shown to be non-inferior to the original within the budget: int8 on fake-cpu.")
    basis = "At 98.33 % confidence, on 923 samples in 100 documents, it"
    good = f"{basis} loses at most 0.005 of f1 (margin 0.01) and 0.006 of recall[Disease] (margin 0.02)."
    assert f"int8 on fake-cpu is shown to be non-inferior. {good}" in verdict
    assert f"int4 on fake-cpu is inferior. {basis} loses 0.05 of f1 (margin 0.01)." in verdict
    unclear = (
        f"{basis} may lose 0.012 of f1 (margin 0.01; had there been no loss, this would have shown it with a chance"
    )
    assert f"int8 on fake-gpu is not shown to be non-inferior. {unclear} of 0.62, and 1,500 samples" in verdict
    assert "tensorrt: nothing is built for it. no GPU here" in verdict
    assert "int8 on fake-gpu, token-classification: its graph was run on a CPU in its place." in verdict
    assert evidence["verdict"]["headline"] in verdict
    assert all(f["sentence"] in verdict for f in evidence["verdict"]["findings"])


def test_nothing_shown_is_said_as_plainly(tmp_path: Path) -> None:
    what = full.contents()
    poor = dataclasses.replace(what, artifacts=(what.artifacts[0], what.artifacts[3]))
    page, _ = read(full.write(tmp_path / "poor", poor, bare=True))
    assert "No variant below fp32 is shown to be non-inferior" in page.root.all("strong")[0].words
    blank = tuple(dataclasses.replace(a, evidence=()) for a in what.artifacts)
    unjudged = dataclasses.replace(what, artifacts=blank, budget=())
    page, _ = read(full.write(tmp_path / "blank", unjudged, bare=True))
    assert "there is no evidence for or against" in page.root.all("strong")[0].words
    assert "No margin was set, so nothing is judged." in page.root.words


def test_the_figures_of_the_page_are_those_of_evidence_json(found: Bundle) -> None:
    page, evidence = read(found)
    wanted = []
    for artifact in evidence["artifacts"]:
        for e in artifact["evidence"]:
            interval = [float(v) for v in e["interval"]]
            row = [e["reference"], e["value"], e["difference"], e["lower"], *interval, e["margin"], e["confidence"]]
            row += [e["p_value"], e["power"], e["samples"], e["units"], e["samples_needed"], e["discordant"]]
            wanted += [v for v in row if v is not None]
    assert table(page, "Everything that was measured").values() == wanted
    margins = [m["max_drop"] for m in evidence["budget"]]
    assert table(page, "The budget").values()[::2] == margins == [0.01, 0.02]
    sizes = [v for a in evidence["artifacts"] for v in (a["latency_ms"], a["folder_bytes"]) if v is not None]
    assert table(page, "Artifacts: what").values() == sizes
    assert table(page, "Data sets").values() == [d["items"] for d in evidence["data"]]


def test_the_search_is_told_with_its_points_looks_and_reasons(found: Bundle) -> None:
    page, evidence = read(found)
    assert [p["name"] for p in evidence["searches"][0]["points"]] == ["all int8", "all int4"]
    assert "looked at 1 of at most 3 times" in page.root.words
    reasons = table(page, "Why each group").words
    assert all(f"because {n}" in reasons for n in range(6))
    sensitive = next(f for f in page.root.all("figure") if f.attributes["id"] == "sensitive-0")
    first = sensitive.all("tbody")[0].all("tr")[0].words
    assert first == "encoder.layer.3.output.dense, int8 not taken 0.9"


def test_flips_are_listed_by_id_and_the_rest_counted(found: Bundle) -> None:
    page, evidence = read(found)
    said = page.root.words
    assert "int8 on fake-cpu: 450" in said and "Harmful: 225" in said
    assert f"{3:064x}" in said and "25 more, which flips.json lists" in said
    assert len(evidence["flips"][found.artifacts[1].path]) == 450


def test_ranges_labels_layers_and_data_roles_are_there(found: Bundle) -> None:
    page, evidence = read(found)
    clipped = next(f for f in page.root.all("figure") if f.attributes["id"] == "clipping-0").all("tbody")[0]
    assert clipped.all("tr")[0].words == "encoder.layer.5.output.dense 0.5"
    labels = [f.words for f in page.root.all("figure") if f.attributes["id"].startswith("label-")]
    assert len(labels) == 2 and "recall[Drug]" in labels[0] and "not judged" in labels[0]
    assert "encoder.layer.0-5.output.dense" in table(page, "Operators by the precision").words
    assert [d["role"] for d in evidence["data"]] == ["calibration", "tuning", "acceptance"]
    assert "The sets are disjoint" in page.root.words
    told = table(page, "Data sets").words
    assert all(digit * 32 in told for digit in ("11", "22", "33")) and "deidentified" in told


def test_a_variants_settings_are_told_in_words_and_what_its_backend_computes_in() -> None:
    one = Variant("a", weights=Precision.INT8, keep=("x", "y"), compute={"float": "bfloat16"}, layers=(LayerRule("z"),))
    wanted = (
        "weights int8, keep x y, 1 rules that give layers other formats, computed by the backend with float=bfloat16"
    )
    assert words.settings(one) == wanted
    assert words.settings(Variant("fp32")) == "float32 throughout"


def test_shared_items_are_told_as_such(tmp_path: Path) -> None:
    what = full.contents()
    for shared, said in ((3, "3 items stand in more than one"), (None, "did not record whether")):
        provenance = {**what.provenance, "shared_items": shared}
        page, _ = read(full.write(tmp_path / f"{shared}", dataclasses.replace(what, provenance=provenance)))
        assert said in page.root.words and "disjoint" not in page.root.words


def test_it_claims_no_compliance_and_says_what_is_open(found: Bundle) -> None:
    page, evidence = read(found)
    open_ = next(s for s in page.root.all("section") if s.attributes["aria-labelledby"] == "open").words
    assert "no claim of regulatory compliance" in open_
    assert "not judged: recall[Drug]" in open_
    assert all(line in open_ for line in evidence["verdict"]["open"])


def test_names_from_outside_stay_text(found: Bundle) -> None:
    text = (found.root / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "\u202e" not in text
    assert "&lt;script&gt;" in text


def test_the_same_bundle_gives_the_same_bytes_from_the_build_and_from_the_command(
    found: Bundle, tmp_path: Path
) -> None:
    again = full.write(tmp_path / "again")
    for name in ("report.html", "evidence.json"):
        assert (again.root / name).read_bytes() == (found.root / name).read_bytes()
        assert name in found.files
    done = call("report", found.root, "-o", tmp_path / "page.html")
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_bytes() == (found.root / "report.html").read_bytes()
    assert call("report", found.root, "--json").stdout == (found.root / "evidence.json").read_text(encoding="utf-8")
    assert found.digest not in (found.root / "report.html").read_text(encoding="utf-8")


def test_the_command_writes_here_unless_told_otherwise_and_never_into_the_bundle(
    found: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("report", found.root).stdout == "full-report.html\n"
    for place in (found.root / "report.html", tmp_path / "nowhere" / "page.html"):
        done = call("report", found.root, "-o", place)
        assert done.exit_code == 2 and "fix: name" in done.stderr
    bundle.read(found.root)


def test_a_rewritten_bundle_has_a_new_report_and_the_old_one_keeps_its_own(found: Bundle, tmp_path: Path) -> None:
    before = (found.root / "report.html").read_bytes()
    cut = [a for a in found.artifacts if a.variant != "int4"]
    made = bundle.rewrite(found, tmp_path / "new", cut, told=report.texts)
    bundle.read(found.root)
    assert (found.root / "report.html").read_bytes() == before
    page, evidence = read(made)
    assert "int4 on fake-cpu" not in page.root.all("section")[0].words.split("What did not run")[0]
    assert {a["variant"] for a in evidence["artifacts"]} == {"fp32", "int8"}


@pytest.mark.parametrize("name", ["calibration.json", "flips.json", "search.json", "layers.json"])
def test_a_file_that_is_not_what_a_build_writes_is_named(found: Bundle, name: str) -> None:
    (found.root / name).write_text('[["' if name == "layers.json" else '{"x": 3}')
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        report.texts(found, found.root)


def test_a_loss_is_told_in_the_metrics_own_unit_and_a_gain_as_none(tmp_path: Path) -> None:
    what = full.contents()
    gain = dataclasses.replace(full.evidence("perplexity", 0.02), lower=0.01)
    first = dataclasses.replace(what.artifacts[1], evidence=(gain,))
    what = dataclasses.replace(what, artifacts=(first,), budget=(Margin("perplexity", 0.01),))
    page, _ = read(full.write(tmp_path / "b", what, bare=True))
    assert "it loses at most 0 of perplexity (margin 0.01, as a share of the original's)." in page.root.words
    assert first.verdict is Verdict.NON_INFERIOR


def test_reading_a_bundle_for_its_report_loads_no_build_library(found: Bundle) -> None:
    code = (
        "import sys; from medcompile import bundle, report\n"
        "found = bundle.read(sys.argv[1]); report.texts(found, found.root)\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(found.root)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("fixture", ["workshop", "pair"])
def test_a_build_writes_it_for_every_graph_without_a_word_of_the_data(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    workshop: Workshop = request.getfixturevalue(fixture)
    built = bundle.read(workshop.bundle)
    page, evidence = read(built)
    text = (built.root / "report.html").read_text(encoding="utf-8") + json.dumps(evidence)
    assert page.problems == []
    assert {a["graph"] for a in evidence["artifacts"]} == set(built.graphs)
    assert not [word for word in PLANTED.split() if word in text]
    assert str(workshop.root) not in text
    ranges = evidence["clipping"]["int8"]
    assert set(ranges) == set(built.graphs) and all(ranges.values())
    assert evidence["shared_items"] == 0
    assert report.texts(built, built.root)["report.html"] == (built.root / "report.html").read_text(encoding="utf-8")
