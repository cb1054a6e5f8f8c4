"""The original models as torch and OpenVINO export them: what published tools start from.

An encoder or a tower is one file of each kind; a decoder is a step, with keys and values going in and out of the ONNX
file, and kept as states in OpenVINO's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.spec import GraphSpec

if TYPE_CHECKING:
    import openvino

OPSET = 17
DECODER = "generate"


def export(checkpoint: Path, specs: Mapping[str, GraphSpec], out: Path) -> None:
    """Every graph as torch exports it: out/<graph>.onnx, and out/<graph>.xml by OpenVINO's own conversion."""
    import openvino
    import torch

    for graph, spec in specs.items():
        for attention, suffix in (("eager", "onnx"), ("sdpa", "xml")):
            module, example, inputs, outputs = _traced(checkpoint, spec, attention)
            with torch.inference_mode():
                if suffix == "onnx":
                    axes = {n: dict(enumerate(["batch", "length"])) for n in inputs if n.endswith(("ids", "mask"))}
                    axes |= {n: {0: "batch", 2: "past"} for n in inputs if n.startswith("past")}
                    axes |= {n: {0: "batch", 2: "total"} for n in outputs if n.startswith("present")}
                    axes |= {n: {0: "batch"} for n in ("pixel_values", "embedding")}
                    axes |= {"logits": {0: "batch", 1: "length"}}
                    torch.onnx.export(
                        module, example, str(out / f"{graph}.onnx"), dynamo=False, opset_version=OPSET,
                        input_names=inputs, output_names=outputs,
                        dynamic_axes={n: a for n, a in axes.items() if n in {*inputs, *outputs}},
                    )  # fmt: skip
                    continue
                converted = openvino.convert_model(module, example_input=example)
            for ports, names in ((converted.inputs, inputs), (converted.outputs, outputs)):
                for port, name in zip(ports, names, strict=True):
                    port.get_tensor().set_names({name})
            converted.reshape(_open_shapes(inputs, example))
            if graph == DECODER:
                _make_stateful(converted)
            openvino.save_model(converted, out / f"{graph}.xml", compress_to_fp16=False)


def _traced(checkpoint: Path, spec: GraphSpec, attention: str) -> tuple[Any, tuple[Any, ...], list[str], list[str]]:
    """A module, an example of its inputs, and the names of inputs and outputs."""
    import torch

    ids = torch.randint(5, 1000, (2, 16))
    names, outputs = [t.name for t in spec.inputs], [t.name for t in spec.outputs]
    if spec.name == "token-classification":
        from transformers import BertForTokenClassification

        bert = BertForTokenClassification.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=attention
        ).eval()

        class Ner(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bert = bert

            def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
                return self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits

        return Ner(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), names, outputs
    if spec.name == DECODER:
        return _decoder(checkpoint, attention)
    towers = _towers(checkpoint)
    if spec.name == "image":
        size = [d for d in spec.inputs[0].shape if isinstance(d, int)]
        return towers.visual, (torch.randn(2, *size),), names, outputs

    class Text(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = towers.text
            self.text.transformer.set_attn_implementation(attention)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.text.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
            return self.text.proj(hidden[:, 0])

    return Text().eval(), (ids, torch.ones_like(ids)), names, outputs


def _towers(checkpoint: Path) -> Any:
    import open_clip

    text = json.loads((checkpoint / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    text |= {"hf_model_name": str(checkpoint.resolve() / "text_config"), "hf_model_pretrained": False}
    return open_clip.create_model(f"local-dir:{checkpoint}", text_cfg=text).eval()


def heads(checkpoint: Path, graph: str) -> tuple[int, int]:
    """Attention heads and hidden size of a text encoder or a tower."""
    if graph == "image":
        trunk = _towers(checkpoint).visual.trunk
        return trunk.blocks[0].attn.num_heads, trunk.embed_dim
    path = checkpoint / ("text_config/config.json" if graph == "text" else "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    return config["num_attention_heads"], config["hidden_size"]


def _decoder(checkpoint: Path, attention: str) -> tuple[Any, tuple[Any, ...], list[str], list[str]]:
    """A step with keys and values of the past going in and out: input_ids, past.0.key, ... -> logits, present.0.key."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM
    from transformers.cache_utils import DynamicLayer

    llama = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=attention).eval()

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = llama

        def forward(self, input_ids: Any, *past: Any) -> tuple[Any, ...]:
            cache = DynamicCache()
            cache.layers = []
            for key, value in zip(past[::2], past[1::2], strict=True):
                layer = DynamicLayer()
                layer.keys, layer.values, layer.is_initialized = key, value, True
                cache.layers.append(layer)
            before, new = past[0].shape[2], input_ids.shape[1]
            positions = torch.arange(before, before + new)
            hidden = torch.arange(before + new)[None, :] > positions[:, None]
            mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
            logits = self.llama(
                input_ids, attention_mask=mask[None, None], position_ids=positions[None], past_key_values=cache
            ).logits
            return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))

    config = llama.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    past = tuple(torch.randn(2, heads, 8, config.head_dim) for _ in range(2 * layers))
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    example = (torch.randint(5, 1000, (2, 16)), *past)
    return Step(), example, ["input_ids", *(f"past.{n}" for n in names)], ["logits", *(f"present.{n}" for n in names)]


def _open_shapes(names: list[str], example: tuple[Any, ...]) -> dict[str, Any]:
    """Batch, length and past dynamic, all else as in the example."""
    import openvino

    shapes = {}
    for name, tensor in zip(names, example, strict=True):
        dynamic = (0,) if name == "pixel_values" else (0, 2) if name.startswith("past") else (0, 1)
        shapes[name] = openvino.PartialShape([-1 if i in dynamic else d for i, d in enumerate(tensor.shape)])
    return shapes


def _make_stateful(converted: openvino.Model) -> None:
    """Keys and values as states, reordered by beam_idx, as optimum-intel does it: the form that OpenVINO fuses."""
    import openvino
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = op.parameter([-1], openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    converted.add_parameters([beams])
    pasts = [port for port in converted.inputs if port.any_name.startswith("past")]
    for port in pasts:
        readers = port.get_target_inputs()
        ordered = op.gather(port, beams, op.constant(0))
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
    converted.validate_nodes_and_infer_types()
    names = {port.any_name: port.any_name.replace("past", "present") for port in pasts}
    apply_make_stateful_transformation(converted, names)
    batch = op.gather(op.shape_of(converted.input("input_ids"), "i64"), op.constant([0]), op.constant(0))
    for node in converted.get_ops():
        if node.get_type_name() == "ReadValue":
            sizes = [d.min_length for d in node.get_output_partial_shape(0)]
            parts = [batch, *(op.constant(np.array([n], np.int64)) for n in sizes[1:])]
            empty = op.broadcast(op.constant(np.float32(0)), op.concat(parts, axis=0))
            node.set_arguments([empty])
    converted.validate_nodes_and_infer_types()
