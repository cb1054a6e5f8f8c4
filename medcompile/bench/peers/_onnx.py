"""Our own ONNX export of the checkpoint, and ONNX Runtime's way of running one: for its contenders and OpenVINO's.

The export is the one that ONNX Runtime's optimizer fuses best: TorchScript's, with eager attention. Exports by dynamo
or with scaled_dot_product_attention lose its fused Attention.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medcompile.bench.peer import Array, Job, Note
from medcompile.bench.peers import _torch
from medcompile.bench.peers._runner import FunctionRunner, array_runner

INSTALL = 'pip install "medcompile[cpu]"'
MODULES = {"onnxruntime": INSTALL, "onnx": _torch.INSTALL, "torch": _torch.INSTALL, "transformers": _torch.INSTALL}
_FUSIONS = "fusions.json"


def export(job: Job, path: Path, dtype: str = "float32") -> Path:
    """Write the graph of load()'s module to path, every axis dynamic but those of an image."""
    import torch

    module = _torch.load(job, attention="eager").to(getattr(torch, dtype))
    names = _torch.inputs(job)
    axes: dict[str, dict[int, str]]
    if job.task == "image":
        example: tuple[Any, ...] = (torch.randn(2, 3, *_edges(job, module), dtype=getattr(torch, dtype)),)
        axes = {names[0]: {0: "batch"}}
    else:
        ids, mask = torch.ones((2, 16), dtype=torch.int64), torch.ones((2, 16), dtype=torch.int64)
        mask[1, 9:] = 0  # without padding in the example, transformers may leave the mask out of the graph
        tensors = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        tensors["mask_position"] = torch.tensor([1, 2])
        example = tuple(tensors[name] for name in names)
        axes = {name: {0: "batch", 1: "sequence"} for name in names}
        if job.task == "fill-mask":
            axes["mask_position"] = {0: "batch"}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # tracing warns of every shape that it takes for constant; none is
        torch.onnx.export(
            module,
            example,
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=list(names),
            output_names=["values"],
            dynamic_axes={**axes, "values": {0: "batch", 1: "sequence"} if _per_token(job) else {0: "batch"}},
        )
    return path


def optimize(job: Job, path: Path, out: Path) -> None:
    """ONNX Runtime's optimizer for transformers, from path to out; what it fused goes into a file beside it."""
    from onnxruntime.transformers import optimizer

    kind, heads, hidden = "clip", 0, 0
    if job.family == "bert":  # it does not find these out by itself, and then fuses no attention
        config = json.loads((Path(job.source) / "config.json").read_text(encoding="utf-8"))
        kind, heads, hidden = "bert", int(config["num_attention_heads"]), int(config["hidden_size"])
    made = optimizer.optimize_model(str(path), model_type=kind, num_heads=heads, hidden_size=hidden)
    made.save_model_to_file(str(out))
    fused = {name: count for name, count in made.get_fused_operator_statistics().items() if count}
    (out.parent / _FUSIONS).write_text(json.dumps(fused), encoding="utf-8")


def quantize_dynamic(path: Path, out: Path) -> None:
    """ONNX Runtime's dynamic int8: weights per channel, activations as they come; MatMul, Gemm and fused Attention."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    quantize(
        str(path),
        str(out),
        per_channel=True,
        reduce_range=False,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Attention"],
        # Shapes are not inferred through fused operators; without a default type it stops there.
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def runner(job: Job, path: Path, notes: Mapping[str, Note], providers: tuple[Any, ...] = ()) -> FunctionRunner:
    """A session over path. Settings: as many threads as the job has, everything else by default."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = session_options(job)
    session = onnxruntime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}

    def call(feeds: Mapping[str, Array]) -> Array:
        result: Array = session.run(None, {name: array for name, array in feeds.items() if name in names})[0]
        return result

    fusions = path.parent / _FUSIONS
    if fusions.is_file():
        found = json.loads(fusions.read_text(encoding="utf-8"))
        notes = {**notes, "fused": ", ".join(f"{k} {v}" for k, v in found.items()) or "nothing"}
    return array_runner(call, {"threads": job.threads, **notes})


def session_options(job: Job) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = job.threads, 3
    return options


def _per_token(job: Job) -> bool:
    return job.task == "token-classification"


def _edges(job: Job, module: Any) -> tuple[int, int]:
    """Height and width that an image tower takes."""
    model = module.model
    size = model.visual.image_size if _torch.is_open_clip(job) else model.config.vision_config.image_size
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
