"""ONNX Runtime on a CPU.

build() rewrites the typed graph into ONNX Runtime's fused operators (medcompile/rewrites says how), lets the library
fold and fuse what it knows, and stores the result, so that load() only maps a file and packs weights.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.backends import Built, check_feeds
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.spec import GraphSpec, Target, TensorSpec, Variant

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort

    Array = np.ndarray[Any, Any]

# Fusions of the library that make a CPU slower: SkipLayerNormalization and BiasGelu are scalar loops there, eight and
# two times as slow as the vectorised Add, LayerNormalization and Gelu that they replace (ONNX Runtime 1.31).
_SLOWER = ("SkipLayerNormFusion", "BiasGeluFusion", "EmbedLayerNormFusion")


class OnnxRuntimeBackend:
    name = "onnxruntime"
    targets = ("onnxruntime-cpu",)

    def probe(self, target: str) -> Target:
        ort = _library()
        return Target(target, self.name, "cpu", platform.machine(), platform.system().lower(), ort.__version__)

    def build(self, onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Built:
        """Write out/model.onnx and out/weights.bin: the fused graph, free of anything that depends on this machine."""
        from medcompile import onnx_files
        from medcompile.rewrites import onnxruntime as dialect

        ort = _library()
        model = onnx_files.load(onnx_path)
        counts = dialect.rewrite(model)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(out / "model.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.intra_op_num_threads = 1
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            onnx_files.save({spec.name: model}, Path(scratch))
            _session(Path(scratch) / f"{spec.name}.onnx", options, disabled=_SLOWER)
        fused = ", ".join(f"{count} {form}" for form, count in counts.items())
        return Built("model.onnx", target, (f"fused: {fused}", *_notes(variant)))

    def load(
        self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None
    ) -> OnnxRuntimeExecutor:
        ort = _library()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        return OnnxRuntimeExecutor(_session(path, options), spec)


class OnnxRuntimeExecutor:
    """One session; ONNX Runtime's run() may be called from many threads at once."""

    def __init__(self, session: ort.InferenceSession, spec: GraphSpec) -> None:
        self._session: ort.InferenceSession | None = session
        self._spec = spec
        self._names = [tensor.name for tensor in spec.outputs]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self._spec, feeds)
        session = self._session
        if session is None:
            raise BackendError(f"{self._spec.name}: this executor is closed", fix="load the bundle again")
        try:
            values = session.run(self._names, dict(feeds))
        except _errors() as error:
            raise BackendError(f"{self._spec.name}: ONNX Runtime failed: {_first_line(error)}") from error
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> OnnxRuntimeExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            f"onnxruntime cannot be imported: {error}", fix='pip install "medcompile[cpu]"'
        ) from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _session(path: Path, options: ort.SessionOptions, disabled: Sequence[str] = ()) -> ort.InferenceSession:
    """A session on the CPU alone. Raises BackendError where the library refuses the file."""
    ort = _library()
    try:
        session = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
    except _errors() as error:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} refuses {path.name}: {_first_line(error)}",
            fix="build the bundle again with this version of onnxruntime, or choose another target",
        ) from error
    if session.get_providers() != ["CPUExecutionProvider"]:
        raise BackendError(f"{path.name} was placed on {session.get_providers()}, not on the CPU")
    return session


def _errors() -> tuple[type[Exception], ...]:
    """Every exception the library raises. They share no base, so they are gathered by where they live."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _notes(variant: Variant) -> list[str]:
    ignored = [f"{name}={value}" for name, value in sorted(variant.compute.items())]
    return [f"ONNX Runtime on a CPU has no use for compute {', '.join(ignored)}"] if ignored else []


BACKEND = OnnxRuntimeBackend()
