"""OpenVINO in float32: our export of the checkpoint, hint LATENCY."""

from __future__ import annotations

from medcompile.bench.peers import _openvino


class OpenVinoFp32(_openvino.FloatPeer):
    name = "openvino_fp32"
    title = "OpenVINO fp32"
    hint = "f32"


PEER = OpenVinoFp32()
