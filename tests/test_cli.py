"""The command line: what goes to stdout and what to stderr, for people and for machines, and what it costs to start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

import medcompile
from tests import tiny
from tests.command_line import call
from tests.tiny import Workshop

COMMANDS = ("build", "inspect", "verify", "run", "diff", "explain", "doctor", "schema")
TEXT = "the patient denies chest pain"


def build(workshop: Workshop, tmp_path: Path, *more: str) -> tuple[int, str, str]:
    done = call("build", workshop.recipe, "--out", tmp_path / "out", "--cache", workshop.cache, *more)
    return done.exit_code, done.stdout, done.stderr


# ---- build


def test_build_prints_the_bundles_folder_alone_on_stdout(small: Workshop, tmp_path: Path) -> None:
    code, out, err = build(small, tmp_path)
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert "non-inferior" in err and "cosine" in err and "onnxruntime-cpu" in err


def test_the_evidence_table_is_whole_where_stderr_is_no_terminal(small: Workshop, tmp_path: Path) -> None:
    _, _, err = build(small, tmp_path)
    row = next(line for line in err.splitlines() if "int8" in line and "cosine" in line)
    assert len([cell for cell in row.split("│") if cell.strip()]) >= 10


def test_build_json_gives_a_summary_on_stdout_and_events_on_stderr(small: Workshop, tmp_path: Path) -> None:
    code, out, err = build(small, tmp_path, "--json", "--set", "budget.cosine.max_drop=0.3")
    summary, events = json.loads(out), [json.loads(line) for line in err.splitlines()]
    assert code == 0 and summary["root"] == str(tmp_path / "out")
    assert {a["variant"]: a["verdict"] for a in summary["artifacts"]} == dict.fromkeys(("fp32", "int8"), "non-inferior")
    assert {e["event"] for e in events} >= {"begin", "end"}
    ended = [e for e in events if e["event"] == "end"]
    assert all(e["peak_rss_bytes"] > 0 and e["seconds"] > 0 for e in ended if not e["cached"])


def test_a_build_over_budget_exits_3_with_the_bundle_and_its_evidence(small: Workshop, tmp_path: Path) -> None:
    code, out, err = build(small, tmp_path, "--set", "budget.cosine.max_drop=1e-9", "--json")
    assert code == 3
    assert {a["variant"]: a["verdict"] for a in json.loads(out)["artifacts"]}["int8"] == "inferior"
    assert "OverBudgetError" in err and "hurts embed most in" in err and "fix: " in err
    assert call("run", tmp_path / "out", TEXT, "--variant", "int8").exit_code == 0


def test_verbose_names_cached_steps_and_shows_the_traceback_of_a_failure(small: Workshop, tmp_path: Path) -> None:
    _, _, quiet = build(small, tmp_path)
    _, _, verbose = build(small, tmp_path, "-v")
    assert " cached\n" in verbose and " cached\n" not in quiet
    keep = ("--set", "variants.int8.keep=['nowhere']")
    code, _, told = build(small, tmp_path, *keep)
    assert code == 1 and "Traceback" not in told and "quantize int8 failed" in told
    _, _, told = build(small, tmp_path, *keep, "-v")
    assert "Traceback" in told and "quantize.py" in told


def test_a_recipes_problems_come_with_file_line_and_column(small: Workshop, tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path, tiny.recipe(targets=["cpu"], colour="red"))
    done = call("build", path)
    assert done.exit_code == 2 and done.stdout == ""
    assert sum(line.startswith(f"{path}:") for line in done.stderr.splitlines()) >= 2


# ---- inspect


def test_inspect_shows_graphs_sizes_operators_and_evidence(workshop: Workshop) -> None:
    done = call("inspect", workshop.bundle)
    assert done.exit_code == 0 and done.stderr == ""
    for part in ("token-classification", "input_ids int64[batch, sequence]", "int8", "MatMul", "agreement", "digest"):
        assert part in done.stdout


def test_inspect_json_holds_what_the_bundle_holds(workshop: Workshop) -> None:
    found = json.loads(call("inspect", workshop.bundle, "--json").stdout)
    assert found["tasks"] == list(tiny.TASKS)
    assert set(found["layers"]) == {"fp32", "int8"}
    int8 = {(row["op"], row["precision"]) for row in found["layers"]["int8"]["embed"]}
    assert any(op == "MatMul" and "int8" in precision for op, precision in int8)
    assert found["provenance"]["evaluation"]["items"] == 40
    assert len(found["artifacts"]) == 2 * len(tiny.TASKS)


# ---- run


def test_run_embeds_the_first_task_by_default(workshop: Workshop) -> None:
    done = call("run", workshop.bundle, TEXT, "no fever", "--json")
    assert done.exit_code == 0 and done.stderr == ""
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(row) for row in rows] == [tiny.HIDDEN, tiny.HIDDEN]
    with medcompile.load(workshop.bundle) as session:
        assert rows[0] == pytest.approx(session.embed([TEXT])[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("task", tiny.TASKS)
def test_run_answers_every_task_for_machines_and_for_people(workshop: Workshop, task: str) -> None:
    text = "the patient denies [MASK] pain"
    done = call("run", workshop.bundle, text, "--task", task, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    if task == "token-classification":
        assert all(text[e["start"] : e["end"]] == e["text"] for e in answer)
    elif task == "sequence-classification":
        assert sum(s["score"] for s in answer) == pytest.approx(1, abs=1e-3)
    elif task == "fill-mask":
        assert len(answer) == 1 and len(answer[0]) == 5
    told = call("run", workshop.bundle, text, "--task", task)
    assert told.exit_code == 0 and told.stdout.strip() and told.stderr == ""


def test_run_reads_texts_files_and_stdin(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_bytes(TEXT.encode())
    asked = call("run", workshop.bundle, TEXT, "--json").stdout
    assert call("run", workshop.bundle, "--file", tmp_path / "note.txt", "--json").stdout == asked
    assert call("run", workshop.bundle, "--json", stdin=TEXT.encode()).stdout == asked
    assert call("run", workshop.bundle, "-", "--json", stdin=TEXT.encode()).stdout == asked
    several = call("run", workshop.bundle, TEXT, "-f", tmp_path / "note.txt", "--json").stdout.splitlines()
    assert len(several) == 2


def test_run_takes_an_empty_text_and_one_that_looks_like_markup(workshop: Workshop) -> None:
    for text in ("", "[bold]pain[/bold] [/x]", "café 🫀 \x00\x07"):
        done = call("run", workshop.bundle, text, "--task", "token-classification", "--json")
        assert done.exit_code == 0, done.stderr
        assert all(text[e["start"] : e["end"]] == e["text"] for e in json.loads(done.stdout))


# ---- the rest


def test_schema_is_a_json_schema_that_takes_a_good_recipe(small: Workshop) -> None:
    schema = json.loads(call("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(small.recipe.read_text()), schema)


def test_help_names_every_command_and_version_is_the_packages() -> None:
    done = call("--help")
    assert done.exit_code == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert call("--version").stdout == f"{medcompile.__version__}\n"
    for command in COMMANDS:
        assert call(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import medcompile", {"numpy", "typer", "rich", "pydantic", "yaml", "torch", "onnx"}),
        (
            "import sys; sys.argv = ['medcompile', '--help']\ntry:\n    from medcompile.cli import main; main()\n"
            "except SystemExit: pass",
            {"numpy", "pydantic", "yaml", "torch", "onnx", "onnx_ir", "onnxruntime", "openvino", "tokenizers"},
        ),
    ],
    ids=["import", "help"],
)
def test_starting_loads_nothing_heavy(code: str, heavy: set[str]) -> None:
    told = "import sys; print('\\n' + ' '.join({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{told}"], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "medcompile" in loaded
    assert loaded & heavy == set()


def test_output_into_a_closed_pipe_ends_quietly(workshop: Workshop) -> None:
    command = f"{sys.executable} -c 'from medcompile.cli import main; main()' schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{" and "Traceback" not in done.stderr
