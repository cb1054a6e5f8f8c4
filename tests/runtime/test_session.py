from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import medcompile
from medcompile import backends
from medcompile.errors import BackendUnavailable, BundleError, InputError, OverBudgetError, UsageError
from medcompile.spec import Artifact, GraphSpec, Precision, Target, Variant, Verdict
from tests.bundles import CPU, artifact, contents, write
from tests.runtime.fakes import FakeExecutor

OTHER = Target("other-cpu", "other", "cpu", "x86_64", "linux", "2.0")
GOOD, BAD, UNSURE = Verdict.NON_INFERIOR, Verdict.INFERIOR, Verdict.INCONCLUSIVE


class FakeBackend:
    """Loads FakeExecutors; here is what probe() answers, an exception to raise or this machine as a target."""

    def __init__(self, name: str, here: Target | BackendUnavailable) -> None:
        self.name = name
        self.here = here
        self.probed = 0
        self.loaded: list[tuple[str, str, int | None]] = []
        self.executors: list[FakeExecutor] = []

    def probe(self, target: str) -> Target:
        self.probed += 1
        if isinstance(self.here, BackendUnavailable):
            raise self.here
        return self.here

    def load(self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None) -> FakeExecutor:
        assert path.is_file()
        assert target in (CPU, OTHER)
        self.loaded.append((spec.name, variant.name, threads))
        self.executors.append(FakeExecutor(spec))
        return self.executors[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeBackend]:
    there = {"fake": FakeBackend("fake", CPU), "other": FakeBackend("other", OTHER)}
    monkeypatch.setattr(backends, "get", there.__getitem__)
    return there


def chosen(place: Path, *artifacts: Artifact, **wishes: str) -> tuple[str, str]:
    """Variant and target that load() picks from a bundle of these artifacts."""
    write(place, contents(artifacts))
    with medcompile.load(place, **wishes) as session:  # type: ignore[arg-type]
        return session.variant.name, session.target.name


def test_auto_takes_the_fastest_non_inferior_artifact(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    every = [
        artifact("fp32", None, 9.0),
        artifact("int8", GOOD, 3.0),
        artifact("int8-fast", UNSURE, 2.0),
        artifact("int8-faster", BAD, 1.0),
        artifact("int8-unjudged", None, 0.5),
        artifact("int8", GOOD, 2.5, target=OTHER),
    ]
    assert chosen(tmp_path / "b", *every) == ("int8", "other-cpu")
    assert chosen(tmp_path / "b", *every, backend="fake") == ("int8", "fake-cpu")
    assert chosen(tmp_path / "b", *every, backend="fake-cpu", variant="fp32") == ("fp32", "fake-cpu")
    assert chosen(tmp_path / "b", *every[:1], *every[2:5]) == ("fp32", "fake-cpu")


def test_auto_takes_the_smallest_where_nothing_was_timed(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    # a fake artifact's size grows with the length of its variant's name
    assert chosen(tmp_path / "b", artifact("int8-large", GOOD), artifact("int8", GOOD)) == ("int8", "fake-cpu")
    assert chosen(tmp_path / "b", artifact("int8-large", GOOD, 5.0), artifact("int8", GOOD))[0] == "int8-large"


def test_latencies_from_another_kind_of_machine_do_not_count(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    every = [artifact("int8-large", GOOD, 1.0), artifact("int8", GOOD, 2.0)]
    assert chosen(tmp_path / "b", *every)[0] == "int8-large"
    fake["fake"].here = replace(CPU, arch="arm64")
    assert chosen(tmp_path / "b", *every)[0] == "int8"


def test_fp32_is_picked_unasked_unless_it_was_found_inferior(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    for verdict in (None, UNSURE, GOOD):
        assert chosen(tmp_path / "b", artifact("fp32", verdict)) == ("fp32", "fake-cpu")
    with pytest.raises(OverBudgetError, match="no variant is shown to be non-inferior"):
        chosen(tmp_path / "b", artifact("fp32", BAD))


@pytest.mark.parametrize(
    "variant",
    [Variant("v", float_dtype=Precision.FLOAT16), Variant("v", compute={"float": "bfloat16"})],
)
def test_a_variant_in_another_float_format_needs_evidence(
    tmp_path: Path, fake: dict[str, FakeBackend], variant: Variant
) -> None:
    write(tmp_path / "b", replace(contents([artifact("v")]), variants={"v": variant}))
    with pytest.raises(OverBudgetError):
        medcompile.load(tmp_path / "b")
    write(tmp_path / "b", replace(contents([artifact("v", GOOD)]), variants={"v": variant}))
    medcompile.load(tmp_path / "b").close()


def test_a_variant_without_good_evidence_runs_when_named_with_a_warning(
    tmp_path: Path, fake: dict[str, FakeBackend], caplog: pytest.LogCaptureFixture
) -> None:
    every = [artifact("fp32"), artifact("int8", BAD, 1.0), artifact("int8", UNSURE, 2.0, target=OTHER)]
    with caplog.at_level(logging.WARNING, "medcompile"):
        assert chosen(tmp_path / "b", *every, variant="fp32") == ("fp32", "fake-cpu")
        assert not caplog.records
        assert chosen(tmp_path / "b", *every, variant="int8") == ("int8", "fake-cpu")
    assert "int8 on fake-cpu is not shown to be non-inferior (embed: inferior)" in caplog.text


def test_a_named_variant_runs_on_the_target_where_it_is_non_inferior(
    tmp_path: Path, fake: dict[str, FakeBackend]
) -> None:
    every = [artifact("int8", BAD, 1.0), artifact("int8", GOOD, 2.0, target=OTHER)]
    assert chosen(tmp_path / "b", *every, variant="int8") == ("int8", "other-cpu")


def test_a_missing_library_is_passed_over(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    fake["other"].here = BackendUnavailable("other is not installed", fix='pip install "medcompile[other]"')
    every = [artifact("int8", GOOD, 1.0, target=OTHER), artifact("fp32", None, 9.0)]
    assert chosen(tmp_path / "b", *every) == ("fp32", "fake-cpu")
    with pytest.raises(BackendUnavailable, match=r"medcompile\[other\]"):
        chosen(tmp_path / "b", *every, backend="other")


def test_an_engine_that_does_not_fit_the_device_here_is_passed_over(
    tmp_path: Path, fake: dict[str, FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> FakeExecutor:
        raise BackendUnavailable("built for another GPU", fix="rebuild it here")

    fake["other"].here = replace(OTHER, device="cuda")
    monkeypatch.setattr(fake["other"], "load", refuse)
    every = [artifact("int8", GOOD, 1.0, target=replace(OTHER, device="cuda")), artifact("fp32", None, 9.0)]
    assert chosen(tmp_path / "b", *every) == ("fp32", "fake-cpu")
    with pytest.raises(BackendUnavailable, match="int8 for other-cpu: built for another GPU\n  fix: rebuild it here"):
        chosen(tmp_path / "b", *every, backend="other")


def test_with_no_library_at_all_the_error_lists_every_fix(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    for name, backend in fake.items():
        backend.here = BackendUnavailable(f"{name} is not installed", fix=f'pip install "medcompile[{name}]"')
    with pytest.raises(BackendUnavailable) as caught:
        chosen(tmp_path / "b", artifact("fp32"), artifact("int8", GOOD), artifact("int8", GOOD, target=OTHER))
    for part in ("fake-cpu: fake is not installed", "medcompile[fake]", "other-cpu: other is", "medcompile[other]"):
        assert part in str(caught.value)
    assert fake["fake"].probed == 1


def test_only_the_chosen_backend_is_asked(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    chosen(tmp_path / "b", artifact("fp32", None, 1.0), artifact("fp32", None, 2.0, target=OTHER))
    assert (fake["fake"].probed, fake["other"].probed) == (1, 0)


def test_the_backend_that_answers_zeros_is_never_picked_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    null = FakeBackend("null", CPU)
    monkeypatch.setattr(backends, "get", {"null": null}.__getitem__)
    only = artifact("fp32", target=Target("null", "null", "none"))
    write(tmp_path / "b", contents([only]))
    with pytest.raises(UsageError, match="it has: fp32 on null"):
        medcompile.load(tmp_path / "b")
    assert medcompile.load(tmp_path / "b", backend="null").target.name == "null"


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"variant": "int4"}, "sample has no variant 'int4'; it has fp32, int8"),
        ({"backend": "tensorrt"}, "has nothing for backend='tensorrt'.*int8 on fake-cpu"),
        ({"backend": "fake", "variant": "fp32"}, "it has: fp32 on other-cpu, int8 on fake-cpu"),
    ],
)
def test_a_wish_the_bundle_cannot_grant_is_a_usage_error(
    tmp_path: Path, fake: dict[str, FakeBackend], wishes: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(tmp_path / "b", artifact("fp32", target=OTHER), artifact("int8", GOOD), **wishes)


def test_threads_below_one_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="threads=0"):
        medcompile.load(tmp_path / "nothing", threads=0)


def two_tasks(place: Path) -> Path:
    tasks = ("embed", "token-classification")
    write(place, contents([artifact("fp32", graph=t) for t in tasks], tasks))
    return place


def test_each_tasks_artifact_is_loaded_once_and_only_when_used(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    session = medcompile.load(two_tasks(tmp_path / "b"), threads=3)
    assert fake["fake"].loaded == []
    session.embed("pain")
    session.embed("pain")
    assert fake["fake"].loaded == [("embed", "fp32", 3)]
    session.extract("pain")
    assert [task for task, _, _ in fake["fake"].loaded] == ["embed", "token-classification"]
    session.close()
    session.close()
    assert all(e.is_closed for e in fake["fake"].executors)
    with pytest.raises(UsageError, match="closed"):
        session.embed("pain")


def test_a_pair_of_variant_and_target_without_every_graph_is_no_choice(
    tmp_path: Path, fake: dict[str, FakeBackend]
) -> None:
    tasks = ("embed", "token-classification")
    every = [artifact("int8", GOOD, 1.0), *(artifact("fp32", graph=t) for t in tasks)]
    write(tmp_path / "b", contents(every, tasks))
    assert medcompile.load(tmp_path / "b").variant.name == "fp32"


def test_a_variant_is_eligible_only_if_every_one_of_its_graphs_is(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    tasks = ("embed", "token-classification")
    for second in (None, UNSURE, BAD):
        every = [artifact("int8", GOOD, graph=tasks[0]), artifact("int8", second, graph=tasks[1])]
        write(tmp_path / "b", contents(every, tasks))
        with pytest.raises(OverBudgetError):
            medcompile.load(tmp_path / "b")


def test_a_session_knows_its_bundle(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    written = write(tmp_path / "b", contents())
    with medcompile.load(tmp_path / "b") as session:
        assert session.bundle == written
        assert session.target == CPU


def test_only_what_is_opened_is_hashed_and_an_altered_file_never_loads(
    tmp_path: Path, fake: dict[str, FakeBackend]
) -> None:
    place = tmp_path / "b"
    bundle = write(place, contents([artifact("fp32"), artifact("int8", GOOD)]))
    (place / "graphs/fp32/embed.onnx").write_bytes(b"WEIGHTS")
    with medcompile.load(place, variant="fp32") as session:
        session.embed("pain")
        (place / "artifacts/fake-cpu/int8/embed/model.bin").write_bytes(b"x" * 28)
    with medcompile.load(place, variant="int8") as session, pytest.raises(BundleError, match="differ"):
        session.embed("pain")
    path = place / "assets/labels.json"
    path.write_bytes(b" " * bundle.files["assets/labels.json"].size)
    with pytest.raises(BundleError, match=r"assets/labels\.json differ"):
        medcompile.load(place)


def test_eight_threads_get_the_answers_of_one(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    texts = [" ".join(["kidney", "no", "metformin", "pain"][i % 4 :] * (i % 30)) for i in range(64)]
    session = medcompile.load(two_tasks(tmp_path / "b"))
    barrier = threading.Barrier(8)

    def ask(_: int) -> tuple[list[bytes], list[object]]:
        barrier.wait()
        return [session.embed(t)[0].tobytes() for t in texts], [session.extract(t) for t in texts]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    with medcompile.load(tmp_path / "b") as alone:
        expected = [alone.embed(t)[0].tobytes() for t in texts], [alone.extract(t) for t in texts]
    assert all(a == expected for a in answers)
    assert len(fake["fake"].loaded) == 2 + 2
    assert len(fake["fake"].executors[0].threads) == 8


def test_a_session_answers_as_its_encoder_does(tmp_path: Path, fake: dict[str, FakeBackend]) -> None:
    tasks = ("embed", "token-classification", "sequence-classification", "fill-mask")
    write(tmp_path / "b", contents([artifact("fp32", graph=t) for t in tasks], tasks))
    with medcompile.load(tmp_path / "b") as session:
        np.testing.assert_array_equal(session.embed(["pain"]), session.encoder.embed(["pain"]))
        assert session.extract("kidney injury") == session.encoder.extract("kidney injury")
        assert session.classify("pain", "fever") == session.encoder.classify("pain", "fever")
        assert len(session.fill_mask("no [MASK]", 2)[0]) == 2
        with pytest.raises(InputError):
            session.fill_mask("no")
