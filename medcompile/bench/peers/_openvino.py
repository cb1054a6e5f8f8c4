"""OpenVINO over our export of the checkpoint: in floating point, or after NNCF's quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medcompile.bench.peer import Array, Job, Missing, Note, Peer, calibration_feeds
from medcompile.bench.peers import _onnx, _torch
from medcompile.bench.peers._runner import FunctionRunner, array_runner

INSTALL = 'pip install "medcompile[openvino]"'
MODULES = {"openvino": INSTALL, "torch": _torch.INSTALL, "transformers": _torch.INSTALL, "onnx": _torch.INSTALL}
NNCF_MODULES = {**MODULES, "nncf": "pip install nncf"}
FLOAT_FILE, INT8_FILE = "model.onnx", "int8.xml"
_CALIBRATED_ON = 300  # NNCF's own default of items that it looks at


class FloatPeer(Peer):
    """Our export. hint: the precision to run it in, by OpenVINO's name."""

    tasks = _torch.TASKS
    modules = MODULES
    engine = "openvino"
    hint = "f32"

    def prepare(self, job: Job) -> None:
        _onnx.export(job, Path(job.work) / FLOAT_FILE)

    def open(self, job: Job) -> FunctionRunner:
        return latency_runner(job, Path(job.work) / FLOAT_FILE, self.hint, {})


class NncfPeer(Peer):
    """Our export after nncf.quantize with its preset for transformers. Needs calibration data."""

    tasks = _torch.TASKS
    modules = NNCF_MODULES
    engine = "openvino"
    precision = "int8"
    float_precision = "bfloat16"

    def missing(self, job: Job) -> Missing | None:
        found = super().missing(job)
        if found is None and not job.calibration:
            return Missing("there is no calibration data for this model", fix="bench a recipe that has calibration")
        return found

    def prepare(self, job: Job) -> None:
        import nncf
        import openvino

        exported = _onnx.export(job, Path(job.work) / "export.onnx")
        model = openvino.Core().read_model(exported)
        names = {name for i in model.inputs for name in i.get_names()}
        items = [{k: v for k, v in feeds.items() if k in names} for feeds in calibration_feeds(job)]
        quantized = nncf.quantize(
            model,
            nncf.Dataset(items),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=min(len(items), _CALIBRATED_ON),
        )
        openvino.save_model(quantized, Path(job.work) / INT8_FILE, compress_to_fp16=False)
        exported.unlink()


def compiled(job: Job, path: Path, hint: str, precision: str) -> Any:
    """The model for the CPU, in so many threads, not pinned: which cores there are is the harness's business."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": hint,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    return openvino.Core().compile_model(str(path), "CPU", settings)


def facts(model: Any, notes: Mapping[str, Note]) -> dict[str, Note]:
    """What OpenVINO made of the settings: bf16 asked for becomes f32 on a CPU without it."""
    precision = model.get_property("INFERENCE_PRECISION_HINT").to_string()
    return {
        "threads": int(model.get_property("INFERENCE_NUM_THREADS")),
        "streams": int(model.get_property("NUM_STREAMS")),
        "float_precision": {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(precision, precision),
        **notes,
    }


def latency_runner(job: Job, path: Path, precision: str, notes: Mapping[str, Note]) -> FunctionRunner:
    """One request at a time over all threads."""
    model = compiled(job, path, "LATENCY", precision)
    request = model.create_infer_request()
    names = input_names(model)

    def call(feeds: Mapping[str, Array]) -> Array:
        given = {name: array for name, array in feeds.items() if name in names}
        result: Array = request.infer(given, share_inputs=True)[0]
        return result

    return array_runner(call, facts(model, {"hint": "LATENCY", **notes}))


def input_names(model: Any) -> set[str]:
    return {name for i in model.inputs for name in i.get_names()}
