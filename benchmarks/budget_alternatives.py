"""What published tools make of a model, and how that is run: onnxruntime.quantization and NNCF, as their docs have it.

Each starts from torch's own export of the original model and is calibrated on the items that our builds calibrate on.
How the answers are judged and timed is budget_peers.py's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from budget_exports import DECODER, heads
from budget_models import Model, Questions

from medcompile.backends import Executor
from medcompile.exams.decoder import PAST, DecoderExam, log_likelihoods
from medcompile.exams.text import TextExam
from medcompile.exams.towers import ImageExam
from medcompile.metrics.entities import count_entities
from medcompile.runtime.towers import unit
from medcompile.spec import GraphSpec

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Validation = tuple[int, Callable[[Any, Iterable[Any]], tuple[float, list[float] | None]]]
"""How many items there are, and NNCF's validation_fn: (compiled model, item numbers) -> (score, score of each)."""


@dataclass(frozen=True)
class Alternative:
    """name: as the table tells it. made: the folder of its files, which several may share. settings: OpenVINO's.

    margin: of an accuracy-aware one, what it was allowed to lose; None where it was told nothing.
    """

    name: str
    made: str
    library: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    margin: float | None = None


def alternatives(model: Model) -> list[Alternative]:
    aware = [(f"nncf-aware-{m:g}", f"NNCF accuracy-aware {100 * m:g} %", m) for m in model.margins]
    ort = {"fp32": "exported", "dynamic": "ort-dynamic", "dynamic, per channel": "ort-dynamic-channel"}
    if model.metric == "perplexity":
        ort |= {"int4, block 128": "ort-int4", "int4, block 32": "ort-int4-g32"}
        nncf = [("nncf-ptq", "NNCF PTQ", None), *aware]
        nncf += [(made, f"NNCF {made.removeprefix('nncf-').replace('-', ' ')}", None) for made in WEIGHTS]
    else:
        ort["dynamic, fused, per channel"] = "ort-dynamic-fused"
        ort |= {"static": "ort-static", "static, per channel": "ort-static-channel"}
        nncf = [("nncf-ptq", "NNCF PTQ", None), *aware]
    found = [Alternative(f"ONNX Runtime {name}", made, "onnxruntime") for name, made in ort.items()]
    found += [
        Alternative(f"{name}, {hint}", made, "openvino", {"INFERENCE_PRECISION_HINT": hint}, margin)
        for made, name, margin in [("exported", "OpenVINO", None), *nncf]
        for hint in ("f32", "bf16")
    ]
    return found


# ---- what the tools make


def make(questions: Questions, made: str, exported: Path, out: Path) -> None:
    """One file of every graph into out. exported: export()'s folder. Raises whatever the tool raises."""
    for graph in questions.bundle.graphs:
        MAKERS[made](questions, graph, exported, out)


def _ort_dynamic(per_channel: bool, questions: Questions, graph: str, exported: Path, out: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(exported / f"{graph}.onnx", out / f"{graph}.onnx", per_channel=per_channel)


def _ort_fused(questions: Questions, graph: str, exported: Path, out: Path) -> None:
    """Its transformer optimizer first, which is what makes its own dynamic attention kernel run."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers import optimizer

    with tempfile.TemporaryDirectory() as scratch:
        fused = str(Path(scratch) / "fused.onnx")
        kind = "vit" if graph == "image" else "bert"
        assert questions.places.models is not None
        count, hidden = heads(questions.places.models / questions.model.checkpoint, graph)
        found = optimizer.optimize_model(str(exported / f"{graph}.onnx"), kind, count, hidden)
        print(found.get_fused_operator_statistics())
        found.save_model_to_file(fused)
        options = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
        quantize_dynamic(fused, out / f"{graph}.onnx", per_channel=True, extra_options=options)


def _ort_static(per_channel: bool, questions: Questions, graph: str, exported: Path, out: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(questions.feeds(graph))

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        # Its symbolic shapes come to no end on the exporter's own; the ONNX ones do.
        quant_pre_process(exported / f"{graph}.onnx", prepared, skip_symbolic_shape=True)
        quantize_static(prepared, out / f"{graph}.onnx", Reader(), per_channel=per_channel)


def _ort_blocks(block: int, questions: Questions, graph: str, exported: Path, out: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(str(exported / f"{graph}.onnx"), block_size=block)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out / f"{graph}.onnx"))


def _nncf_ptq(questions: Questions, graph: str, exported: Path, out: Path) -> None:
    import nncf
    import openvino

    dataset, size = _nncf_data(questions, graph)
    model = openvino.Core().read_model(exported / f"{graph}.xml")
    made = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=size)
    openvino.save_model(made, out / f"{graph}.xml")


def _nncf_aware(margin: float, questions: Questions, graph: str, exported: Path, out: Path) -> None:
    """Each graph by itself beside the others in float, as the tool knows one model at a time.

    Perplexity: its logarithm may rise by log(1 + margin), which is the margin.
    """
    import nncf
    import openvino

    dataset, size = _nncf_data(questions, graph)
    count, validate = validation(questions, graph, exported)
    made = nncf.quantize_with_accuracy_control(
        openvino.Core().read_model(exported / f"{graph}.xml"),
        dataset,
        nncf.Dataset(list(range(count))),
        validate,
        max_drop=float(np.log1p(margin)) if graph == DECODER else margin,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=size,
    )
    openvino.save_model(made, out / f"{graph}.xml")


def _nncf_weights(how: Mapping[str, Any], questions: Questions, graph: str, exported: Path, out: Path) -> None:
    import nncf
    import openvino

    settings = dict(how)
    if settings:
        settings["mode"] = nncf.CompressWeightsMode.INT4_ASYM
        if settings.pop("data", False):
            settings["dataset"], _ = _nncf_data(questions, graph)
        if settings.pop("adjust", False):  # 688 inputs are no multiple of 128 or 32
            mode = nncf.GroupSizeFallbackMode.ADJUST
            settings["advanced_parameters"] = nncf.AdvancedCompressionParameters(group_size_fallback_mode=mode)
    made = nncf.compress_weights(openvino.Core().read_model(exported / f"{graph}.xml"), **settings)
    openvino.save_model(made, out / f"{graph}.xml")


def _nncf_data(questions: Questions, graph: str) -> tuple[Any, int]:
    import nncf

    if graph == DECODER:
        one = np.zeros(1, np.int32)
        exam = questions.exam(graph, questions.calibration)
        assert isinstance(exam, DecoderExam)
        feeds: list[Any] = [{"input_ids": ids[None, :512], "beam_idx": one} for ids in exam.ids]
    else:
        feeds = [dict(f) for f in questions.feeds(graph)]
    return nncf.Dataset(feeds), len(feeds)


_AWQ = {"adjust": True, "data": True, "awq": True}
WEIGHTS: dict[str, Mapping[str, Any]] = {
    "nncf-weights-int8": {},
    "nncf-weights-int4": {"group_size": 128, "adjust": True},
    "nncf-weights-int4-g32": {"group_size": 32, "adjust": True},
    "nncf-weights-int4-awq": {"group_size": 128, **_AWQ},
    "nncf-weights-int4-awq-g32": {"group_size": 32, **_AWQ},
    "nncf-weights-int4-awq-scales": {"group_size": 128, "scale_estimation": True, **_AWQ},
    "nncf-weights-int4-awq-scales-g32": {"group_size": 32, "scale_estimation": True, **_AWQ},
}
MAKERS: dict[str, Callable[[Questions, str, Path, Path], None]] = {
    "ort-dynamic": functools.partial(_ort_dynamic, False),
    "ort-dynamic-channel": functools.partial(_ort_dynamic, True),
    "ort-dynamic-fused": _ort_fused,
    "ort-static": functools.partial(_ort_static, False),
    "ort-static-channel": functools.partial(_ort_static, True),
    "ort-int4": functools.partial(_ort_blocks, 128),
    "ort-int4-g32": functools.partial(_ort_blocks, 32),
    "nncf-ptq": _nncf_ptq,
    **{f"nncf-aware-{m:g}": functools.partial(_nncf_aware, m) for m in (0.001, 0.005, 0.01, 0.02)},
    **{name: functools.partial(_nncf_weights, how) for name, how in WEIGHTS.items()},
}
"""What is made -> how, of one graph."""


# ---- what NNCF's accuracy control asks on the tuning data


def validation(questions: Questions, graph: str, exported: Path) -> Validation:
    """Entity F1, accuracy beside the other tower in float, or the mean log-likelihood of a token."""
    if graph == "text":  # told by how its classes fit the images
        return _zero_shot(questions, graph, exported)
    exam = questions.exam(graph, questions.tuning)
    if isinstance(exam, ImageExam):
        return _zero_shot(questions, graph, exported)
    if isinstance(exam, DecoderExam):
        return len(exam.ids), functools.partial(_likelihood, exam)
    assert isinstance(exam, TextExam)
    return len(exam.asked), functools.partial(_f1, exam)


def _f1(exam: TextExam, compiled: Any, numbers: Iterable[int]) -> tuple[float, None]:
    some = replace(exam, asked=tuple(exam.asked[i] for i in numbers))
    found = some.answers({exam.spec.name: OpenVino(compiled, exam.spec)}).values
    gold = some.key.gold
    assert gold is not None
    counts = count_entities(list(gold), list(found), np.zeros(len(gold), np.int64), exam.labels)
    whole = counts.gold.sum() + counts.predicted.sum()
    return (2 * float(counts.right.sum()) / float(whole) if whole else 1.0), None


def _zero_shot(questions: Questions, graph: str, exported: Path) -> Validation:
    exam = questions.exam("image", questions.tuning)
    assert isinstance(exam, ImageExam)
    gold = np.asarray(exam.key.gold)
    specs, other = questions.bundle.graphs, "text" if graph == "image" else "image"
    plain = load(Alternative("", "", "openvino", {"INFERENCE_PRECISION_HINT": "f32"}), exported, specs, None)[other]
    if graph == "image":
        pixels = [feeds["pixel_values"] for feeds in exam.feeds(1)]
        towers = exam.towers({"text": plain})
        classes = towers.classes(exam.prompts)
    else:
        embeddings = exam.answers({"image": plain}).values

    def right(compiled: Any, numbers: Iterable[int]) -> tuple[float, list[float]]:
        asked = list(numbers)
        mine = OpenVino(compiled, specs[graph])
        if graph == "image":
            images = np.concatenate([mine.run({"pixel_values": pixels[i]})["embedding"] for i in asked])
            scores = towers.scores(unit(images), classes)
        else:
            both = exam.towers({"text": mine})
            scores = both.scores(np.stack([embeddings[i] for i in asked]), both.classes(exam.prompts))
        found = [float(row.argmax() == gold[i]) for i, row in zip(asked, scores, strict=True)]
        return sum(found) / len(found), found

    return len(exam.items), right


def _likelihood(exam: DecoderExam, compiled: Any, numbers: Iterable[int]) -> tuple[float, list[float]]:
    mine = OpenVinoDecoder(compiled, exam.spec)
    sums, means = [], []
    for i in numbers:
        ids = exam.ids[i][:512]
        log = log_likelihoods(mine.run({"input_ids": ids})["logits"][:-1])
        told = np.take_along_axis(log, ids[1:, None], axis=1)
        sums.append((float(told.sum()), len(told)))
        means.append(float(told.mean()))
    return sum(s for s, _ in sums) / sum(n for _, n in sums), means


# ---- run


class Timed(Executor):
    """An executor that is timed. timed(): what one run needs beforehand, which is not timed, and the run."""

    def timed(self, sizes: Mapping[str, int]) -> tuple[Callable[[], object], Callable[[], object]]:
        """sizes: of the dynamic axes."""
        feeds = ones(self.spec, sizes)
        return (lambda: None), (lambda: self.run(feeds))

    def close(self) -> None:
        """They live as long as the process."""


def ones(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, Array]:
    """As verify.latency_ms() feeds it."""
    return {t.name: np.ones([sizes[d] if isinstance(d, str) else d for d in t.shape], t.dtype) for t in spec.inputs}


class OnnxRuntime(Timed):
    def __init__(self, session: Any, spec: GraphSpec) -> None:
        super().__init__(spec)
        self._session = session
        self._names = {i.name for i in session.get_inputs()}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        names = [tensor.name for tensor in self.outputs]
        values = self._session.run(names, {n: a for n, a in feeds.items() if n in self._names})
        return dict(zip(names, values, strict=True))


class OpenVino(Timed):
    def __init__(self, compiled: Any, spec: GraphSpec) -> None:
        super().__init__(spec)
        self._request = compiled.create_infer_request()
        self._names = {name for port in compiled.inputs for name in port.names}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        found = self._request.infer({n: a for n, a in feeds.items() if n in self._names}, share_inputs=True)
        return {tensor.name: found[tensor.name] for tensor in self.outputs}


class OnnxRuntimeDecoder(Timed):
    """input_ids [tokens] -> logits [tokens, vocabulary] of a sequence of its own."""

    def __init__(self, session: Any, spec: GraphSpec) -> None:
        super().__init__(spec)
        self._session = session
        self._past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past")}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        return {"logits": self._step(feeds["input_ids"][None], self._held(1, 0), ["logits"])[0][0]}

    def timed(self, sizes: Mapping[str, int]) -> tuple[Callable[[], object], Callable[[], object]]:
        count = sizes["sequences"]
        past, ids = self._held(count, PAST), np.ones((count, 1), np.int64)
        return (lambda: None), (lambda: self._step(ids, past, None))

    def _held(self, count: int, length: int) -> dict[str, Array]:
        return {n: np.zeros((count, s[1], length, s[3]), np.float32) for n, s in self._past.items()}

    def _step(self, ids: Array, past: Feeds, names: list[str] | None) -> list[Array]:
        found: list[Array] = self._session.run(names, {"input_ids": ids, **past})
        return found


class OpenVinoDecoder(Timed):
    """The same of a model that keeps keys and values as states."""

    def __init__(self, compiled: Any, spec: GraphSpec) -> None:
        super().__init__(spec)
        self._request = compiled.create_infer_request()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        self._request.reset_state()
        return {"logits": self._step(feeds["input_ids"][None])[0].copy()}

    def timed(self, sizes: Mapping[str, int]) -> tuple[Callable[[], object], Callable[[], object]]:
        count = sizes["sequences"]
        one = np.ones((count, 1), np.int64)

        def prepare() -> None:
            self._request.reset_state()
            self._step(np.ones((count, PAST), np.int64))

        return prepare, lambda: self._step(one)

    def _step(self, ids: Array) -> Array:
        found = self._request.infer({"input_ids": ids, "beam_idx": np.arange(len(ids), dtype=np.int32)})
        logits: Array = found["logits"]
        return logits


def load(
    alternative: Alternative, folder: Path, specs: Mapping[str, GraphSpec], threads: int | None
) -> dict[str, Timed]:
    """Every graph of it. threads None: as many as the library takes."""
    found: dict[str, Timed] = {}
    for graph, spec in specs.items():
        if alternative.library == "onnxruntime":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = threads or 0, 3
            session = onnxruntime.InferenceSession(folder / f"{graph}.onnx", options, ["CPUExecutionProvider"])
            found[graph] = (OnnxRuntimeDecoder if graph == DECODER else OnnxRuntime)(session, spec)
        else:
            import openvino

            settings = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False, **alternative.settings}
            settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
            if graph == DECODER:  # else keys and values are rounded to 8 bits, which no exam of fresh texts sees
                settings["KV_CACHE_PRECISION"] = settings["INFERENCE_PRECISION_HINT"]
            compiled = openvino.Core().compile_model(folder / f"{graph}.xml", "CPU", settings)
            found[graph] = (OpenVinoDecoder if graph == DECODER else OpenVino)(compiled, spec)
    return found


def files(alternative: Alternative, folder: Path, graph: str) -> list[Path]:
    ends = (".onnx", ".onnx.data") if alternative.library == "onnxruntime" else (".xml", ".bin")
    return [path for end in ends if (path := folder / f"{graph}{end}").is_file()]


def fingerprint(alternative: Alternative, folder: Path, graphs: Iterable[str]) -> str:
    """Equal for those that compute the same: OpenVINO's files tell in .xml what NNCF was asked, too."""
    digest = hashlib.sha256(json.dumps([alternative.library, dict(alternative.settings)]).encode())
    for path in (path for graph in graphs for path in files(alternative, folder, graph)):
        whole = path.read_bytes()
        digest.update(b"%d" % whole.count(b"<layer ") if path.suffix == ".xml" else whole)
    return digest.hexdigest()
