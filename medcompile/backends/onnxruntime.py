"""ONNX Runtime on a CPU, and on an NVIDIA GPU through its CUDA and its TensorRT-RTX execution provider.

For a CPU, build() rewrites the typed graph into ONNX Runtime's fused operators (medcompile/rewrites says how), lets
the library fold and fuse what it knows, and stores the result, so that load() only maps a file and packs weights.
For a GPU it copies the typed graph: what to fuse is the provider's business there, but for a decoder's attention, of
which CUDA has an operator in float16 and bfloat16. The library would run on the CPU with no more than a warning
whatever a provider can't load or doesn't know; here either is an error.

What the library would decide by itself on a CPU is named in the variant's compute settings:

    accuracy_level  4 (unless said): weights that alone are quantized meet activations rounded to int8, block by block;
                    1: float32 ones
    kernels         medcompile (where it was installed with its compiled kernels, unless said): our own are a decoder's
                    attention, products of dynamic int8, those of int4 and int8 blocks at accuracy_level 4, and the
                    attention of an encoder that has such products; onnxruntime: the library's operators alone
    kv              bfloat16: our own attention keeps keys and values in it; all else: float32
    attention       bfloat16 (unless said): an encoder's own attention rounds to it, where the processor has products
                    of it; float32

The GPU half was tested up to its refusals; nothing of it has run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medcompile.backends import Built, Executor, check_feeds, is_paged
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.resources import available_cores
from medcompile.spec import GraphSpec, Scalar, Target, Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import onnxruntime as ort

    from medcompile.kernels.launches import Float
    from medcompile.runtime.decoder import StepModel

    Array = np.ndarray[Any, Any]

# Fusions of the library that make a CPU slower: SkipLayerNormalization and BiasGelu are scalar loops there, eight and
# two times as slow as the vectorised Add, LayerNormalization and Gelu that they replace (ONNX Runtime 1.31).
_SLOWER = ("SkipLayerNormFusion", "BiasGeluFusion", "EmbedLayerNormFusion")
_CPU = "CPUExecutionProvider"
_CUDA = "onnxruntime-cuda"
_CUDA_DECODER = "cuda_decoder.onnx"
_NATIVE, _NATIVE_DECODER = "native.onnx", "native_decoder.onnx"
"""The files of a decoder for CUDA, and of graphs with our own kernels: names tell what a session must know."""
_OWN = "medcompile"
_PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention", "PagedAttention"}
"""What a GPU is there for. Small arithmetic on shapes may well stay on the CPU."""


@dataclass(frozen=True)
class Provider:
    """An execution provider for GPUs, and the package that brings it in place of plain onnxruntime."""

    name: str
    install: str


_PROVIDERS = {
    _CUDA: Provider("CUDAExecutionProvider", 'pip uninstall onnxruntime, then pip install "medcompile[gpu]"'),
    "onnxruntime-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "pip uninstall onnxruntime, then pip install onnxruntime-trt-rtx"
    ),
}


class OnnxRuntimeBackend:
    name = "onnxruntime"
    targets = ("onnxruntime-cpu", *_PROVIDERS)

    def probe(self, target: str) -> Target:
        ort = _library()
        device, arch = "cpu", platform.machine()
        if provider := _PROVIDERS.get(target):
            if provider.name not in (there := ort.get_available_providers()):
                raise BackendUnavailable(
                    f"onnxruntime {ort.__version__} here has no {provider.name}; it has {', '.join(there)}",
                    fix=provider.install,
                )
            from medcompile.backends import _cuda

            device, arch = "cuda", _cuda.open_cuda().device().arch
        return Target(target, self.name, device, arch, platform.system().lower(), ort.__version__)

    def build(self, onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Built:
        """Write out/model.onnx and out/weights.bin: the fused graph, free of anything that depends on this machine.

        For a GPU the typed graph, which is tried on the device at once.
        """
        from medcompile import onnx_files
        from medcompile.kernels import native
        from medcompile.rewrites import native as native_dialect
        from medcompile.rewrites import onnxruntime as dialect
        from medcompile.rewrites import onnxruntime_decoder, onnxruntime_paged

        ort = _library()
        model = onnx_files.load(onnx_path)
        if target.name in _PROVIDERS:
            if is_paged(spec):
                return self._build_cuda_decoder(model, variant, target, out)
            onnx_files.save({"model": model}, out)
            self.load(out / "model.onnx", spec, variant, target, None).close()
            return Built("model.onnx", target, tuple(_notes(variant)))
        settings = _settings(variant, paged=is_paged(spec))
        counts: dict[str, int] = {}
        if settings["kernels"] == _OWN:
            kv, bfloat16 = cast("Float", settings.get("kv", "float32")), settings.get("attention") == "bfloat16"
            counts |= native_dialect.rewrite(model, products=settings["accuracy_level"] == 4, kv=kv, bfloat16=bfloat16)
        own = bool(counts)
        counts |= dialect.rewrite(model) | onnxruntime_paged.rewrite(model)
        if is_paged(spec):
            counts |= onnxruntime_decoder.rewrite(model)
        options = ort.SessionOptions()
        if own:
            options.register_custom_ops_library(_own_library())
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(out / "model.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(settings["accuracy_level"]))
        options.intra_op_num_threads = 1
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            onnx_files.save({spec.name: model}, Path(scratch))
            _session(Path(scratch) / f"{spec.name}.onnx", options, disabled=_SLOWER)
        file = "model.onnx"
        if own:
            file = (out / "model.onnx").rename(out / (_NATIVE_DECODER if is_paged(spec) else _NATIVE)).name
        else:
            _forget_domain(out / "model.onnx", native.DOMAIN)
        fused = ", ".join(f"{count} {form}" for form, count in counts.items())
        # The library fuses weights alone into a product that has this setting.
        if not own:
            settings.pop("attention", None)
        named = tuple(f"{name}={value}" for name, value in settings.items()) if own or variant.any_weight_only else ()
        return Built(file, target, (f"fused: {fused}", *named, *_notes(variant, *settings)))

    def _build_cuda_decoder(self, model: ir.Model, variant: Variant, target: Target, out: Path) -> Built:
        """Write out/cuda_decoder.onnx, and try it on the device with pools of one block."""
        from medcompile import onnx_files
        from medcompile.rewrites.onnxruntime_cuda import rewrite_attention

        if target.name != _CUDA:
            raise BackendError(
                f"{_PROVIDERS[target.name].name} has no paged attention", fix=f"leave out target {target.name}"
            )
        count = rewrite_attention(model, cast("Float", str(variant.float_dtype)))
        onnx_files.save({_CUDA_DECODER.removesuffix(".onnx"): model}, out)
        self.load_decoder(out / _CUDA_DECODER, variant, None, 1).close()
        return Built(_CUDA_DECODER, target, (f"fused: {count} PagedAttention", *_notes(variant)))

    def load(
        self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None
    ) -> OnnxRuntimeExecutor:
        options = _load_options(threads)
        if provider := _PROVIDERS.get(target.name):
            settings = {} if target.name == _CUDA else _profile_options(spec)
            return OnnxRuntimeExecutor(_session_on_gpu(path, options, provider, spec.name, settings), spec)
        if path.name == _NATIVE:
            options.register_custom_ops_library(_own_library())
        return OnnxRuntimeExecutor(_session(path, options), spec)

    def load_streams(
        self, path: Path, spec: GraphSpec, variant: Variant, target: Target, streams: int
    ) -> OnnxRuntimeExecutor:
        """A session without threads of its own runs in its caller's, whatever their number."""
        return self.load(path, spec, variant, target, 1)

    def load_decoder(self, path: Path, variant: Variant, threads: int | None, blocks: int) -> StepModel:
        """The decoder that build() made of a paged graph, with pools of so many blocks."""
        options = _load_options(threads)
        if path.name == _CUDA_DECODER:
            from medcompile.backends import _cuda
            from medcompile.backends._onnxruntime_paged_cuda import OnnxRuntimeCudaStepModel

            cuda = _cuda.open_cuda()
            session = _session_on_gpu(path, options, _PROVIDERS[_CUDA], "generate", {})
            return OnnxRuntimeCudaStepModel(session, cuda, blocks=blocks)
        if path.name == _NATIVE_DECODER:
            from medcompile.backends._onnxruntime_native import OnnxRuntimeNativeStepModel

            options.register_custom_ops_library(_own_library())
            return OnnxRuntimeNativeStepModel(_session(path, options), blocks=blocks)
        from medcompile.backends._onnxruntime_paged import OnnxRuntimeStepModel

        return OnnxRuntimeStepModel(_session(path, options), blocks=blocks)


class OnnxRuntimeExecutor(Executor):
    """One session; ONNX Runtime's run() may be called from many threads at once."""

    def __init__(self, session: ort.InferenceSession, spec: GraphSpec) -> None:
        self._session: ort.InferenceSession | None = session
        super().__init__(spec)
        self._names = [tensor.name for tensor in spec.outputs]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self.spec, feeds)
        session = self._session
        if session is None:
            raise self.closed()
        try:
            values = session.run(self._names, dict(feeds))
        except _errors() as error:
            raise BackendError(f"{self.spec.name}: ONNX Runtime failed: {_first_line(error)}") from error
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        self._session = None


def _settings(variant: Variant, *, paged: bool) -> dict[str, Scalar]:
    """Every setting of the CPU half, as the variant names it or as the text above says. paged: for a decoder."""
    from medcompile.kernels import native

    settings: dict[str, Scalar] = {"accuracy_level": 4}
    settings["kernels"] = _OWN if native.available() else "onnxruntime"
    choices: dict[str, tuple[Scalar, ...]] = {"accuracy_level": (1, 4), "kernels": (_OWN, "onnxruntime")}
    if not paged:
        settings["attention"] = "bfloat16"
        choices["attention"] = ("bfloat16", "float32")
    for name, allowed in choices.items():
        settings[name] = variant.compute.get(name, settings[name])
        if settings[name] not in allowed:
            raise BackendError(
                f"variant {variant.name}: compute.{name} is {settings[name]!r}",
                fix=f"choose {' or '.join(map(str, allowed))}",
            )
    if paged and settings["kernels"] == _OWN:
        settings["kv"] = "bfloat16" if variant.compute.get("kv") == "bfloat16" else "float32"
    return settings


def _own_library() -> str:
    """Raises BackendUnavailable where it was not compiled."""
    from medcompile.kernels import native

    return str(native.library())


def _load_options(threads: int | None) -> ort.SessionOptions:
    """Of a graph that build() optimized. threads None: every core the process may use."""
    ort = _library()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    return options


def _forget_domain(path: Path, domain: str) -> None:
    """Leave a stored graph as a process stores it that never knew of domain: the library lists all that it has met."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    kept = [entry for entry in model.opset_import if entry.domain != domain]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            f"onnxruntime cannot be imported: {error}", fix='pip install "medcompile[cpu]"'
        ) from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _session(
    path: Path,
    options: ort.SessionOptions,
    disabled: Sequence[str] = (),
    providers: Sequence[str | tuple[str, dict[str, str]]] = (_CPU,),
) -> ort.InferenceSession:
    """A session on those providers, the CPU alone unless said. Raises BackendError where the library refuses the file
    or leaves a provider out."""
    ort = _library()
    try:
        session = ort.InferenceSession(
            str(path), options, providers=list(providers), disabled_optimizers=list(disabled), enable_fallback=0
        )
    except _errors() as error:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} refuses {path.name}: {_first_line(error)}",
            fix="build the bundle again with this version of onnxruntime, or choose another target",
        ) from error
    wanted = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    if session.get_providers() != wanted:
        raise BackendError(
            f"{path.name} was placed on {', '.join(session.get_providers())}, not on {wanted[0]}",
            fix="ONNX Runtime's warnings above say which library of CUDA it misses; or choose another target",
        )
    return session


def _session_on_gpu(
    path: Path, options: ort.SessionOptions, provider: Provider, graph: str, settings: dict[str, str]
) -> ort.InferenceSession:
    """A session whose matrix products all run on the GPU. Raises BackendError where one would not."""
    ort = _library()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 2  # the warnings say why a provider could not be loaded
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it did not find
            ort.preload_dlls()
    records = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
    if records:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = _session(path, options, providers=[(provider.name, settings), _CPU])
    if records and (left := _products_on_cpu(session)):
        raise BackendError(
            f"{provider.name} leaves {len(left)} matrix products of {graph} to the CPU, {left[0]} first",
            fix="leave this variant out of the target, or choose another target",
        )
    return session


def _products_on_cpu(session: ort.InferenceSession) -> list[str]:
    return [
        node.name
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _CPU
        for node in part.get_nodes()
        if node.op_type in _PRODUCTS
    ]


def _profile_options(spec: GraphSpec) -> dict[str, str]:
    """The range of every input over all profiles, so that the provider builds one engine and not one for each shape."""

    def shapes(end: str, choose: Callable[[list[int]], int]) -> str:
        words = []
        for tensor in spec.inputs:
            sizes = [
                dim if isinstance(dim, int) else choose([getattr(p.axis(dim), end) for p in spec.profiles])
                for dim in tensor.shape
            ]
            words.append(f"{tensor.name}:{'x'.join(map(str, sizes))}")
        return ",".join(words)

    if not spec.profiles:
        return {}
    ends = {"min": min, "opt": max, "max": max}
    return {f"nv_profile_{end}_shapes": shapes(end, choose) for end, choose in ends.items()}


def _errors() -> tuple[type[Exception], ...]:
    """Every exception the library raises. They share no base, so they are gathered by where they live."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _notes(variant: Variant, *used: str) -> list[str]:
    ignored = [f"{name}={value}" for name, value in sorted(variant.compute.items()) if name not in used]
    return [f"ONNX Runtime has no use for compute {', '.join(ignored)}"] if ignored else []


BACKEND = OnnxRuntimeBackend()
