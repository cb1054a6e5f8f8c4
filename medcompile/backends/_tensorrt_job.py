"""A TensorRT build as seen from outside: what is asked, what came of it, and how its process ended.

The process itself is _tensorrt_build.py. It may print, hang, abort or be killed; whatever it does becomes an Outcome
or a BackendError with the library's last useful lines.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from medcompile.errors import BackendError

log = logging.getLogger(__name__)

PROGRESS = "progress: "
"""Lines of the process's standard output that begin so tell how far the build is."""
SHOWN_LINES = 8
"""So many lines of the library go into an error."""
TYPED, ORDER, PLAN, OUTCOME, LOG = "typed", "job.json", "plan", "outcome.json", "log"
"""Names in the process's folder: a link to the typed graph's folder, what it reads, and what it writes."""
_LIBRARIES = "libraries"
_HEARTBEAT_S = 10
_KEPT = ("PATH", "HOME", "LANG", "LC_", "TZ", "TMP", "CUDA_", "NVIDIA_", "LD_LIBRARY_PATH", "PYTHONPATH")


@dataclass(frozen=True)
class Job:
    """What to build.

    library: the module to build with. graph: the typed graph's file name.

    profiles: for each, the smallest, usual and largest shape of every input. operators: those of the graph, to be
    told apart on failure. compute_capabilities: 80 for 8.0; empty for the library's default. workspace_mb 0: the
    library's default. tf32: float32 products may drop 13 bits of their inputs. timing_cache: a file of kernel timings;
    empty for none. kernels: the folder of attention kernels beside the graph; empty for a graph that needs none.
    """

    library: str
    graph: str
    operators: Sequence[str]
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]
    compute_capabilities: Sequence[int] = ()
    workspace_mb: int = 0
    version_compatible: bool = False
    tf32: bool = False
    timing_cache: str = ""
    kernels: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a job. problems: why there is no plan, in the library's words with the node where it is known.

    unknown: operators of the graph that the parser does not have. unparsed: the parser did not take the graph; parts
    are then those of _tensorrt_capability.py, if known. layers: the library's layer table.
    seconds: of parsing and building, without imports; peak_rss_bytes: of the process.
    """

    built: bool
    problems: Sequence[str] = ()
    unknown: Sequence[str] = ()
    notes: Sequence[str] = ()
    layers: str = ""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    unparsed: bool = False
    parts: Sequence[Sequence[int]] = ()


def run(job: Job, typed: Path, label: str, timeout_s: float, scratch: Path) -> Outcome:
    """Do the job in a process of its own, in the empty folder scratch; if it is built, scratch/PLAN is the plan.

    typed: the folder of the typed graph. label: what is built by what, for messages and the log. The process sees the
    same names and the same environment whatever the folders are: the library numbers what it makes by address, and
    another length of a path gives other addresses, and a plan of other bytes.
    Raises BackendError where the process dies, or outlasts timeout_s and is killed.
    """
    (scratch / ORDER).write_text(json.dumps(asdict(job)), encoding="utf-8")
    (scratch / TYPED).symlink_to(typed.absolute())
    _link_libraries(job.library, scratch / _LIBRARIES)
    phase, output, ended, started = "starting", [], threading.Event(), time.monotonic()
    process = subprocess.Popen(
        _command(),
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(),
    )

    def watch() -> None:
        while not ended.wait(min(_HEARTBEAT_S, max(0.01, timeout_s - (time.monotonic() - started)))):
            seconds = time.monotonic() - started
            log.info("%s: %.0f s (%s)", label, seconds, phase)
            if seconds >= timeout_s:
                process.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        assert process.stdout is not None
        for line in map(str.strip, process.stdout):
            if line.startswith(PROGRESS):
                phase = line.removeprefix(PROGRESS)
                log.info("%s: %s", label, phase)
            elif line:
                output.append(line)
        code = process.wait()
    finally:
        ended.set()
        process.kill()
        process.wait()
    if (outcome := _outcome(scratch / OUTCOME)) is not None and (code == 0 or outcome.unparsed):
        return outcome
    last = _last_lines(scratch / LOG, output)
    if code == -signal.SIGKILL and time.monotonic() - started >= timeout_s:
        raise BackendError(
            f"{label}: still not built after {timeout_s:g} s (phase: {phase}){last}",
            fix="raise compute.build_timeout_s of the variant, or build on a faster machine",
        )
    raise BackendError(
        f"{label}: the build died of {_death(code)} (phase: {phase}){last}",
        fix="free memory and build again"
        if code == -signal.SIGKILL
        else "the lines above are the library's own; leave out this target or this variant",
    )


def _outcome(file: Path) -> Outcome | None:
    try:
        return Outcome(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # it died before it wrote that, or while
        return None


def _command() -> list[str]:
    return [sys.executable, "-P", "-m", "medcompile.backends._tensorrt_build"]


def _link_libraries(library: str, links: Path) -> None:
    """The library's files under their names without a version: its parser opens libtensorrt_rtx.so for plugins, and
    the wheel holds libtensorrt_rtx.so.1 only, so that it would abort."""
    links.mkdir()
    found = find_spec(f"{library}_libs")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for file in Path(folder).glob("lib*.so.*"):
            link = links / f"{file.name.partition('.so.')[0]}.so"
            if not link.is_symlink():
                link.symlink_to(file)


def _environment() -> dict[str, str]:
    """What the process needs of this one's, with medcompile importable and the links found first."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(_KEPT)}
    for name, first in (("LD_LIBRARY_PATH", _LIBRARIES), ("PYTHONPATH", str(Path(__file__).parents[2]))):
        kept[name] = os.pathsep.join(filter(None, (first, kept.get(name))))
    return {**kept, "PYTHONHASHSEED": "0"}


def _last_lines(file: Path, output: Sequence[str]) -> str:
    """The library's last errors and warnings (else its last words), and what it printed past its logger."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    useful = [line for line in lines if line.startswith(("ERROR", "WARNING"))] or lines[-2:]
    shown = [*useful[-SHOWN_LINES:], *output[-SHOWN_LINES:]]
    return "".join(f"\n  {line[:300]}" for line in shown)


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"{signal.Signals(-code).name} ({signal.strsignal(-code)})"
    except ValueError:
        return f"signal {-code}"
