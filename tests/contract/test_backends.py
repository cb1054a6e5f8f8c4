"""What every backend file owes the rest, whichever library it drives. Backends whose library is missing are skipped."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile import backends
from medcompile.backends import Backend, Executor
from medcompile.errors import BackendError, BackendUnavailable, InputError, ProfileError, UsageError
from tests import graphs

TARGETS = [target for name in backends.names() for target in backends.get(name).targets]


@pytest.fixture(params=TARGETS)
def backend(request: pytest.FixtureRequest) -> tuple[Backend, str]:
    found = backends.for_target(request.param)
    try:
        found.probe(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return found, request.param


def _build(backend: tuple[Backend, str], variant: str, folder: Path) -> tuple[Path, Any]:
    """What the backend builds of that variant. It has to build fp32, static and floats among static; others it may
    refuse, with a fix."""
    library, target = backend
    source = graphs.write(graphs.VARIANTS[variant], folder / "typed")
    out = folder / "artifact"
    out.mkdir()
    try:
        built = library.build(source, graphs.SPEC, graphs.VARIANTS[variant], library.probe(target), out)
    except BackendError as error:
        if variant in ("fp32", "static", "mixed static"):
            raise
        assert error.fix
        pytest.skip(str(error))
    return out / built.file, built


def _device(backend: tuple[Backend, str]) -> None:
    """Skip what runs an artifact where the backend's library is here, but not its device."""
    if not backend[0].probe(backend[1]).present:
        pytest.skip(f"{backend[1]} builds here, and has no device to run on")


@pytest.fixture
def executor(backend: tuple[Backend, str], tmp_path: Path) -> Iterator[Executor]:
    _device(backend)
    path, built = _build(backend, "static", tmp_path)
    with backend[0].load(path, graphs.SPEC, graphs.VARIANTS["static"], built.target, 1) as loaded:
        yield loaded


def test_a_backend_shows_its_file_name_and_targets_that_nobody_else_has(backend: tuple[Backend, str]) -> None:
    library, target = backend
    assert library.name in backends.names()
    assert TARGETS.count(target) == 1
    probed = library.probe(target)
    assert (probed.name, probed.backend) == (target, library.name)
    assert probed.version and probed.arch


@pytest.mark.parametrize("variant", graphs.VARIANTS)
def test_build_leaves_files_that_load_after_the_typed_graph_is_gone(
    backend: tuple[Backend, str], variant: str, tmp_path: Path
) -> None:
    _device(backend)
    path, built = _build(backend, variant, tmp_path)
    for file in (tmp_path / "typed").iterdir():
        file.unlink()
    with backend[0].load(path, graphs.SPEC, graphs.VARIANTS[variant], built.target, 1) as executor:
        result = executor.run(graphs.feeds())
    assert set(result) == {"embedding"}
    assert result["embedding"].shape == (3, graphs.HIDDEN)
    assert result["embedding"].dtype == np.float32
    assert np.isfinite(result["embedding"]).all()


def test_two_builds_in_different_folders_give_the_same_bytes(backend: tuple[Backend, str], tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        _build(backend, "static", folder)
    names = sorted(p.name for p in (first / "artifact").rglob("*"))
    assert names == sorted(p.name for p in (second / "artifact").rglob("*"))
    for name in names:
        assert (first / "artifact" / name).read_bytes() == (second / "artifact" / name).read_bytes(), name


def test_build_leaves_no_trace_of_the_folders_of_this_machine(backend: tuple[Backend, str], tmp_path: Path) -> None:
    _build(backend, "static", tmp_path)
    for file in (tmp_path / "artifact").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_load_writes_nothing_into_the_artifact(backend: tuple[Backend, str], tmp_path: Path) -> None:
    _device(backend)
    path, built = _build(backend, "static", tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir()}
    path.parent.chmod(0o555)
    try:
        with backend[0].load(path, graphs.SPEC, graphs.VARIANTS["static"], built.target, None) as executor:
            executor.run(graphs.feeds())
    finally:
        path.parent.chmod(0o755)
    assert {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir()} == before


def test_a_damaged_artifact_is_a_backend_error(backend: tuple[Backend, str], tmp_path: Path) -> None:
    path, built = _build(backend, "static", tmp_path)
    path.write_bytes(b"not what build() wrote")
    with pytest.raises(BackendError) as caught:
        backend[0].load(path, graphs.SPEC, graphs.VARIANTS["static"], built.target, 1)
    assert caught.value.fix


def test_any_shape_inside_the_profile_runs_and_gives_its_own_shape(executor: Executor) -> None:
    for batch, sequence in ((1, 2), (4, 32), (2, 7), (1, 2)):
        assert executor.run(graphs.feeds(batch, sequence))["embedding"].shape == (batch, graphs.HIDDEN)


def test_outputs_belong_to_the_caller(executor: Executor) -> None:
    first = executor.run(graphs.feeds(seed=1))["embedding"]
    kept = first.copy()
    executor.run(graphs.feeds(seed=2))
    assert np.array_equal(first, kept)
    first += 1  # writable


def test_threads_that_run_at_once_get_what_they_would_get_alone(executor: Executor) -> None:
    cases = [graphs.feeds(1 + i % 4, 2 + 3 * i, seed=i) for i in range(8)]
    alone = [executor.run(case)["embedding"] for case in cases]
    wrong: list[bool] = []

    def work(index: int) -> None:
        results = [executor.run(cases[index])["embedding"] for _ in range(10)]
        wrong.extend(not np.allclose(result, alone[index], atol=1e-5) for result in results)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 10 * len(cases) and not any(wrong)


def test_a_closed_executor_says_so(executor: Executor) -> None:
    executor.close()
    with pytest.raises(BackendError, match="closed"):
        executor.run(graphs.feeds())


@pytest.mark.parametrize(
    ("batch", "sequence", "words"),
    [
        (5, 16, "batch=5 is above profile default's max 4"),
        (2, 33, "sequence=33 is above profile default's max 32"),
        (2, 1, "sequence=1 is below profile default's min 2"),
    ],
)
def test_a_shape_outside_every_profile_names_axis_value_and_limit(
    executor: Executor, batch: int, sequence: int, words: str
) -> None:
    with pytest.raises(ProfileError, match=words) as caught:
        executor.run(graphs.feeds(batch, sequence))
    assert "rebuild" in caught.value.fix


def test_inputs_of_unequal_length_name_the_odd_one(executor: Executor) -> None:
    feeds = graphs.feeds()
    feeds["token_type_ids"] = feeds["token_type_ids"][:, :-1]
    with pytest.raises(ProfileError, match=r"token_type_ids has shape \[3, 15\].*sequence=16"):
        executor.run(feeds)


def test_wrong_names_and_dtypes_are_named(executor: Executor) -> None:
    feeds = graphs.feeds()
    renamed = {name.replace("attention_", ""): array for name, array in feeds.items()}
    with pytest.raises(InputError, match="'attention_mask' is missing; 'mask' is unknown"):
        executor.run(renamed)
    with pytest.raises(InputError, match="input_ids is int32, and the graph takes int64"):
        executor.run({**feeds, "input_ids": feeds["input_ids"].astype(np.int32)})


def test_loading_and_running_imports_nothing_of_the_compiler(backend: tuple[Backend, str], tmp_path: Path) -> None:
    _device(backend)
    path, built = _build(backend, "static", tmp_path)
    code = f"""
import sys, numpy as np
from pathlib import Path
from medcompile import backends
from medcompile.spec import Axis, GraphSpec, Profile, Target, TensorSpec, Variant
spec = {graphs.SPEC!r}
backend = backends.for_target({backend[1]!r})
ids = np.ones((2, 8), np.int64)
with backend.load(Path({str(path)!r}), spec, Variant("static"), {built.target!r}, 1) as executor:
    executor.run(dict.fromkeys({graphs.INPUTS!r}, ids))
heavy = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "pydantic", "yaml", "openvino_telemetry")
print(*(name for name in heavy if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_an_unknown_backend_or_target_is_a_usage_error_that_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match="onnxruntime"):
        backends.get("onyxruntime")
    with pytest.raises(UsageError) as caught:
        backends.for_target("onnxruntime-tpu")
    assert "onnxruntime-cpu" in caught.value.fix
