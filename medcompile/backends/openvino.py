"""OpenVINO on a CPU.

build() stores the typed graph as OpenVINO's own files (model.xml, model.bin), which load without a conversion. What
the library would else decide by itself is named in the variant's compute settings:

    float          float32 (unless said), bfloat16 or float16: what floats are computed in
    dynamic_group  inputs that share a scale where activations are rounded at run time: 128 for variants with dynamic
                   layers and 0, which is never, for others (unless said); it is for a whole graph
    streams        1 (unless said): how many requests run side by side, sharing the threads
    kv             of decoders: what keys and values are kept in (_openvino_paged.py)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.backends import Built, Executor, check_feeds, is_paged
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.resources import available_cores
from medcompile.spec import GraphSpec, Scalar, Target, Variant

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov

    from medcompile.backends._openvino_paged import OpenvinoStepModel

    Array = np.ndarray[Any, Any]

# What a variant calls a float format -> what OpenVINO calls it as a hint, and as a capability of the device.
_FLOATS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}


class OpenVinoBackend:
    name = "openvino"
    targets = ("openvino-cpu",)

    def probe(self, target: str) -> Target:
        version = _library().get_version().partition("-")[0]
        return Target(target, self.name, "cpu", platform.machine(), platform.system().lower(), version)

    def floats(self) -> tuple[str, ...]:
        """Of bfloat16 and float32 what this CPU has; float16, which most emulate, is left to those who ask for it."""
        has = _library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return tuple(name for name in ("bfloat16", "float32") if _FLOATS[name][1] in has)

    def build(self, onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Built:
        """Write out/model.xml and out/model.bin, which fit any CPU that OpenVINO runs on, and what it compiled here.

        model.blob is the compiled graph without the weights; model.machine says on which kind of CPU and by which
        version it was made, and load() takes it on no other.
        """
        from medcompile import onnx_files
        from medcompile.backends import _openvino_paged
        from medcompile.rewrites import openvino as dialect

        if is_paged(spec):
            return _openvino_paged.build(_library(), onnx_path, spec, variant, target, out, _settings(variant))
        openvino, settings = _library(), _settings(variant)
        notes = [f"{name}={value}" for name, value in settings.items()]
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            if variant.any_dynamic:
                graph = onnx_files.load(onnx_path)
                count = dialect.rewrite(graph)
                onnx_files.save({spec.name: graph}, Path(scratch))
                onnx_path = Path(scratch) / f"{spec.name}.onnx"
                notes += dialect.told(count, variant)
            try:
                model = openvino.Core().read_model(onnx_path)
                # Nameless constants are numbered through the life of the process; the file must not tell its age.
                for index, op in enumerate(model.get_ordered_ops()):
                    if re.fullmatch(rf"{op.get_type_name()}_\d+", op.get_friendly_name()):
                        op.set_friendly_name(f"{op.get_type_name()}/{index}")
                openvino.save_model(model, out / "model.xml", compress_to_fp16=False)
                _compile_here(openvino.Core(), settings, out)
            except RuntimeError as error:
                raise BackendError(
                    f"OpenVINO {target.version} refuses graph {spec.name} of variant {variant.name}: {_reason(error)}",
                    fix="leave openvino-cpu out of targets, or this variant out of variants",
                ) from error
        return Built("model.xml", target, tuple(notes))

    def load(
        self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None
    ) -> OpenVinoExecutor:
        core = _library().Core()
        settings = _settings(variant)
        _check_float(core, settings, variant)
        config = _config(settings, threads or available_cores())
        try:
            compiled = _compiled_before(core, path, config) or core.compile_model(path, "CPU", config)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO refuses {path.name} of graph {spec.name}: {_reason(error)}",
                fix="build the bundle again with this version of openvino",
            ) from error
        return OpenVinoExecutor(compiled, spec)

    def load_streams(
        self, path: Path, spec: GraphSpec, variant: Variant, target: Target, streams: int
    ) -> OpenVinoExecutor:
        told = replace(variant, compute={**variant.compute, "streams": streams})
        return self.load(path, spec, told, target, streams)

    def load_decoder(self, path: Path, variant: Variant, threads: int | None, blocks: int) -> OpenvinoStepModel:
        """The decoder that build() made of a paged graph, with pools of so many blocks, on the cores that load() takes.

        compute.kv: what keys and values are kept in: compute.float, or uint8.
        """
        from medcompile.backends import _openvino_paged

        openvino, settings = _library(), _settings(variant)
        _check_float(openvino.Core(), settings, variant)
        config = _config(settings, threads or available_cores())
        kv = _openvino_paged.kv_format(variant, settings)
        return _openvino_paged.OpenvinoStepModel(openvino, path, config, kv=kv, blocks=blocks)


def _check_float(core: ov.Core, settings: Mapping[str, Scalar], variant: Variant) -> None:
    if _FLOATS[str(settings["float"])][1] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BackendError(
            f"variant {variant.name} computes in {settings['float']}, which this CPU does not have",
            fix="load another variant, or build one with compute.float: float32",
        )


def _config(settings: Mapping[str, Scalar], threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _FLOATS[str(settings["float"])][0],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": settings["dynamic_group"],
        "NUM_STREAMS": settings["streams"],
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # pinned threads of two processes fight over one core
    }


def _compile_here(core: ov.Core, settings: Mapping[str, Scalar], out: Path) -> None:
    """Leave the compiled graph beside the model where this CPU has the variant's float format."""
    if _FLOATS[str(settings["float"])][1] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return
    # OpenVINO numbers what it makes through the life of a process: only a fresh one gives the same bytes every time.
    job = json.dumps({"folder": str(out), "config": _config(settings, 1)})
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__], input=job, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    (out / "model.machine").write_text(_machine(core, out / "model.xml"), encoding="utf-8")


def _compile_job() -> None:
    """What the fresh process does: model.xml in the folder named on standard input becomes model.blob beside it."""
    job = json.load(sys.stdin)
    folder = Path(job["folder"])
    config = {**job["config"], "CACHE_MODE": "OPTIMIZE_SIZE"}
    blob = _library().Core().compile_model(folder / "model.xml", "CPU", config).export_model()
    (folder / "model.blob").write_bytes(blob if isinstance(blob, bytes) else blob.getvalue())


def _compiled_before(core: ov.Core, path: Path, config: Mapping[str, Any]) -> ov.CompiledModel | None:
    """The graph as it was compiled when the bundle was built, if that was on this kind of CPU by this version."""
    blob, machine = path.with_suffix(".blob"), path.with_suffix(".machine")
    if not blob.is_file() or not machine.is_file() or machine.read_text(encoding="utf-8") != _machine(core, path):
        return None
    weights = {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(path.with_suffix(".bin"))}
    try:
        compiled: ov.CompiledModel = core.import_model(blob.read_bytes(), "CPU", {**config, **weights})
    except RuntimeError:  # the library knows best whether it can use it; compiling anew gives the same answers
        return None
    return compiled


def _machine(core: ov.Core, model: Path) -> str:
    """Everything that compiled code depends on: the library's build, the CPU with its instruction sets, the graph."""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features"))), "")
    graph = hashlib.sha256(model.read_bytes()).hexdigest()
    return "\n".join([_library().get_version(), core.get_property("CPU", "FULL_DEVICE_NAME"), flags, graph]) + "\n"


class OpenVinoExecutor(Executor):
    """One compiled model and as many infer requests as there were callers at once.

    For every shape it meets the library makes kernels, and keeps them: some milliseconds and a megabyte each.
    """

    step = 16

    def __init__(self, compiled: ov.CompiledModel, spec: GraphSpec) -> None:
        self._compiled: ov.CompiledModel | None = compiled
        super().__init__(spec)
        self._free: list[ov.InferRequest] = []
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self.spec, feeds)
        with self._lock:
            compiled = self._compiled
            if compiled is None:
                raise self.closed()
            request = self._free.pop() if self._free else compiled.create_infer_request()
        try:
            result = request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise BackendError(f"{self.spec.name}: OpenVINO failed: {_reason(error)}") from error
        values = {tensor.name: result[tensor.name] for tensor in self.spec.outputs}
        with self._lock:
            self._free.append(request)
        return values

    def close(self) -> None:
        with self._lock:
            self._compiled = None
            self._free.clear()


def _library() -> Any:
    """openvino, without its conversion tools: to import them reports home, and takes longer than all the rest."""
    tools = "openvino.tools.ovc"
    first = "openvino" not in sys.modules and tools not in sys.modules
    if first:
        sys.modules[tools] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackendUnavailable(
            f"openvino cannot be imported: {error}", fix='pip install "medcompile[openvino]"'
        ) from error
    finally:
        if first:
            del sys.modules[tools]
    return openvino


def _settings(variant: Variant) -> dict[str, Scalar]:
    """Every setting of this backend, as the variant names it or as the text above says."""
    settings: dict[str, Scalar] = {"float": "float32", "dynamic_group": 128 if variant.any_dynamic else 0, "streams": 1}
    settings.update((name, value) for name, value in variant.compute.items() if name in settings)
    if settings["float"] not in _FLOATS:
        raise BackendError(
            f"variant {variant.name}: compute.float is {settings['float']!r}", fix=f"choose from: {', '.join(_FLOATS)}"
        )
    return settings


def _reason(error: Exception) -> str:
    """The last line that says something: OpenVINO puts its own source lines first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


BACKEND = OpenVinoBackend()

if __name__ == "__main__":
    _compile_job()
