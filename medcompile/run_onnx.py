"""Running an onnx_ir model on the CPU with ONNX Runtime: what passes get as ctx.run_onnx. Build time only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from medcompile import onnx_files
from medcompile.errors import BackendUnavailable

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Feeds = Mapping[str, "np.ndarray[Any, Any]"]


def run_onnx(
    model: ir.Model, feeds: Iterator[Feeds], outputs: tuple[str, ...]
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield the values named outputs for each feed. They may be any values of the graph, not its outputs alone."""
    import onnx_ir as ir

    ort = _library()
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs}
    present = {v.name for v in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in outputs if name not in present)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    folders = {
        Path(v.const_value.base_dir)
        for v in copy.graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    lazy = any(isinstance(v.const_value, ir.LazyTensor) for v in copy.graph.initializers.values())
    with TemporaryDirectory() as scratch:
        if lazy or len(folders) != 1:
            onnx_files.save({"model": copy}, Path(scratch))
            session = ort.InferenceSession(f"{scratch}/model.onnx", options, providers=["CPUExecutionProvider"])
        else:
            # The weights lie in one folder already: only the graph is handed over.
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(folders.pop()))
            proto = ir.to_proto(copy).SerializeToString()
            session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    for feed in feeds:
        yield dict(zip(outputs, session.run(list(outputs), dict(feed)), strict=True))


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
