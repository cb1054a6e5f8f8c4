"""OpenVINO in bfloat16 (the precision hint): our export of the checkpoint, hint LATENCY."""

from __future__ import annotations

from medcompile.bench.peers import _openvino


class OpenVinoBf16(_openvino.FloatPeer):
    name = "openvino_bf16"
    title = "OpenVINO bf16"
    hint = "bf16"
    precision = float_precision = "bfloat16"


PEER = OpenVinoBf16()
