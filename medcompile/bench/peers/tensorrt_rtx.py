"""TensorRT-RTX in float16: as tensorrt, with the builder for RTX GPUs. NOT RUN HERE (no GPU)."""

from __future__ import annotations

import os

from medcompile.bench.peers import _onnx, _tensorrt

_INSTALL = 'pip install "medcompile[rtx]"'
_MODULES = {**_onnx.MODULES, "tensorrt_rtx": _INSTALL, "polygraphy": _INSTALL}


class TensorRtRtx(_tensorrt.TensorRtPeer):
    name = "tensorrt_rtx"
    title = "TensorRT-RTX fp16"
    modules = _MODULES
    engine = "tensorrt_rtx"

    def choose(self) -> None:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"


PEER = TensorRtRtx()
