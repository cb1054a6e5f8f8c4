"""The executor of a TensorRT engine, over a fake CUDA that raises a Fault for every broken rule, and a fake library."""

from __future__ import annotations

import ast
import dataclasses
import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from medcompile.backends import _cuda, _tensorrt_executor, _tensorrt_lane
from medcompile.backends._tensorrt_executor import LANES, TensorRtExecutor, load_engine
from medcompile.backends._tensorrt_lane import GRAPHS, REPEATS
from medcompile.errors import BackendError, BackendUnavailable, InputError, ProfileError
from medcompile.spec import Axis, GraphSpec, Profile, TensorSpec
from tests.backends import fake_tensorrt
from tests.backends.fake_cuda import LIVING, FakeCuda, Fault
from tests.backends.fake_tensorrt import PLAN, DataType, Fake, TensorLocation, summing

NAMES = ("input_ids", "attention_mask", "token_type_ids")
SPEC = GraphSpec(
    "embed",
    tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in NAMES),
    (TensorSpec("embedding", "float32", ("batch", 3)), TensorSpec("logits", "float32", ("batch", "sequence", 3))),
    (
        Profile("wide", (Axis("batch", 1, 8, 64), Axis("sequence", 2, 64, 512))),
        Profile("narrow", (Axis("batch", 1, 1, 4), Axis("sequence", 2, 16, 32))),
    ),
)
Feeds = dict[str, np.ndarray[Any, Any]]


def feeds(batch: int = 2, sequence: int = 8, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 1000, (batch, sequence)) for name in NAMES}


def same(given: Feeds, wanted: Feeds) -> bool:
    return given.keys() == wanted.keys() and all(np.array_equal(given[n], wanted[n]) for n in wanted)


@pytest.fixture
def fake() -> Iterator[Fake]:
    """An engine to load. Whatever a test does, after its executors are closed nothing may be left."""
    cuda = FakeCuda()
    yield Fake(cuda, SPEC, summing)
    gc.collect()
    assert cuda.left() == {}
    assert not list(LIVING)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "engine.plan"
    path.write_bytes(PLAN)
    return path


@pytest.fixture
def executor(fake: Fake, plan: Path) -> Iterator[TensorRtExecutor]:
    with load_engine(plan, SPEC, fake.library(), fake.cuda) as loaded:
        yield loaded


def repeat(executor: TensorRtExecutor, times: int, batch: int = 2, sequence: int = 8) -> None:
    for seed in range(times):
        case = feeds(batch, sequence, seed)
        assert same(executor.run(case), summing(case)), seed


# ---- results


def test_every_shape_gives_what_the_engine_computes_from_this_runs_inputs(executor: TensorRtExecutor) -> None:
    for seed, (batch, sequence) in enumerate([(1, 2), (64, 512), (2, 8), (4, 32), (5, 32), (2, 8), (1, 33)]):
        case = feeds(batch, sequence, seed)
        assert same(executor.run(case), summing(case))


def test_inputs_that_are_views_of_something_else_are_read_as_they_look(executor: TensorRtExecutor) -> None:
    case = {name: array.T for name, array in feeds(8, 4).items()}
    assert same(executor.run(case), summing(case))


def test_outputs_belong_to_the_caller_and_outlive_later_runs_and_the_executor(
    executor: TensorRtExecutor,
) -> None:
    case = feeds(seed=1)
    first = executor.run(case)
    repeat(executor, REPEATS + 2)
    executor.close()
    assert same(first, summing(case))
    first["embedding"] += 1  # writable


def test_int64_ids_above_32_bits_arrive_whole(executor: TensorRtExecutor, fake: Fake) -> None:
    seen: list[Feeds] = []
    fake.compute = lambda given: (seen.append({n: a.copy() for n, a in given.items()}), summing(given))[1]
    case = feeds()
    case["input_ids"][0, 0] = 1 << 40
    executor.run(case)
    assert seen[0]["input_ids"].dtype == np.int64
    assert seen[0]["input_ids"][0, 0] == 1 << 40


def test_a_library_without_runtime_configurations_serves_too(fake: Fake, plan: Path) -> None:
    with load_engine(plan, SPEC, fake.library(configurable=False), fake.cuda) as executor:
        repeat(executor, REPEATS + 2)


def test_a_graph_without_dynamic_axes_runs_in_the_engines_only_profile(fake: Fake, plan: Path) -> None:
    fake.spec = GraphSpec(
        "fixed",
        tuple(TensorSpec(name, "int64", (2, 8)) for name in NAMES),
        (TensorSpec("embedding", "float32", (2, 3)), TensorSpec("logits", "float32", (2, 8, 3))),
        (),
    )
    with load_engine(plan, fake.spec, fake.library(), fake.cuda) as executor:
        repeat(executor, REPEATS + 2)


# ---- profiles


def test_the_smallest_profile_that_holds_a_shape_is_taken_and_switched_only_when_it_changes(
    executor: TensorRtExecutor, fake: Fake
) -> None:
    for batch, sequence in [(1, 2), (4, 32), (5, 32), (2, 40), (2, 41), (4, 31)]:
        executor.run(feeds(batch, sequence))
    assert fake.profiles_set == [1, 0, 1]


@pytest.mark.parametrize(
    ("batch", "sequence", "words"),
    [
        (65, 8, "batch=65 is above profile wide's max 64"),
        (2, 513, "sequence=513 is above profile wide's max 512"),
        (2, 1, "sequence=1 is below profile narrow's min 2"),
    ],
)
def test_a_shape_outside_every_profile_names_axis_value_limit_and_the_fix(
    executor: TensorRtExecutor, fake: Fake, batch: int, sequence: int, words: str
) -> None:
    with pytest.raises(ProfileError, match=words) as caught:
        executor.run(feeds(batch, sequence))
    assert "widen shapes in the recipe and rebuild" in caught.value.fix
    assert "malloc" not in fake.cuda.calls


def test_an_input_of_another_dtype_is_refused_and_not_cast(executor: TensorRtExecutor) -> None:
    case = feeds()
    with pytest.raises(InputError, match="input_ids is int32, and the graph takes int64"):
        executor.run({**case, "input_ids": case["input_ids"].astype(np.int32)})


# ---- memory


def test_memory_is_taken_once_for_runs_of_one_size_and_doubles_as_they_grow(
    executor: TensorRtExecutor, fake: Fake
) -> None:
    def taken() -> int:
        return fake.cuda.calls.count("malloc")

    executor.run(feeds(1, 8))
    assert taken() == 2  # the workspace, and the tensors
    for sequence in range(8, 33):
        executor.run(feeds(1, sequence))
    assert taken() == 2
    for batch in range(1, 65):
        executor.run(feeds(batch, 512))
    largest = 64 * 512 * (3 * 8 + 3 * 4)
    assert taken() <= 2 + int(np.log2(largest / (1 << 16))) + 1


def test_one_copy_each_way_carries_all_tensors_of_a_run(executor: TensorRtExecutor, fake: Fake) -> None:
    executor.run(feeds())
    assert fake.cuda.calls.count("copy_to_device") == 1
    assert fake.cuda.calls.count("copy_to_host") == 1


def test_graphs_of_addresses_that_moved_are_dropped_and_made_again(executor: TensorRtExecutor, fake: Fake) -> None:
    repeat(executor, REPEATS)
    executor.run(feeds(64, 512))
    assert fake.cuda.calls.count("destroy_graph") == 1
    repeat(executor, REPEATS + 1)
    assert fake.cuda.calls.count("capture") == 2


def test_no_memory_for_the_first_run_is_an_error_that_leaves_nothing_and_the_next_run_works(
    executor: TensorRtExecutor, fake: Fake
) -> None:
    for call in ("create_stream", "malloc", "malloc_host"):
        fake.cuda.fail[call] = 1
        with pytest.raises(BackendError, match="out of memory"):
            executor.run(feeds())
        gc.collect()
        assert fake.cuda.left() == {}
        repeat(executor, 1)
        executor._idle.pop().close()
        executor._made = 0


def test_close_gives_back_all_and_may_be_called_again(fake: Fake, plan: Path) -> None:
    executor = load_engine(plan, SPEC, fake.library(), fake.cuda)
    repeat(executor, REPEATS + 1)
    assert fake.cuda.left() == {"device": 2, "host": 1, "streams": 1, "graphs": 1}
    executor.close()
    executor.close()
    assert fake.cuda.left() == {}
    with pytest.raises(BackendError, match="closed"):
        executor.run(feeds())


def test_a_call_that_fails_while_closing_keeps_no_other_from_being_made(fake: Fake, plan: Path) -> None:
    executor = load_engine(plan, SPEC, fake.library(), fake.cuda)
    repeat(executor, 1)
    fake.cuda.fail["free_host"] = 1
    with pytest.raises(BackendError, match="free_host"):
        executor.close()
    assert fake.cuda.left() == {"host": 1}
    fake.cuda.free_host(next(iter(fake.cuda._host)))


# ---- CUDA graphs


def test_a_shape_that_keeps_coming_is_launched_as_a_graph_and_others_are_not(
    executor: TensorRtExecutor, fake: Fake
) -> None:
    repeat(executor, REPEATS)
    assert (fake.cuda.calls.count("capture"), fake.cuda.calls.count("launch")) == (1, 0)
    copies = fake.cuda.calls.count("copy_to_device")
    repeat(executor, 5)
    assert fake.cuda.calls.count("launch") == 5
    assert fake.cuda.calls.count("copy_to_device") == copies  # the graph holds them
    executor.run(feeds(2, 9))
    repeat(executor, 1)
    assert fake.cuda.calls.count("launch") == 6


def test_a_context_that_a_graph_came_from_has_its_kernels_compiled_at_once_and_is_never_set_again(
    executor: TensorRtExecutor, fake: Fake
) -> None:
    for _ in range(REPEATS + 1):  # the fake raises a Fault for a launch after its context was changed
        repeat(executor, 1, 2, 8)
        repeat(executor, 1, 64, 512)
        repeat(executor, 1, 3, 8)
    assert fake.contexts.count("LAZY") == 1
    assert fake.contexts.count("EAGER") == 3


def test_the_graphs_of_a_lane_are_bounded_and_the_least_used_goes_first(executor: TensorRtExecutor, fake: Fake) -> None:
    executor.run(feeds(64, 512))  # memory grows no more
    for sequence in range(2, 2 + GRAPHS):
        repeat(executor, REPEATS, 1, sequence)
    repeat(executor, 1, 1, 2)
    assert fake.cuda.left()["graphs"] == GRAPHS
    repeat(executor, REPEATS, 1, 2 + GRAPHS)
    assert fake.cuda.left()["graphs"] == GRAPHS
    launched = fake.cuda.calls.count("launch")
    repeat(executor, 1, 1, 2)
    assert fake.cuda.calls.count("launch") == launched + 1
    repeat(executor, 1, 1, 3)
    assert fake.cuda.calls.count("launch") == launched + 1


@pytest.mark.parametrize("how", ["capturable", "refuse_capture", "contexts_left"])
def test_a_shape_that_cannot_have_a_graph_is_enqueued_each_time_and_that_is_told_once(
    fake: Fake, plan: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    setattr(fake, how, {"capturable": False, "refuse_capture": True, "contexts_left": 1}[how])
    with caplog.at_level(logging.WARNING), load_engine(plan, SPEC, fake.library(), fake.cuda) as executor:
        executor.run(feeds(64, 512))
        repeat(executor, REPEATS + 3)
        repeat(executor, REPEATS + 3, 3, 9)
    assert fake.cuda.calls.count("launch") == 0
    told = [r.message for r in caplog.records]
    assert len(told) == 1
    assert "embed: no CUDA graph for batch=2, sequence=8" in told[0]


# ---- several callers


class Gate:
    """Holds the engine's runs until open() is called, and counts how many there are at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self._lock = threading.Lock()
        self._open = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, given: Feeds) -> Feeds:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.entered.release()
        assert self._open.wait(20)
        with self._lock:
            self.inside -= 1
        return summing(given)

    def open(self) -> None:
        self._open.set()


def test_callers_at_once_get_their_own_results_from_at_most_four_lanes(executor: TensorRtExecutor, fake: Fake) -> None:
    gate = Gate()
    fake.compute = gate
    wrong: list[int] = []

    def work(index: int) -> None:
        for turn in range(REPEATS + 2):
            case = feeds(1 + index % 4, 4 + index, 100 * index + turn)
            if not same(executor.run(case), summing(case)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(LANES + 3)]
    for thread in threads:
        thread.start()
    for _ in range(LANES):
        assert gate.entered.acquire(timeout=20)
    assert not gate.entered.acquire(timeout=0.2)  # the fifth waits
    gate.open()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert gate.most == LANES
    assert fake.cuda.left()["streams"] == LANES


def test_one_caller_after_the_other_uses_one_lane(executor: TensorRtExecutor, fake: Fake) -> None:
    for seed in range(5):
        thread = threading.Thread(target=executor.run, args=(feeds(seed=seed),))
        thread.start()
        thread.join(20)
    assert fake.cuda.left()["streams"] == 1


def test_close_waits_for_the_run_under_way_and_refuses_the_next(executor: TensorRtExecutor, fake: Fake) -> None:
    gate = Gate()
    fake.compute = gate
    case, results = feeds(), []
    runner = threading.Thread(target=lambda: results.append(executor.run(case)))
    runner.start()
    assert gate.entered.acquire(timeout=20)
    closer = threading.Thread(target=executor.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    with pytest.raises(BackendError, match="closed"):
        executor.run(case)
    gate.open()
    closer.join(20)
    runner.join(20)
    assert same(results[0], summing(case))
    assert fake.cuda.left() == {}


def test_a_lane_that_failed_is_not_used_again_and_its_place_is_free(executor: TensorRtExecutor, fake: Fake) -> None:
    repeat(executor, 1)
    fake.cuda.fail["synchronize"] = 1
    with pytest.raises(BackendError, match="synchronize"):
        executor.run(feeds())
    assert fake.cuda.left() == {}
    for _ in range(LANES + 1):
        fake.cuda.fail["copy_to_device"] = 1
        with pytest.raises(BackendError):
            executor.run(feeds())
    repeat(executor, 1)


# ---- plans that don't fit


def test_a_plan_that_the_library_refuses_is_told_in_its_words_with_the_device(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "engine.plan").write_bytes(b"garbage")
    with pytest.raises(
        BackendUnavailable, match=r"fake_tensorrt 99.1 cannot load engine.plan on Fake H100 .*9\.0.*magicTag"
    ):
        load_engine(tmp_path / "engine.plan", SPEC, fake.library(), fake.cuda)
    with pytest.raises(BackendError, match="cannot be read") as caught:
        load_engine(tmp_path / "none.plan", SPEC, fake.library(), fake.cuda)
    assert "medcompile build --from" in caught.value.fix


def test_an_engine_that_is_not_the_graphs_is_refused_with_the_first_difference(fake: Fake, plan: Path) -> None:
    ids = SPEC.inputs[0].name
    other = dataclasses.replace(SPEC, inputs=SPEC.inputs[:2])
    narrow = dataclasses.replace(SPEC.profiles[1], axes=(Axis("batch", 1, 1, 4), Axis("sequence", 2, 16, 33)))
    cases: list[tuple[dict[str, Any], GraphSpec, str]] = [
        ({}, other, "it has .*token_type_ids, and the graph attention_mask, embedding, input_ids, logits"),
        ({"dtypes": {ids: DataType.INT32}}, SPEC, "input_ids is INT32, and the graph says int64"),
        ({"locations": {ids: TensorLocation.HOST}}, SPEC, "input_ids decides a shape"),
        ({"profiles": 3}, SPEC, "it has 3 profiles, and the graph 2"),
        ({}, dataclasses.replace(SPEC, profiles=(SPEC.profiles[0], narrow)), r"narrow takes .*\[4, 32\].*\[4, 33\]"),
    ]
    for changes, spec, words in cases:
        with pytest.raises(BackendError, match=f"not the engine of graph embed: .*{words}"):
            load_engine(plan, spec, dataclasses.replace(fake, **changes).library(), fake.cuda)


def test_the_real_library_refuses_garbage_in_its_own_words(tmp_path: Path) -> None:
    library = pytest.importorskip("tensorrt_rtx", reason='pip install "medcompile[rtx]"')
    (tmp_path / "engine.plan").write_bytes(b"garbage" * 40)
    with pytest.raises(BackendUnavailable, match=r"tensorrt_rtx .* cannot load engine\.plan .*magicTag"):
        load_engine(tmp_path / "engine.plan", SPEC, library, FakeCuda())


def test_the_real_library_has_every_name_that_the_fake_has() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason='pip install "medcompile[rtx]"')
    faces = {
        library.Runtime: ["deserialize_cuda_engine"],
        library.ICudaEngine: [*public(fake_tensorrt.Engine), "create_runtime_config"],
        library.IExecutionContext: public(fake_tensorrt.Context),
        library.IRuntimeConfig: public(fake_tensorrt.Configuration),
        library.DynamicShapesKernelSpecializationStrategy: ["EAGER"],
        library.ExecutionContextAllocationStrategy: ["USER_MANAGED"],
        library.TensorLocation: ["DEVICE"],
        library.ILogger: ["ERROR", "INTERNAL_ERROR"],
        library.DataType: list(_tensorrt_executor._DTYPES),
    }
    fields = ("num_io_tensors", "num_optimization_profiles", "device_memory_size_v2")
    faces[library.ICudaEngine] += fields
    faces[library.IRuntimeConfig] += ["dynamic_shapes_kernel_specialization_strategy"]
    assert [
        f"{face.__name__}.{name}" for face, names in faces.items() for name in names if not hasattr(face, name)
    ] == []


def public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def test_the_executor_imports_no_torch_and_cuda_only_when_it_is_loaded() -> None:
    for module in (_cuda, _tensorrt_executor, _tensorrt_lane):
        tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert "torch" not in names
    code = "import sys, medcompile.backends._tensorrt_executor; print('cuda' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---- the fake itself must see what it is for


def test_the_fake_sees_a_graph_whose_context_changed_and_a_workspace_of_two_streams(fake: Fake, plan: Path) -> None:
    library: ModuleType = fake.library()
    cuda = fake.cuda
    engine = _tensorrt_executor.Engine(plan, SPEC, library, cuda)
    workspace, memory, streams = cuda.malloc(1 << 20), cuda.malloc(1 << 16), [cuda.create_stream() for _ in range(2)]
    context = engine.context(workspace, of_one_shape=True)
    context.set_optimization_profile_async(0, streams[0])
    for index, name in enumerate((*NAMES, "embedding", "logits")):
        context.set_tensor_address(name, memory + 1024 * index)
    for name in NAMES:
        context.set_input_shape(name, (1, 2))
    with pytest.raises(Fault, match="not enqueued before"):
        cuda.capture(streams[0], lambda: context.execute_async_v3(streams[0]) and None)
    context.execute_async_v3(streams[0])
    with pytest.raises(Fault, match="two streams use"):
        context.execute_async_v3(streams[1])
    cuda.synchronize(streams[0])
    graph = cuda.capture(streams[0], lambda: context.execute_async_v3(streams[0]) and None)
    context.set_input_shape(NAMES[0], (1, 3))
    cuda.launch(graph, streams[0])
    with pytest.raises(Fault, match="changed or let go"):
        cuda.synchronize(streams[0])
    cuda.destroy_graph(graph)
    for address in (workspace, memory):
        cuda.free(address)
    for stream in streams:
        cuda.destroy_stream(stream)
