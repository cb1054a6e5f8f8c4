from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from medcompile.serve import gpu
from medcompile.serve.metrics import EngineState, Metrics, names

PLANTED = "Quokkaville-74218"


def series(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One value of /metrics, read back from its text."""
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return None


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics(routes=["/v1/embeddings", "/v1/models/{model}"])
    made.serves("biobert", "sha256:aa", "int8", "onnxruntime-cpu")
    return made


def test_requests_are_counted_by_method_route_and_status_and_timed_by_route(metrics: Metrics) -> None:
    for status in (200, 200, 429):
        metrics.began()
        metrics.request("POST", "/v1/embeddings", status, 0.004)
    labels = {"method": "POST", "route": "/v1/embeddings"}
    assert series(metrics, "medcompile_requests_total", status="200", **labels) == 2
    assert series(metrics, "medcompile_requests_total", status="429", **labels) == 1
    assert series(metrics, "medcompile_request_seconds_count", route="/v1/embeddings") == 3
    assert series(metrics, "medcompile_request_seconds_bucket", route="/v1/embeddings", le="0.005") == 3
    assert series(metrics, "medcompile_requests_in_progress") == 0


def test_nothing_that_a_client_made_up_becomes_a_label(metrics: Metrics) -> None:
    metrics.began()
    metrics.request(PLANTED, f"/v1/models/{PLANTED}", 404, 0.1)
    metrics.queued(PLANTED, PLANTED, 0.1)
    metrics.refused(PLANTED)
    metrics.tokens(PLANTED, 3, 4)
    metrics.engine(PLANTED, EngineState(waiting=1, steps=2))
    assert PLANTED not in metrics.text().decode()
    assert series(metrics, "medcompile_requests_total", method="other", route="other", status="404") == 1
    assert series(metrics, "medcompile_queue_seconds_count", model="other", priority="other") == 1
    assert series(metrics, "medcompile_prompt_tokens_total", model="other") == 3


def test_what_a_worker_counted_goes_on_growing_after_it_was_started_anew(metrics: Metrics) -> None:
    first = EngineState(preemptions=5, steps=100, cached_tokens=40, kv_blocks=64, kv_blocks_used=16)
    for state in (first, EngineState(preemptions=6, steps=150, cached_tokens=40), EngineState(steps=10)):
        metrics.engine("biobert", state)
    assert series(metrics, "medcompile_steps_total", model="biobert") == 160
    assert series(metrics, "medcompile_preemptions_total", model="biobert") == 6
    assert series(metrics, "medcompile_prefix_cached_tokens_total", model="biobert") == 40
    assert series(metrics, "medcompile_kv_blocks_used", model="biobert") == 0


def test_a_new_worker_that_overtook_its_forerunner_in_one_sum_is_known_by_another(metrics: Metrics) -> None:
    metrics.engine("biobert", EngineState(steps=100, computed_tokens=1000))
    metrics.engine("biobert", EngineState(steps=20, computed_tokens=2000))
    assert series(metrics, "medcompile_steps_total", model="biobert") == 120
    assert series(metrics, "medcompile_computed_tokens_total", model="biobert") == 3000


def test_a_model_is_down_until_its_worker_says_otherwise(metrics: Metrics) -> None:
    assert series(metrics, "medcompile_worker_up", model="biobert") == 0
    metrics.worker("biobert", True)
    assert series(metrics, "medcompile_worker_up", model="biobert") == 1
    info = {"model": "biobert", "digest": "sha256:aa", "variant": "int8", "target": "onnxruntime-cpu"}
    assert series(metrics, "medcompile_bundle_info", **info) == 1


def test_two_servers_in_one_process_share_no_figures(metrics: Metrics) -> None:
    metrics.refused("queue_full")
    assert series(metrics, "medcompile_refused_total", reason="queue_full") == 1
    assert series(Metrics(), "medcompile_refused_total", reason="queue_full") is None


def test_no_count_is_lost_between_threads(metrics: Metrics) -> None:
    def work() -> None:
        for _ in range(1000):
            metrics.began()
            metrics.request("POST", "/v1/embeddings", 200, 0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    labels = {"method": "POST", "route": "/v1/embeddings", "status": "200"}
    assert series(metrics, "medcompile_requests_total", **labels) == 4000


def test_the_process_tells_its_own_memory_and_files(metrics: Metrics) -> None:
    assert (series(metrics, "process_resident_memory_bytes") or 0) > 1e6
    assert (series(metrics, "process_open_fds") or 0) > 0


def test_names_lists_every_series_of_the_text(metrics: Metrics) -> None:
    metrics.began()
    metrics.request("POST", "/v1/embeddings", 200, 0.004)
    metrics.queued("biobert", "routine", 0.1)
    metrics.batch("biobert", 4)
    metrics.first_token("biobert", 0.1)
    metrics.output_token("biobert", 0.01)
    told = {s.name for family in text_string_to_metric_families(metrics.text().decode()) for s in family.samples}
    assert {name for name in told if not name.endswith("_created")} <= set(names(metrics))


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two GPUs; the second is a slice without a load of its own. lost: the driver goes away."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.lost = False
        self.asked = 0

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.asked += 1
        if self.lost:
            raise NVMLError
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=(device + 1) * 2**30, total=80 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, device: int) -> Any:  # noqa: N802
        if device == 1:
            raise NVMLError
        return SimpleNamespace(gpu=75, memory=10)


def values(collector: gpu.GpuCollector) -> dict[tuple[str, str], float]:
    return {(s.name, s.labels["gpu"]): s.value for family in collector.collect() for s in family.samples}


def test_gpus_tell_memory_and_load_where_there_are_any() -> None:
    found = values(gpu.GpuCollector(FakeNvml()))  # type: ignore[arg-type]
    assert found["medcompile_gpu_memory_used_bytes", "1"] == 2 * 2**30
    assert found["medcompile_gpu_memory_bytes", "0"] == 80 * 2**30
    assert found["medcompile_gpu_utilization_ratio", "0"] == 0.75
    assert found["medcompile_gpu_utilization_ratio", "1"] != found["medcompile_gpu_utilization_ratio", "1"]  # NaN


def test_gpus_are_asked_once_a_second_at_most_and_a_lost_driver_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    nvml = FakeNvml()
    collector = gpu.GpuCollector(nvml)  # type: ignore[arg-type]
    values(collector)
    values(collector)
    assert nvml.asked == 1
    nvml.lost, now[0] = True, 102.0
    assert values(collector) == {}
