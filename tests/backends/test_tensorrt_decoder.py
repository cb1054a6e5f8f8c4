"""A decoder on a TensorRT engine, over the fakes of CUDA and of the library: its pools, its profiles, its failures."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile import backends
from medcompile.backends import _cuda, _tensorrt_decoder, tensorrt
from medcompile.backends._tensorrt_decoder import TensorRtStepModel, load_step_model
from medcompile.backends._tensorrt_lane import REPEATS
from medcompile.errors import BackendError, BackendUnavailable, ProfileError
from medcompile.kernels import tensorrt_plugin
from medcompile.runtime.decoder import StepBatch
from medcompile.spec import Target, TensorSpec, Variant
from tests import decoders
from tests.backends.fake_cuda import LIVING, FakeCuda
from tests.backends.fake_tensorrt import PLAN, DataType, Fake, TensorLocation
from tests.backends.small_decoder import (
    BLOCK_SIZE,
    INTEGERS,
    POOL,
    POOL_BLOCK_BYTES,
    POOLS,
    SPEC,
    VOCABULARY,
    alone,
    batch,
    decode,
)


@pytest.fixture
def fake() -> Iterator[Fake]:
    """An engine to load. Whatever a test does, after its models are closed nothing may be left."""
    cuda = FakeCuda()
    yield Fake(cuda, SPEC, decode)
    gc.collect()
    assert cuda.left() == {}
    assert not list(LIVING)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "engine.plan"
    path.write_bytes(PLAN)
    return path


def load(fake: Fake, plan: Path, blocks: int = 24, profiles: tuple[str, ...] = ("prefill", "decode")) -> Any:
    return load_step_model(plan, fake.library(), blocks=blocks, profiles=profiles, cuda=fake.cuda)


@pytest.fixture
def model(fake: Fake, plan: Path) -> Iterator[TensorRtStepModel]:
    loaded = load(fake, plan)
    yield loaded
    loaded.close()


# ---- steps


@pytest.mark.parametrize("listed", [False, True], ids=["pools are inputs", "pools are outputs too"])
def test_ragged_chunks_give_every_token_the_logits_of_its_whole_sequence(fake: Fake, plan: Path, listed: bool) -> None:
    if listed:
        fake.aliases = {f"{name}/updated": name for name in POOLS}
        outputs = (*SPEC.outputs, *(TensorSpec(name, "float16", POOL) for name in fake.aliases))
        fake.spec = dataclasses.replace(SPEC, outputs=outputs)
    model = load(fake, plan)
    assert (model.blocks, model.block_size, model.vocabulary) == (24, BLOCK_SIZE, VOCABULARY)
    texts = [np.random.default_rng(n).integers(0, VOCABULARY, n) for n in (1, 60, 33, 12)]
    for ids, logits in zip(texts, decoders.chunked_logits(model, texts), strict=True):
        whole = batch([0], [len(ids)], rows=list(range(len(ids))))
        np.testing.assert_allclose(logits, alone(dataclasses.replace(whole, input_ids=ids)), rtol=1e-4, atol=1e-4)
    model.close()


def test_pools_begin_as_zeros_and_stay_on_the_device(fake: Fake, model: TensorRtStepModel) -> None:
    seen: list[bool] = []
    fake.compute = lambda given: (seen.append(any(given[name].any() for name in POOLS)), decode(given))[1]
    for _ in range(2):
        model.step(batch([0], [5]))
    assert seen == [False, True]
    assert model.pool_bytes == len(POOLS) * 24 * POOL_BLOCK_BYTES
    assert fake.cuda.calls.count("zero") == len(POOLS)
    assert fake.cuda.calls.count("copy_to_device") == fake.cuda.calls.count("copy_to_host") == 2
    assert "copy_on_device" not in fake.cuda.calls


def test_a_step_that_wants_no_logits_writes_the_pools_and_gives_none(model: TensorRtStepModel) -> None:
    assert model.step(batch([0], [20], rows=[])).shape == (0, VOCABULARY)
    pools = {name: np.zeros((24, *POOL[1:]), np.float16) for name in POOLS}
    alone(batch([0], [20]), pools)
    np.testing.assert_allclose(model.step(batch([20], [1])), alone(batch([20], [1]), pools), rtol=1e-4, atol=1e-4)


def test_logits_outlive_the_next_step(model: TensorRtStepModel) -> None:
    first = model.step(batch([0], [5]))
    kept = first.copy()
    model.step(batch([0], [7]))
    np.testing.assert_array_equal(first, kept)


def test_a_copied_block_serves_the_next_step_without_a_wait_between(fake: Fake, model: TensorRtStepModel) -> None:
    model.step(batch([0], [20]))
    wanted = model.step(batch([20], [1]))
    waits = fake.cuda.calls.count("synchronize")
    model.copy_blocks([(0, 7), (1, 8)])
    assert fake.cuda.calls.count("synchronize") == waits
    np.testing.assert_array_equal(model.step(batch([20], [1], first_block=7)), wanted)
    assert np.abs(model.step(batch([20], [1], first_block=10)) - wanted).max() > 1e-3  # else nothing was told


def test_copies_that_no_step_follows_are_waited_for_when_it_is_closed(fake: Fake, model: TensorRtStepModel) -> None:
    model.copy_blocks([(0, 1)])
    model.close()  # the fake raises a Fault for memory that is freed under work on a stream
    assert fake.cuda.left() == {}


# ---- profiles


def test_decode_is_taken_where_the_step_fits_it_and_prefill_elsewhere(fake: Fake, model: TensorRtStepModel) -> None:
    for past, new in [([0], [40]), ([40, 0], [1, 16]), ([41], [1]), ([3, 4, 5, 6], [4, 4, 4, 4]), ([0], [17])]:
        model.step(batch(past, new))
    assert fake.profiles_set == [0, 1, 0]  # the order of SPEC's profiles


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (batch([0], [65]), "tokens=65 is above profile prefill's max 64"),
        (batch([9] * 5, [1] * 5), "sequences=5 is above profile decode's max 4"),
        (batch([140], [1]), "table=9 is above profile prefill's max 8"),
    ],
)
def test_a_batch_outside_every_profile_names_the_axis_and_harms_nothing(
    model: TensorRtStepModel, step: StepBatch, words: str
) -> None:
    with pytest.raises(ProfileError, match=words):
        model.step(step)
    np.testing.assert_allclose(model.step(batch([0], [5])), alone(batch([0], [5])), rtol=1e-4, atol=1e-4)


def test_a_shape_that_keeps_coming_is_set_once_and_never_captured(fake: Fake, model: TensorRtStepModel) -> None:
    """A context of its own for each width of the table would have its kernels compiled anew every few tokens."""
    for past in range(REPEATS + 3):
        model.step(batch([past], [1]))
    assert (fake.cuda.calls.count("capture"), fake.cuda.calls.count("launch")) == (0, 0)
    assert fake.contexts == ["LAZY"]
    assert fake.profiles_set == [1]


def test_pools_hold_no_more_blocks_than_the_profiles(fake: Fake, plan: Path) -> None:
    for asked, given in ((5, 5), (24, 24), (400, 24)):
        model = load(fake, plan, blocks=asked)
        assert model.blocks == given
        model.step(batch([0], [5]))
        model.close()


# ---- memory and failures


def test_memory_grows_by_doubling_up_to_what_the_largest_step_takes(fake: Fake, plan: Path) -> None:
    wide = dataclasses.replace(SPEC, outputs=(TensorSpec("logits", "float32", ("rows", 40_000)),))
    fake.spec = wide
    fake.compute = lambda given: {"logits": np.repeat(decode(given)["logits"], 1000, axis=1)}
    model = load(fake, plan)
    before = sum(a.size for a in fake.cuda._memory.values())
    for tokens in range(1, 65):
        model.step(batch([0], [tokens], rows=list(range(tokens))))
    largest = 64 * 40_000 * 4
    grown = sum(a.size for a in fake.cuda._memory.values()) - before
    assert largest < grown < largest + 8192
    assert fake.cuda.calls.count("malloc_host") <= np.log2(64) + 2
    assert fake.cuda.calls.count("malloc") == len(POOLS) + 1 + fake.cuda.calls.count("malloc_host")
    model.close()


@pytest.mark.parametrize(("call", "times"), [("malloc", 1), ("malloc", 3), ("malloc", 5), ("create_stream", 1)])
def test_a_failure_while_loading_leaves_nothing(fake: Fake, plan: Path, call: str, times: int) -> None:
    def fail_at_last(name: str, **how: Any) -> None:
        if name == call and fake.cuda.calls.count(call) == times - 1:
            fake.cuda.fail[call] = 1
        FakeCuda._called(fake.cuda, name, **how)

    fake.cuda._called = fail_at_last  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=call):
        load(fake, plan)
    assert fake.cuda.calls.count(call) == times
    gc.collect()
    assert fake.cuda.left() == {}


@pytest.mark.parametrize("how", ["context", "zero"])
def test_an_engine_without_a_context_or_a_device_that_fails_leaves_nothing(fake: Fake, plan: Path, how: str) -> None:
    if how == "context":
        fake.contexts_left = 0
    else:
        fake.cuda.fail["zero"] = 1
    with pytest.raises(BackendError):
        load(fake, plan)
    gc.collect()
    assert fake.cuda.left() == {}


@pytest.mark.parametrize("call", ["copy_to_device", "copy_to_host", "synchronize", "malloc_host", "copy_on_device"])
def test_a_model_that_failed_gives_all_back_and_runs_no_more(fake: Fake, model: TensorRtStepModel, call: str) -> None:
    fake.cuda.fail[call] = 1
    with pytest.raises(BackendError, match=call):
        model.copy_blocks([(0, 1)])
        model.step(batch([0], [5]))
    assert fake.cuda.left() == {}
    with pytest.raises(BackendError, match="closed") as caught:
        model.step(batch([0], [5]))
    assert caught.value.fix == "load the bundle again"


def test_close_gives_back_all_and_may_be_called_again(fake: Fake, model: TensorRtStepModel) -> None:
    model.step(batch([0], [5]))
    model.close()
    model.close()
    assert fake.cuda.left() == {}
    with pytest.raises(BackendError, match="closed"):
        model.copy_blocks([(0, 1)])


# ---- plans that don't fit


def test_an_engine_of_another_kind_is_refused(fake: Fake, plan: Path) -> None:
    spare = TensorSpec("attention_mask", "int64", ("tokens",))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"spec": dataclasses.replace(SPEC, inputs=(*SPEC.inputs, spare))}, "it has attention_mask, block_table"),
        ({"spec": dataclasses.replace(SPEC, inputs=INTEGERS)}, "it has block_table"),
        ({"profiles": 3}, "and 3 profiles"),
        ({"dtypes": {"past_lens": DataType.INT64}}, "past_lens is INT64, and the graph says int32"),
        ({"dtypes": {"v_pool.1": DataType.INT64}}, "v_pool.1 is INT64"),
        ({"locations": {"block_table": TensorLocation.HOST}}, "block_table decides a shape"),
    ]
    for changes, words in cases:
        with pytest.raises(BackendError, match=f"not the engine of graph generate: .*{words}"):
            load(dataclasses.replace(fake, **changes), plan)


def test_pools_of_bfloat16_take_two_bytes_a_number(fake: Fake, plan: Path) -> None:
    fake.dtypes = dict.fromkeys(POOLS, DataType.BF16)
    model = load(fake, plan)
    assert model.pool_bytes == len(POOLS) * 24 * POOL_BLOCK_BYTES
    model.close()


def test_a_plan_without_its_table_of_layers_is_not_loaded(plan: Path) -> None:
    with pytest.raises(BackendError, match=r"no layers\.json beside it"):
        tensorrt.BACKEND.load_decoder(plan, Variant("fp16"), None, 8)


def test_the_backend_loads_what_the_table_of_layers_says_once_it_knows_the_plugin(
    fake: Fake, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, known = fake.library(), list[Any]()
    monkeypatch.setattr(tensorrt, "_module", lambda asked: library)
    monkeypatch.setattr(_cuda, "open_cuda", lambda: fake.cuda)
    monkeypatch.setattr(_tensorrt_decoder, "open_cuda", lambda: fake.cuda)
    monkeypatch.setattr(tensorrt_plugin, "register", known.append)
    target = Target("tensorrt-rtx", "tensorrt", "cuda", "sm_80+", tensorrt._system(), "99.1")
    table = {"target": dataclasses.asdict(target), "profiles": ["prefill", "decode"]}
    table["plan"] = {"size_bytes": len(PLAN)}
    plan.with_name("layers.json").write_text(json.dumps(table))
    model = backends.load_decoder(tensorrt.BACKEND, plan, Variant("fp16"), None, 8)
    assert known == [library]
    assert (type(model), model.blocks) == (TensorRtStepModel, 8)
    np.testing.assert_allclose(model.step(batch([0], [5])), alone(batch([0], [5])), rtol=1e-4, atol=1e-4)
    model.close()


def test_a_plan_of_another_version_is_refused_before_it_is_read(plan: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason='pip install "medcompile[rtx]"')
    here = tensorrt.BACKEND.probe("tensorrt-rtx")
    old = dataclasses.asdict(dataclasses.replace(here, version="0.1"))
    table = {"target": old | {"arch": "sm_80+"}, "profiles": ["decode", "prefill"]}
    plan.with_name("layers.json").write_text(json.dumps(table))
    with pytest.raises(BackendUnavailable, match=r"built by TensorRT-RTX 0\.1"):
        tensorrt.BACKEND.load_decoder(plan, Variant("fp16"), None, 8)
