"""One TensorRT build in a process of its own: `python -m medcompile.backends._tensorrt_build`.

A fault inside the library's parser or builder aborts its process, and a failed build changes the next one's bytes;
so every engine gets a fresh process, and whoever started it reads the outcome from a file. Who starts it,
and what becomes of a process that dies, is _tensorrt_job.py's business.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medcompile.backends import _tensorrt_capability
from medcompile.backends._tensorrt_job import LOG, ORDER, OUTCOME, PLAN, PROGRESS, TYPED, Job, Outcome
from medcompile.kernels import tensorrt_plugin
from medcompile.kernels.compiled import Kernels
from medcompile.resources import peak_rss_bytes

_LAYERS = "Layers:"
# linux/personality.h
_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF


class _Refused(Exception):
    """The library can't do what was asked. problems: in words. unparsed: it is the graph that it does not take."""

    def __init__(self, problems: Sequence[str], unknown: Sequence[str] = (), unparsed: bool = False) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)
        self.unknown = tuple(unknown)
        self.unparsed = unparsed


def main(repeatable: bool) -> None:
    """Build the job in the working folder. repeatable: addresses are fixed, which most equal plans need."""
    job = Job(**json.loads(Path(ORDER).read_text(encoding="utf-8")))
    with Path(LOG).open("w", encoding="utf-8", buffering=1) as log:
        try:
            outcome = _build(job, log)
        except _Refused as error:
            outcome = Outcome(False, error.problems, error.unknown, unparsed=error.unparsed)
    unsure = () if repeatable else ("addresses are random here: another build may name its temporaries otherwise",)
    outcome = dataclasses.replace(outcome, notes=(*outcome.notes, *unsure), peak_rss_bytes=peak_rss_bytes())
    _tell(outcome)
    if outcome.unparsed:
        _tell(dataclasses.replace(outcome, parts=_tensorrt_capability.parts(job.library, Path(TYPED) / job.graph)))


def _tell(outcome: Outcome) -> None:
    Path(OUTCOME).write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")


def _build(job: Job, log: Any) -> Outcome:
    trt = importlib.import_module(job.library)
    messages = _logger(trt, log)
    started = time.perf_counter()
    builder = trt.Builder(messages)
    network = builder.create_network(_strongly_typed(trt))
    if job.kernels:
        tensorrt_plugin.register(trt, Kernels.read(Path(TYPED) / job.kernels))
    parser = trt.OnnxParser(network, messages)
    _say("parsing the graph")
    if not parser.parse_from_file(f"{TYPED}/{job.graph}"):
        problems = [_told(parser.get_error(i)) for i in range(parser.num_errors)]
        unknown = [name for name in job.operators if not parser.supports_operator(name)]
        raise _Refused(problems or messages.worst, unknown, unparsed=True)
    config, notes = _configured(trt, builder, network, job)
    _say("building the engine")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _Refused(messages.worst or ["the library gave no plan and no reason"])
    with Path(PLAN).open("wb") as file:
        file.write(memoryview(plan))
    if job.timing_cache and not notes:
        fresh = Path(f"{job.timing_cache}.{os.getpid()}")  # another build may read the old one meanwhile
        fresh.write_bytes(memoryview(config.get_timing_cache().serialize()))
        fresh.replace(job.timing_cache)
    layers = messages.layers or _inspected(trt, messages, plan)
    return Outcome(True, notes=notes, layers=layers, seconds=time.perf_counter() - started)


def _strongly_typed(trt: Any) -> int:
    """The flag by which the graph alone decides every precision. Libraries that know nothing else may lack it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configured(trt: Any, builder: Any, network: Any, job: Job) -> tuple[Any, list[str]]:
    """The builder's settings as the job wants them, and what was asked in vain."""
    config, notes = builder.create_builder_config(), []
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.kernels:
        tensorrt_plugin.configure(trt, config)
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        if config.add_optimization_profile(profile) < 0:
            raise _Refused([f"it does not take the profile {dict(shapes)}"])
    if job.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_mb << 20)
    if job.compute_capabilities:
        _set_compute_capabilities(trt, config, job.compute_capabilities)
    if hasattr(trt.BuilderFlag, "TF32"):  # on by default
        (config.set_flag if job.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if job.version_compatible:
        flag = getattr(trt.BuilderFlag, "VERSION_COMPATIBLE", None)
        if flag is None:
            raise _Refused(["it has no version-compatible plans; leave out version_compatible"])
        config.set_flag(flag)
    if job.timing_cache:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            known = Path(job.timing_cache)
            cache = config.create_timing_cache(known.read_bytes() if known.is_file() else b"")
            config.set_timing_cache(cache, False)
        if said:
            notes.append(f"timing_cache has no use here: {said[0].message}")
    return config, notes


def _set_compute_capabilities(trt: Any, config: Any, wanted: Sequence[int]) -> None:
    known = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    if not known or not hasattr(config, "num_compute_capabilities"):
        raise _Refused(["it builds for the GPU that it runs on; leave out compute_capability"])
    named = sorted(int(name[2:]) for name in known if name.startswith("SM"))
    if missing := sorted(set(wanted) - set(named)):
        raise _Refused([f"it builds for compute_capability {named}, not for {missing}"])
    config.num_compute_capabilities = len(wanted)
    for index, number in enumerate(sorted(wanted)):
        if not config.set_compute_capability(known[f"SM{number}"], index):
            raise _Refused([f"it does not take compute_capability {number}"])


def _inspected(trt: Any, messages: Any, plan: Any) -> str:
    """The layer table of a library that does not print it: from the engine, which takes a GPU. Empty without one."""
    engine = trt.Runtime(messages).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


def _told(error: Any) -> str:
    node = f"{error.node_operator()} {error.node_name()}: " if error.node_name() else ""
    return f"{node}{error.desc()}"


def _logger(trt: Any, log: Any) -> Any:
    class Messages(trt.ILogger):  # type: ignore[misc]
        """Everything goes to the log file, and the ends of phases are told as progress. (The library's own progress
        monitor works in a thread beside the build, and gives plans of other bytes now and then.)

        worst: errors, or warnings if there are none. layers: the table.
        """

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.layers = ""
            self._said: dict[str, list[str]] = {"ERROR": [], "WARNING": []}

        @property
        def worst(self) -> list[str]:
            return self._said["ERROR"] or self._said["WARNING"]

        def log(self, severity: Any, message: str) -> None:
            name = severity.name.removeprefix("INTERNAL_")
            if message.startswith(_LAYERS):
                self.layers = message
            elif " completed in " in message:
                _say(message.partition(" in ")[0])
            elif name in self._said:
                self._said[name].append(message)
            log.write(f"{name} {message}\n")

    return Messages()


def _say(message: str) -> None:
    sys.stdout.write(f"{PROGRESS}{message}\n")
    sys.stdout.flush()


def fix_addresses() -> bool:
    """Start this process anew without random addresses; True once it has none, False where the system forbids that.

    The library numbers what it makes in the order of its addresses, so that random ones give a plan other bytes.
    Fixed ones are not enough for equal plans every time: of 60 builds that a tracer slowed at every system call, 19
    gave some temporaries other names (up to 400 bytes; the same layers). max_threads = 1, one core, one malloc arena,
    no thread cache and a stopped clock, alone and together, did not end that; the cause is not known.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "personality"):
        return False
    now = libc.personality(_ASK)
    if now & _ADDR_NO_RANDOMIZE:
        return True
    if libc.personality(now | _ADDR_NO_RANDOMIZE) >= 0:
        os.execv(sys.executable, sys.orig_argv)
    return False


if __name__ == "__main__":
    main(fix_addresses())
