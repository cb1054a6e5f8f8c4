"""Who may import whom: ARCHITECTURE's borders, read from the source, and proved in a fresh process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import medcompile
from tests.bundles import artifact, contents, write

PACKAGE = Path(medcompile.__file__).parent
BUILD_ONLY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "pydantic", "yaml"}
LINES_PER_FILE = 500
LINES_IN_ALL = 10_000
HEAVY = {"torch", "transformers", "open_clip", "timm"}
BACKEND_LIBRARIES = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "nncf"}


class Imports(ast.NodeVisitor):
    """The modules one file imports. at_load: those that run when the file is imported; later: inside functions.

    What stands under `if TYPE_CHECKING:` never runs and is left out.
    """

    def __init__(self, path: Path) -> None:
        self.at_load: set[str] = set()
        self.later: set[str] = set()
        self._inside = 0
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    @property
    def all(self) -> set[str]:
        return self.at_load | self.later

    def _add(self, module: str) -> None:
        (self.later if self._inside else self.at_load).add(module)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute here"
        assert node.module
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            self._add(full if full in MODULES else node.module)

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.visit(node.test)
            for child in node.body:
                self.visit(child)
        for child in node.orelse:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._inside += 1
        self.generic_visit(node)
        self._inside -= 1

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}
MODULES = set(FILES)
IMPORTS = {name: Imports(path) for name, path in FILES.items()}


def roots(modules: set[str]) -> set[str]:
    return {m.partition(".")[0] for m in modules}


def within(room: str) -> list[str]:
    """The modules of a room: medcompile.<room> itself and whatever lies below it."""
    name = f"medcompile.{room}"
    return [m for m in sorted(MODULES) if m == name or m.startswith(name + ".")]


def own(modules: set[str], room: str) -> set[str]:
    return {m for m in modules if m in within(room)}


def reached_at_load(module: str) -> set[str]:
    """Everything, ours or not, that importing the module imports: its own imports, theirs, and parent packages."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            todo += IMPORTS[name].at_load
        if "." in name:
            todo.append(name.rpartition(".")[0])
    return seen


@pytest.mark.parametrize("module", [*within("spec"), *within("errors"), *within("bundle"), *within("runtime")])
def test_the_runtime_half_imports_no_build_library_even_through_others(module: str) -> None:
    assert roots(IMPORTS[module].all).isdisjoint(BUILD_ONLY)
    assert roots(reached_at_load(module)).isdisjoint(BUILD_ONLY)


@pytest.mark.parametrize("module", [*within("spec"), *within("errors"), *within("bundle"), "medcompile"])
def test_the_light_rooms_import_only_the_standard_library_and_each_other(module: str) -> None:
    assert roots(reached_at_load(module)) <= set(sys.stdlib_module_names) | {"medcompile", "__future__"}


@pytest.mark.parametrize("module", within("backends"))
def test_a_backend_imports_libraries_inside_functions_and_never_a_sibling(module: str) -> None:
    assert roots(IMPORTS[module].at_load).isdisjoint(BUILD_ONLY | BACKEND_LIBRARIES)
    private = {m for m in within("backends") if m.rpartition(".")[2].startswith("_")}  # parts of one, or shared
    assert own(IMPORTS[module].all, "backends") <= {"medcompile.backends", module} | private


@pytest.mark.parametrize("module", within("passes"))
def test_a_pass_imports_no_backend(module: str) -> None:
    assert not own(IMPORTS[module].all, "backends")


@pytest.mark.parametrize("module", within("quantizers"))
def test_a_quantizer_never_sees_a_graph(module: str) -> None:
    assert roots(reached_at_load(module) | IMPORTS[module].later).isdisjoint({"onnx", "onnx_ir", "onnxscript", "torch"})


@pytest.mark.parametrize("module", within("metrics"))
def test_metrics_import_numpy_and_the_standard_library_alone(module: str) -> None:
    assert roots(IMPORTS[module].all) <= set(sys.stdlib_module_names) | {"medcompile", "numpy", "__future__"}


@pytest.mark.parametrize("module", within("models"))
def test_a_model_family_imports_torch_inside_functions(module: str) -> None:
    public = not module.rpartition(".")[2].startswith("_")
    if public:  # a private file of the room may build torch modules; a public one then imports it inside functions
        assert roots(reached_at_load(module)).isdisjoint(HEAVY)


def test_nothing_but_the_command_line_sits_on_serve_and_bench() -> None:
    for room in ("serve", "bench"):
        users = {m for m in MODULES if own(IMPORTS[m].all, room)} - set(within(room))
        assert users <= {*within("cli"), *within("commands")}


def test_the_pipeline_is_known_to_the_public_face_and_the_command_line_alone() -> None:
    users = {m for m in MODULES if own(IMPORTS[m].all, "pipeline")} - set(within("pipeline"))
    assert users <= {"medcompile", *within("cli"), *within("commands"), *within("bench")}


def test_there_are_no_import_cycles() -> None:
    ours = {
        m: {i for i in IMPORTS[m].all if i in MODULES and i != "medcompile"} - {m} for m in MODULES - {"medcompile"}
    }
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(ours[module]):
                walk(other, (*trail, module))
            done.add(module)

    for module in sorted(ours):
        walk(module, ())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_file_is_longer_than_500_lines(module: str) -> None:
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= LINES_PER_FILE


def test_the_whole_product_stays_within_a_few_times_its_aim() -> None:
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in FILES.values())
    if lines > LINES_IN_ALL:
        warnings.warn(f"medcompile has {lines} lines; the aim is {LINES_IN_ALL}", stacklevel=1)
    assert lines <= 5 * LINES_IN_ALL


def test_importing_medcompile_loads_the_standard_library_alone() -> None:
    code = "import sys; before = set(sys.modules); import medcompile; print('\\n'.join(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert roots(set(loaded)) <= set(sys.stdlib_module_names) | {"medcompile"}


FRESH = """
import json, sys
import medcompile
from medcompile import backends
from tests.runtime.fakes import FakeExecutor

class Fake:
    name = "fake"
    def probe(self, target):
        from tests.bundles import CPU
        return CPU
    def load(self, path, spec, variant, target, threads):
        return FakeExecutor(spec)

if sys.argv[2] == "fake":
    backends.get = {"fake": Fake()}.__getitem__
with medcompile.load(sys.argv[1], backend=sys.argv[2]) as session:
    shape = session.embed("chest pain").shape
print(json.dumps([list(shape), sorted(m.partition(".")[0] for m in sys.modules)]))
"""


def loaded_by_a_fresh_process(place: Path, backend: str) -> tuple[list[int], set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(place), backend],
        check=True,
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    shape, modules = json.loads(done.stdout)
    return shape, set(modules)


def test_a_fresh_process_that_runs_a_bundle_loads_no_build_library(tmp_path: Path) -> None:
    write(tmp_path / "b", contents([artifact("fp32")]))
    shape, modules = loaded_by_a_fresh_process(tmp_path / "b", "fake")
    assert shape == [1, 6]
    assert {"numpy", "tokenizers"} <= modules
    assert modules.isdisjoint(BUILD_ONLY)
