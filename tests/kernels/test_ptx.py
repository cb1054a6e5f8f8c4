"""Kernels compiled ahead of time, on a machine that need not have a GPU; ptxas, which triton brings, assembles them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from medcompile.errors import BackendError, BackendUnavailable
from medcompile.kernels import ptx
from medcompile.kernels.compiled import INDEX, Kernels
from medcompile.kernels.launches import Face

triton = pytest.importorskip("triton")

SMALLEST_LIMIT_BYTES = 101_376
"""Shared memory that one block may take on every GPU since 8.0: 99 kB, of 8.6, 8.9 and 12.0."""


def assembles(text: str, arch: str, folder: Path) -> bool:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = "ptxas-blackwell" if arch.startswith(("sm_10", "sm_12", "sm_90a")) else "ptxas"
    (folder / "kernels.ptx").write_text(text)
    command = [tools / tool, "--gpu-name", arch, folder / "kernels.ptx", "-o", folder / "kernels.cubin"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_all_kernels_stand_in_one_module_with_the_arguments_that_a_launch_gives(kernels: Kernels) -> None:
    module = kernels.modules["sm_80"]
    assert list(module.entries) == ["write", "chunks", "steps", "splits", "reduce"]
    for entry in module.entries.values():
        head = re.search(rf"\.entry {entry.name}\((.*?)\)\s*\.reqntid (\d+)", module.ptx, re.DOTALL)
        assert head is not None
        kinds = [".u64", ".u32", ".f32"]
        given = [next(kind for kind in kinds if kind in line) for line in head[1].strip().splitlines()]
        wanted = [{"pointer": ".u64", "int32": ".u32", "float32": ".f32"}[kind] for _, kind in entry.arguments]
        assert given == [*wanted, *[".u64"] * entry.scratch]
        assert int(head[2]) == 32 * entry.warps
    assert module.entries["splits"].arguments[-1] == ("scale", "float32")


def test_ptx_for_the_oldest_gpu_assembles_for_all_later_ones(kernels: Kernels, tmp_path: Path) -> None:
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert assembles(kernels.modules["sm_80"].ptx, arch, tmp_path), arch


def test_ptx_holds_no_path_and_no_line_of_source(kernels: Kernels) -> None:
    text = kernels.modules["sm_80"].ptx
    assert "\n\t.loc" not in text
    assert ".debug" not in text
    assert "//" not in text
    assert ".py" not in text
    assert str(Path.home()) not in text


def test_equal_faces_give_equal_bytes_whatever_the_cache_holds(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    again = ptx.compile_kernels(kernels.face, (80,))
    assert any(tmp_path.iterdir())  # it was compiled anew
    assert again.pack() == kernels.pack()
    assert again.digest == kernels.digest


def test_kernels_survive_a_folder_and_packing(kernels: Kernels, tmp_path: Path) -> None:
    kernels.save(tmp_path)
    assert Kernels.read(tmp_path) == kernels
    assert Kernels.unpack(kernels.pack()) == kernels


def test_a_changed_file_is_refused(kernels: Kernels, tmp_path: Path) -> None:
    kernels.save(tmp_path)
    file = tmp_path / "sm_80.ptx"
    file.write_text(file.read_text().replace("add", "sub", 1))
    with pytest.raises(BackendError, match=r"sm_80\.ptx was changed"):
        Kernels.read(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(BackendError, match="does not hold attention kernels"):
        Kernels.read(tmp_path)


def test_bytes_that_are_no_kernels_are_refused() -> None:
    with pytest.raises(BackendError, match="cannot be read"):
        Kernels.unpack(b"plan")


def test_a_gpu_gets_the_module_that_suits_it_best() -> None:
    face = Face(4, 2, 32, 16)
    kernels = Kernels(face, "", {"sm_80": "8.0", "sm_89": "8.9", "sm_90a": "9.0a"})  # type: ignore[dict-item]
    chosen = [kernels.module_for(cc) for cc in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert chosen == ["8.0", "8.0", "8.9", "9.0a", "8.9", "8.9"]
    with pytest.raises(BackendUnavailable, match="sm_75"):
        kernels.module_for((7, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("face", "capabilities"),
    [
        (Face(32, 4, 64, 32), (80, 89, 90, 120)),
        (Face(32, 8, 128, 16, "bfloat16", "bfloat16"), (80, 90)),
        (Face(8, 8, 128, 32, "float32", "float32"), (80,)),
        (Face(8, 4, 256, 32), (80,)),
    ],
)
def test_every_gpu_has_kernels_that_fit_it(face: Face, capabilities: tuple[int, ...], tmp_path: Path) -> None:
    compiled = ptx.compile_kernels(face, capabilities)
    names = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 120: "sm_120a"}
    assert list(compiled.modules) == [names[capability] for capability in capabilities]
    for arch, module in compiled.modules.items():
        assert assembles(module.ptx, arch, tmp_path), arch
        most = 232_448 if arch == "sm_90a" else SMALLEST_LIMIT_BYTES
        assert all(entry.shared_bytes <= most for entry in module.entries.values())
