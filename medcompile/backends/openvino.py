"""OpenVINO on a CPU.

build() stores the typed graph as OpenVINO's own files (model.xml, model.bin), which load without a conversion. What
the library would else decide by itself is named in the variant's compute settings:

    float          float32 (unless said), bfloat16 or float16: what floats are computed in
    dynamic_group  inputs that share a scale where activations are rounded at run time: 128 for dynamic variants and
                   0, which is never, for others (unless said)
    streams        1 (unless said): how many requests run side by side, sharing the threads
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.backends import Built, Executor, check_feeds
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.spec import GraphSpec, Scalar, Target, Variant

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov

    Array = np.ndarray[Any, Any]

# What a variant calls a float format -> what OpenVINO calls it as a hint, and as a capability of the device.
_FLOATS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}


class OpenVinoBackend:
    name = "openvino"
    targets = ("openvino-cpu",)

    def probe(self, target: str) -> Target:
        version = _library().get_version().partition("-")[0]
        return Target(target, self.name, "cpu", platform.machine(), platform.system().lower(), version)

    def build(self, onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Built:
        """Write out/model.xml and out/model.bin, which fit any CPU that OpenVINO runs on."""
        from medcompile import onnx_files
        from medcompile.rewrites import openvino as dialect

        library, settings = _library(), _settings(variant)
        notes = [f"{name}={value}" for name, value in settings.items()]
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            if variant.dynamic:
                graph = onnx_files.load(onnx_path)
                count = dialect.rewrite(graph)
                onnx_files.save({spec.name: graph}, Path(scratch))
                onnx_path = Path(scratch) / f"{spec.name}.onnx"
                notes.append(
                    f"{count} products round activations per token and dynamic_group, the typed graph per token"
                )
            try:
                model = library.Core().read_model(onnx_path)
                # Nameless constants are numbered through the life of the process; the file must not tell its age.
                for index, op in enumerate(model.get_ordered_ops()):
                    if re.fullmatch(rf"{op.get_type_name()}_\d+", op.get_friendly_name()):
                        op.set_friendly_name(f"{op.get_type_name()}/{index}")
                library.save_model(model, out / "model.xml", compress_to_fp16=False)
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
        hint, capability = _FLOATS[str(settings["float"])]
        if capability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise BackendError(
                f"variant {variant.name} computes in {settings['float']}, which this CPU does not have",
                fix="load another variant, or build one with compute.float: float32",
            )
        try:
            compiled = core.compile_model(
                path,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": hint,
                    "DYNAMIC_QUANTIZATION_GROUP_SIZE": settings["dynamic_group"],
                    "NUM_STREAMS": settings["streams"],
                    "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0)),
                    "ENABLE_CPU_PINNING": False,  # pinned threads of two processes fight over one core
                },
            )
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO refuses {path.name} of graph {spec.name}: {_reason(error)}",
                fix="build the bundle again with this version of openvino",
            ) from error
        return OpenVinoExecutor(compiled, spec)


class OpenVinoExecutor(Executor):
    """One compiled model and as many infer requests as there were callers at once."""

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
    settings: dict[str, Scalar] = {"float": "float32", "dynamic_group": 128 if variant.dynamic else 0, "streams": 1}
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
