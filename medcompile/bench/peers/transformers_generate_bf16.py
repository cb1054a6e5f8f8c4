"""transformers' generate() in bfloat16; otherwise as transformers_generate."""

from __future__ import annotations

from medcompile.bench.peers import transformers_generate


class TransformersGenerateBf16(transformers_generate.TransformersGenerate):
    name = "transformers_generate_bf16"
    title = "transformers generate bf16"
    reference = False
    precision = float_precision = "bfloat16"


PEER = TransformersGenerateBf16()
