"""Running graphs on the CPU with ONNX Runtime: what passes get as ctx.run_onnx, and the oracle of verify.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from medcompile import onnx_files
from medcompile.errors import BackendUnavailable
from medcompile.resources import available_cores

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Feeds = Mapping[str, "np.ndarray[Any, Any]"]


def run_onnx(
    model: ir.Model, feeds: Iterator[Feeds], outputs: tuple[str, ...]
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield the values named outputs for each feed. They may be any values of the graph, not its outputs alone."""
    import onnx_ir as ir

    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs}
    present = {v.name for v in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in outputs if name not in present)
    tensors = [v.const_value for v in copy.graph.initializers.values()]
    folders = {Path(t.base_dir) for t in tensors if isinstance(t, ir.ExternalTensor)}
    if len(folders) == 1 and not any(isinstance(t, ir.LazyTensor) for t in tensors):
        # The weights lie in one folder already: only the graph is handed over.
        running = session(ir.to_proto(copy).SerializeToString(), folders.pop())
    else:
        with TemporaryDirectory() as scratch:
            onnx_files.save({"model": copy}, Path(scratch))
            running = session(Path(scratch) / "model.onnx")
    for feed in feeds:
        yield dict(zip(outputs, running.run(list(outputs), dict(feed)), strict=True))


def session(model: Path | bytes, weights: Path | None = None) -> Any:
    """An InferenceSession on the CPU, on all cores of this process. weights: the folder that bytes refer into."""
    ort = _library()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = available_cores()
    # A build shares its machine with other work, and threads that wait by spinning take the cores from it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The library would round activations to int8 where it fuses int4 weights with their product: 1 keeps them float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def errors() -> tuple[type[Exception], ...]:
    """Every exception the library raises. They share no base, so they are gathered by where they live."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (value for value in vars(state).values() if isinstance(value, type))
    return tuple(kind for kind in found if issubclass(kind, Exception))


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            f"building runs graphs with ONNX Runtime, which can't be imported: {error}",
            fix='pip install "medcompile[build]"',
        ) from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime
