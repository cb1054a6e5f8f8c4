from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medcompile import manifest
from medcompile.bundle import MANIFEST, Contents, Writer, read
from medcompile.errors import BundleError, UsageError
from medcompile.spec import Verdict
from tests.bundles import artifact, contents, write


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write(tmp_path / "sample", contents([artifact("fp32"), artifact("int8", Verdict.NON_INFERIOR, 1.25)]))
    return tmp_path / "sample"


def test_what_was_written_is_read_back_without_loss(tmp_path: Path) -> None:
    what = contents([artifact("fp32"), artifact("int8", Verdict.INCONCLUSIVE, 1.1)])
    written = write(tmp_path / "sample", what)
    loaded = read(tmp_path / "sample")
    assert loaded == written
    assert loaded.root == tmp_path / "sample"
    for field in dataclasses.fields(Contents):
        if field.name != "artifacts":
            assert getattr(loaded, field.name) == getattr(what, field.name)
    for before, after in zip(what.artifacts, loaded.artifacts, strict=True):
        file = loaded.files[after.path]
        assert after == dataclasses.replace(before, sha256=file.sha256, size_bytes=file.size)
    assert MANIFEST not in loaded.files


def test_two_builds_of_the_same_content_are_byte_identical(tmp_path: Path) -> None:
    digests = {write(tmp_path / name, contents()).digest for name in ("a", "b")}
    assert len(digests) == 1
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def test_a_folder_reached_through_a_link_or_moved_elsewhere_still_loads(place: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    assert read(tmp_path / "link").name == "sample"
    place.rename(tmp_path / "moved")
    assert read(tmp_path / "moved").name == "sample"


def test_no_byte_of_the_manifest_can_be_flipped_unnoticed(place: Path) -> None:
    raw = (place / MANIFEST).read_bytes()
    rng = random.Random(0)
    for at in range(len(raw)):
        altered = bytearray(raw)
        altered[at] ^= rng.randrange(1, 256)
        with pytest.raises(BundleError):
            manifest.parse(bytes(altered), MANIFEST)


def test_no_byte_of_any_file_can_be_flipped_unnoticed(place: Path) -> None:
    rng = random.Random(0)
    files = [p for p in sorted(place.rglob("*")) if p.is_file()]
    assert len(files) == 7
    for path in files:
        raw = path.read_bytes()
        for at in {0, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(4))}:
            altered = bytearray(raw)
            altered[at] ^= 1 << rng.randrange(8)
            path.write_bytes(altered)
            with pytest.raises(BundleError) as caught:
                read(place)
            assert caught.value.fix
        path.write_bytes(raw)
    read(place)


def test_truncated_and_grown_files_are_found_without_hashing(place: Path) -> None:
    path = place / "artifacts/fake-cpu/int8/embed/model.bin"
    for payload in (b"", path.read_bytes() + b"x"):
        path.write_bytes(payload)
        with pytest.raises(BundleError, match=r"int8/embed/model\.bin: of another size than recorded"):
            read(place, check=False)


def test_without_check_digests_are_left_to_the_caller(place: Path) -> None:
    path = place / "graphs/fp32/embed.onnx"
    path.write_bytes(b"WEIGHTS")
    bundle = read(place, check=False)
    bundle.check(bundle.under("assets"))
    with pytest.raises(BundleError, match=r"graphs/fp32/embed\.onnx differ"):
        bundle.check(bundle.files)


def _remove(place: Path) -> None:
    (place / "assets/text.json").unlink()


def _add(place: Path) -> None:
    (place / "assets/extra.pkl").write_bytes(b"x")


def _link_out(place: Path) -> None:
    (place / "assets/text.json").unlink()
    (place / "assets/text.json").symlink_to("/etc/hostname")


def _link_inside(place: Path) -> None:
    (place / "assets/again").symlink_to("text.json")


def _link_folder(place: Path) -> None:
    (place / "more").symlink_to("/")


def _fifo(place: Path) -> None:
    os.mkfifo(place / "pipe")


def _unfinished(place: Path) -> None:
    (place / MANIFEST).unlink()


def _link_manifest(place: Path) -> None:
    (place / MANIFEST).rename(place.parent / "elsewhere.json")
    (place / MANIFEST).symlink_to(place.parent / "elsewhere.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove, r"assets/text\.json: missing"),
        (_add, r"assets/extra\.pkl: not listed"),
        (_link_out, "a link or a special file"),
        (_link_inside, "a link or a special file"),
        (_link_folder, "a link or a special file"),
        (_fifo, "a link or a special file"),
        (_unfinished, "unfinished build"),
        (_link_manifest, "unfinished build"),
    ],
)
def test_a_folder_that_is_not_its_manifest_is_refused(place: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(place)
    with pytest.raises(BundleError, match=message) as caught:
        read(place, check=False)
    assert caught.value.fix


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        read(tmp_path / "nothing")


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"NaN", b"{}{}"])
def test_a_manifest_that_is_not_json_is_refused(place: Path, raw: bytes) -> None:
    (place / MANIFEST).write_bytes(raw)
    with pytest.raises(BundleError, match=r"not JSON|not an object"):
        read(place)


def resealed(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter the manifest and seal it again, as a hostile or mistaken writer could."""
    data = json.loads((place / MANIFEST).read_bytes())
    del data["digest"], data["format_version"]
    change(data)
    (place / MANIFEST).write_bytes(manifest.seal(data))


def _move(data: dict[str, Any], path: str) -> None:
    data["files"][path] = data["files"].pop("graphs/fp32/embed.onnx")


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../sample/graphs/fp32/embed.onnx", "graphs/../graphs/fp32/embed.onnx", "graphs//fp32/embed.onnx",
     "./graphs/fp32/embed.onnx", "graphs\\fp32\\embed.onnx", "C:/x", "c:x", "", "graphs/", "a\0b"],
)  # fmt: skip
def test_a_listed_path_that_could_leave_the_folder_is_refused(place: Path, path: str) -> None:
    resealed(place, lambda data: _move(data, path))
    with pytest.raises(BundleError, match="is not a plain path inside the bundle"):
        read(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("graphs"), "missing or unknown key graphs"),
        (lambda d: d.update(extra=1), "missing or unknown key extra"),
        (lambda d: d.update(name=3), "name: '3' is not str"),
        (lambda d: d.update(tasks="embed"), "tasks: 'embed' is not"),
        (lambda d: d["graphs"].update(embed=[]), "graphs.embed: not an object"),
        (lambda d: d["variants"]["int8"].update(weights="int5"), "variants.int8.weights: 'int5'"),
        (lambda d: d["variants"]["int8"].update(name="int4"), "contradicts itself: variant int8"),
        (lambda d: d["artifacts"][0].update(variant="int3"), "contradicts itself: artifact"),
        (lambda d: d["artifacts"][0].update(path="assets/text.json"), "contradicts itself: artifact"),
        (lambda d: d["artifacts"][0].update(sha256="0" * 64), "contradicts itself: artifact"),
        (lambda d: d["assets"].update(text="assets/none.json"), "contradicts itself: asset text"),
        (lambda d: d["graphs"]["embed"]["profiles"][0]["axes"][0].update(min=9), "not 1 <= min <= opt <= max"),
        (lambda d: d["files"].update({"bundle.json": {"sha256": "0" * 64, "size": 1}}), "bundle.json: missing"),
    ],
)
def test_a_sealed_manifest_that_makes_no_sense_is_refused(
    place: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    resealed(place, change)
    with pytest.raises(BundleError, match=message):
        read(place)


def test_another_format_version_is_refused_by_number(place: Path) -> None:
    data = json.loads((place / MANIFEST).read_bytes())
    (place / MANIFEST).write_text(json.dumps({**data, "format_version": 99}))
    with pytest.raises(BundleError, match="format version 99; this medcompile reads version 1"):
        read(place)


# ---- writing


def siblings(place: Path) -> list[str]:
    return sorted(p.name for p in place.parent.iterdir())


def test_an_exception_leaves_nothing_behind_and_an_older_bundle_untouched(place: Path) -> None:
    before = read(place)
    with pytest.raises(ZeroDivisionError), Writer(place) as writer:
        writer.path("graphs/new.onnx").write_bytes(b"new")
        raise ZeroDivisionError
    assert siblings(place) == ["sample"]
    assert read(place) == before


def test_leaving_without_commit_writes_no_bundle(tmp_path: Path) -> None:
    with Writer(tmp_path / "sample") as writer:
        writer.path("x").write_bytes(b"x")
    assert siblings(tmp_path / "sample") == []


def test_a_new_bundle_replaces_the_old_one_whole(place: Path) -> None:
    write(place, contents([artifact("int8-b")]), payload=b"other")
    loaded = read(place)
    assert list(loaded.variants) == ["int8-b"]
    assert siblings(place) == ["sample"]


def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        write(tmp_path / "papers", contents())
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", contents())
    assert read(tmp_path / "empty").name == "sample"


def test_a_path_outside_the_bundle_is_refused_by_the_writer(tmp_path: Path) -> None:
    with Writer(tmp_path / "sample") as writer:
        for path in ("../x", "/x", "a/../../x"):
            with pytest.raises(BundleError):
                writer.path(path)


def test_an_artifact_that_was_not_written_is_refused(tmp_path: Path) -> None:
    with Writer(tmp_path / "sample") as writer, pytest.raises(BundleError, match="not the file that was written"):
        writer.commit(contents())


def test_a_dead_builds_leftovers_are_removed_and_a_running_builds_are_not(tmp_path: Path) -> None:
    place = tmp_path / "sample"
    code = (
        "import os, sys; from medcompile.bundle import Writer\n"
        "w = Writer(sys.argv[1]).__enter__(); w.path('graphs/half.onnx').write_bytes(b'x'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(place)], check=False).returncode == 9
    (dead,) = siblings(place)
    with Writer(place) as running:
        assert siblings(place) == [running.root.name]
        assert running.root.name != dead
        running.path("graphs/x").write_bytes(b"x")
        write(place, contents())
        assert siblings(place) == sorted([running.root.name, "sample"])
        assert running.path("graphs/x").read_bytes() == b"x"


def _build_many(place: str, mark: int, barrier: Any) -> None:
    barrier.wait()
    for i in range(12):
        write(Path(place), contents(), payload=f"{mark} {i} ".encode() * 500)


def test_builds_at_once_in_several_processes_leave_one_whole_bundle(tmp_path: Path) -> None:
    place = tmp_path / "sample"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    builders = [context.Process(target=_build_many, args=(str(place), mark, barrier)) for mark in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [b.exitcode for b in builders] == [0, 0, 0]
    loaded = read(place)
    payloads = {(place / p).read_bytes()[:2] for p in loaded.files if p.startswith(("graphs/", "artifacts/"))}
    assert len(payloads) == 1
    assert siblings(place) == ["sample"]


def test_large_bundles_are_hashed_in_threads_to_the_same_digests(tmp_path: Path) -> None:
    with Writer(tmp_path / "sample") as writer:
        for i in range(3):
            writer.path(f"graphs/{i}.bin").write_bytes(bytes([i]) * (7 << 20))
        writer.commit(dataclasses.replace(contents([]), assets={}))
    loaded = read(tmp_path / "sample")
    assert len({f.sha256 for f in loaded.files.values()}) == 3
    (tmp_path / "sample/graphs/1.bin").write_bytes(bytes([1]) * ((7 << 20) - 1) + b"\0")
    with pytest.raises(BundleError, match=r"graphs/1\.bin differ"):
        read(tmp_path / "sample")
