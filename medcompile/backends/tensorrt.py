"""TensorRT and TensorRT-RTX: engines for NVIDIA GPUs. TensorRT-RTX also builds where there is none.

build() checks the typed graph, has the library build it in a process of its own (_tensorrt_job.py), and holds the
engine's layer table against the graph (_tensorrt_report.py): an int8 product that is not computed in int8 is a failed
build. load() checks in words that a plan fits this machine and hands it to _tensorrt_executor.py.

Precision is the graph's business; what the library would else decide by itself is named in compute:

    compute_capability   GPUs to build for, as "80,89,120" (TensorRT-RTX only; unless said: 8.0 and all later ones)
    workspace_mb         memory that a kernel may take for its own (unless said: the library's default)
    tf32                 true to let float32 products drop 13 bits of their inputs (false unless said)
    version_compatible   true for a plan that later versions of the library run (where it can; false unless said)
    timing_cache         true to keep kernel timings for the next build (where the library times; false unless said)
    build_timeout_s      1800 (unless said)
    kv                   what a decoder's keys and values are kept in: float16, bfloat16 or float32 (unless said: in
                         what the variant computes in)
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medcompile.backends import Built, Executor
from medcompile.errors import BackendError, BackendUnavailable, UsageError
from medcompile.spec import ABSENT, GraphSpec, Scalar, Target, Variant

if TYPE_CHECKING:
    import onnx_ir as ir

    from medcompile.backends._cuda import Device
    from medcompile.backends._tensorrt_decoder import TensorRtStepModel
    from medcompile.backends._tensorrt_job import Outcome
    from medcompile.backends._tensorrt_report import Product
    from medcompile.kernels.compiled import Kernels
    from medcompile.kernels.launches import Float

log = logging.getLogger(__name__)

PLAN = "engine.plan"
LAYERS = "layers.json"
KERNELS = "kernels"
"""The folder of a decoder's attention kernels as PTX: what its plan holds as well."""
_SHOWN_LINES = 8
_POOL = "k_pool."
# What TensorRT-RTX builds for unless told: this compute capability and, by compilation on the GPU, all later ones.
_OLDEST, _OLDEST_WITH_FLOAT8 = 80, 89


@dataclass(frozen=True)
class Library:
    """One of the two. words: its name; install: how to get it; needs_gpu: whether building takes one."""

    module: str
    words: str
    install: str
    needs_gpu: bool


_LIBRARIES = {
    "tensorrt-rtx": Library("tensorrt_rtx", "TensorRT-RTX", 'pip install "medcompile[rtx]"', False),
    "tensorrt": Library(
        "tensorrt",
        "TensorRT",
        "pip install tensorrt (it fetches its libraries from NVIDIA while it is installed, which fails behind a "
        "closed network: then install NVIDIA's package for your system, or build for tensorrt-rtx)",
        True,
    ),
}
_DEFAULTS: Mapping[str, Scalar] = {
    "compute_capability": "",
    "workspace_mb": 0,
    "tf32": False,
    "version_compatible": False,
    "timing_cache": False,
    "build_timeout_s": 1800,
    "kv": "",
}
# EngineInvalidityDiagnostics, by name, in words.
_DIAGNOSES = {
    "VERSION_MISMATCH": "it was built by another version of the library",
    "UNSUPPORTED_CC": "it was not built for this GPU",
    "OLD_CUDA_DRIVER": "the GPU's driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime here is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little free memory for it",
    "MALFORMED_ENGINE": "it is damaged, or no plan at all",
    "CUDA_ERROR": "CUDA failed",
}


class TensorRtBackend:
    name = "tensorrt"
    targets = tuple(_LIBRARIES)

    def probe(self, target: str) -> Target:
        """arch is the first visible GPU's (sm_89), or none: TensorRT-RTX then builds here, but runs nothing."""
        library = _LIBRARIES[target]
        version = str(_module(library).__version__)
        try:
            arch = _device().arch
        except BackendUnavailable as error:
            if library.needs_gpu:
                raise BackendUnavailable(
                    f"{library.words} builds on the GPU that it builds for: {error.message}",
                    fix=f"{error.fix}; or build for tensorrt-rtx, which takes no GPU to build",
                ) from error
            arch = ABSENT
        return Target(target, self.name, "cuda", arch, _system(), version)

    def build(self, onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Built:
        """Write out/engine.plan and out/layers.json. The plan runs on what Built.target.arch says."""
        engine = build_engine(onnx_path, spec, variant, target, out)
        products = f"linear layers: {engine.products}" if engine.products else "no linear layers"
        unseen = () if target.present else ("built without a GPU",)
        return Built(PLAN, replace(target, arch=engine.arch), (products, *engine.notes, *unseen))

    def load(self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None) -> Executor:
        trt = _fitting(path, variant, target)
        from medcompile.backends._tensorrt_executor import load_engine

        executor: Executor = load_engine(path, spec, trt)
        return executor

    def load_decoder(self, path: Path, variant: Variant, threads: int | None, blocks: int) -> TensorRtStepModel:
        """The decoder that build() made of a paged graph, with pools of blocks, or as many as its profiles hold."""
        try:
            table = json.loads(path.with_name(LAYERS).read_text(encoding="utf-8"))
            target, profiles = Target(**table["target"]), table["profiles"]
        except (OSError, ValueError, KeyError) as error:
            raise BackendError(
                f"{path.name} has no {LAYERS} beside it that says what it was built for", fix="rebuild the bundle"
            ) from error
        trt = _fitting(path, variant, target, paged=True)
        from medcompile.backends._tensorrt_decoder import load_step_model

        return load_step_model(path, trt, blocks=blocks, profiles=profiles)


@dataclass(frozen=True)
class Engine:
    """What a build came to. arch: what it runs on. products: its linear layers by format, in words; empty for none.

    seconds: of the build itself; peak_rss_bytes: of its process.
    """

    arch: str
    products: str
    notes: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int


def build_engine(onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Engine:
    """Build out/engine.plan from the typed graph, and out/layers.json about it.

    Raises UsageError for a wrong setting, ProfileError for an axis without a range, else BackendError.
    """
    from medcompile import onnx_files
    from medcompile.backends import _tensorrt_job
    from medcompile.backends import _tensorrt_report as report
    from medcompile.backends._tensorrt_job import Job, run
    from medcompile.rewrites import tensorrt as dialect

    library, (settings, notes) = _LIBRARIES[target.name], _settings(variant)
    label = f"graph {spec.name} of variant {variant.name}"
    model = onnx_files.load(onnx_path)
    _check_graph(model, variant, f"{library.words} can't build {label}", target.name)
    capabilities = _capabilities(settings)
    with tempfile.TemporaryDirectory(dir=out) as scratch, tempfile.TemporaryDirectory(dir=out) as lowered:
        kernels = _lower_attention(model, spec, variant, str(settings["kv"]), onnx_path, Path(lowered))
        rewritten = kernels is not None or dialect.split_products(model) > 0
        if rewritten and kernels is None:
            onnx_files.save({onnx_path.stem: model}, Path(lowered))
        job = Job(
            library.module,
            onnx_path.name,
            operators=sorted({node.op_type for node in model.graph}),
            profiles=_profiles(spec),
            compute_capabilities=capabilities,
            workspace_mb=int(settings["workspace_mb"]),
            tf32=bool(settings["tf32"]),
            version_compatible=bool(settings["version_compatible"]),
            timing_cache=_timing_cache(target) if settings["timing_cache"] else "",
            kernels=KERNELS if kernels else "",
        )
        timeout_s = float(settings["build_timeout_s"])
        outcome = run(
            job, Path(lowered) if rewritten else onnx_path.parent, f"{library.words}, {label}", timeout_s, Path(scratch)
        )
        if not outcome.built:
            raise _refused(outcome, model, f"{library.words} {target.version} refuses {label}", target.name)
        (Path(scratch) / _tensorrt_job.PLAN).rename(out / PLAN)
        if kernels:
            (Path(lowered) / KERNELS).rename(out / KERNELS)
            notes.append(f"paged attention kernels {kernels.digest[:12]} by {kernels.compiler}, carried in the plan")
    layers, wanted = report.parse(outcome.layers), report.products(model)
    found = report.computed(layers, wanted)
    _check_products(wanted, found, f"{library.words} {target.version} built {label}", target.name)
    oldest = _OLDEST_WITH_FLOAT8 if any("float8" in formats for formats in found.values()) else _OLDEST
    arch = ",".join(f"sm_{c}" for c in capabilities) or (target.arch if library.needs_gpu else f"sm_{oldest}+")
    table = {"bindings": report.bindings(outcome.layers), "products": found, "layers": [row.row() for row in layers]}
    face = {"target": asdict(replace(target, arch=arch)), "profiles": [profile.name for profile in spec.profiles]}
    _write_layers(out, target, face | table)
    return Engine(arch, report.summary(found), (*outcome.notes, *notes), outcome.seconds, outcome.peak_rss_bytes)


# ---- what is asked


def _settings(variant: Variant) -> tuple[dict[str, Scalar], list[str]]:
    """Every setting of this backend, and a note of what belongs to others. A slip of the pen is a UsageError."""
    settings, foreign = dict(_DEFAULTS), []
    for name, value in sorted(variant.compute.items()):
        if name in settings:
            settings[name] = value
        elif get_close_matches(name, _DEFAULTS, cutoff=0.75):
            raise _wrong(variant, f"compute.{name} is unknown", f"it has: {', '.join(_DEFAULTS)}")
        else:
            foreign.append(f"{name}={value}")
    for name, value in settings.items():
        if isinstance(_DEFAULTS[name], bool) != isinstance(value, bool):
            raise _wrong(variant, f"compute.{name} is {value!r}", "give true or false, or leave it out")
        if name in ("workspace_mb", "build_timeout_s") and (isinstance(value, str) or value < 0):
            raise _wrong(variant, f"compute.{name} is {value!r}", "give a number")
    return settings, [f"TensorRT has no use for compute {', '.join(foreign)}"] if foreign else []


def _capabilities(settings: Mapping[str, Scalar]) -> list[int]:
    words = str(settings["compute_capability"]).replace(",", " ").split()
    if not all(word.isdecimal() for word in words):
        raise UsageError(
            f"compute.compute_capability is {settings['compute_capability']!r}",
            fix='list them as "80,89,120": 80 is compute capability 8.0',
        )
    return sorted(map(int, words))


def _wrong(variant: Variant, message: str, fix: str) -> UsageError:
    return UsageError(f"variant {variant.name}: {message}", fix=fix)


def _profiles(spec: GraphSpec) -> list[dict[str, list[list[int]]]]:
    """The smallest, usual and largest shape of every input. Raises ProfileError where an axis is in no profile."""

    def shape(dims: Sequence[int | str], profile: Any, end: str) -> list[int]:
        return [d if isinstance(d, int) else getattr(profile.axis(d), end) for d in dims]

    return [
        {t.name: [shape(t.shape, profile, end) for end in ("min", "opt", "max")] for t in spec.inputs}
        for profile in spec.profiles
    ]


def _timing_cache(target: Target) -> str:
    from medcompile.sources import default_cache

    folder = default_cache() / "tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{target.name}-{target.version}-{target.arch}.timing")


# ---- before the build


def _lower_attention(
    model: ir.Model, spec: GraphSpec, variant: Variant, kv: str, typed: Path, lowered: Path
) -> Kernels | None:
    """Where the graph has paged attention: write it with the plugin's nodes, and the kernels, into the folder lowered.

    Raises UsageError for pools of another dtype than the kernels take, BackendError for layers that they do not.
    """
    import onnx_ir as ir

    from medcompile.kernels import ptx
    from medcompile.rewrites import paged
    from medcompile.rewrites import tensorrt as dialect

    if not any(node.op_type == paged.OPERATOR for node in model.graph):
        return None
    dtype, pools = (str(x) for x in (variant.float_dtype, kv or variant.float_dtype))
    if pools not in ("float16", "bfloat16", "float32"):
        raise _wrong(variant, f"compute.kv is {kv!r}", "choose float16, bfloat16 or float32 for this target")
    face = dialect.rewrite(model, cast("Float", dtype), cast("Float", pools), _block_size(spec))
    assert face is not None
    kernels = ptx.compile_kernels(face)
    (lowered / KERNELS).mkdir()
    kernels.save(lowered / KERNELS)
    for file in typed.parent.iterdir():
        (lowered / file.name).symlink_to(file.absolute())
    (lowered / typed.name).unlink()
    ir.save(model, lowered / typed.name)
    return kernels


def _block_size(spec: GraphSpec) -> int:
    """Tokens of a block, as the pools' shape or every profile has it. Raises UsageError where these do not agree."""
    found = {tensor.shape[2] for tensor in spec.inputs if tensor.name.startswith(_POOL)}
    sizes = {x for d in found for x in ([d] if isinstance(d, int) else _ends(spec, d))}
    if len(sizes) != 1:
        raise UsageError(
            f"the pools of graph {spec.name} have blocks of {', '.join(map(str, sorted(sizes))) or 'no'} tokens",
            fix="give shapes.block_size one value, as [32, 32, 32]",
        )
    return sizes.pop()


def _ends(spec: GraphSpec, dim: str) -> set[int]:
    return {end for profile in spec.profiles for end in (profile.axis(dim).min, profile.axis(dim).max)}


def _check_graph(model: ir.Model, variant: Variant, what: str, target: str) -> None:
    """Refuse what the library's parser would, or would take in another sense, in the words of a recipe."""
    integer = [node.name for node in model.graph if node.op_type in ("MatMulInteger", "DynamicQuantizeLinear")]
    if integer:
        raise BackendError(
            f"{what}: it rounds activations at run time ({integer[0]}), "
            "and TensorRT multiplies integers with stored scales only",
            fix=f"leave out dynamic: true in variants.{variant.name}, or leave out target {target}",
        )
    anew = "quantize anew, with weights: int4 or int8" if variant.weights == "stored" else "set symmetric: true"
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
            continue
        zero_point = node.inputs[2]
        if zero_point is None:
            continue
        unsigned = zero_point.dtype is not None and zero_point.dtype.name.startswith("UINT")
        stored = zero_point.const_value
        if unsigned or stored is None or stored.numpy().astype("float32").any():
            raise BackendError(
                f"{what}: {node.op_type} {node.name} has a zero point other than 0, which TensorRT does not take",
                fix=f"{anew} in variants.{variant.name}, or leave out target {target}",
            )


# ---- after the build


def _refused(outcome: Outcome, model: ir.Model, what: str, target: str) -> BackendError:
    from medcompile.backends import _tensorrt_capability

    problems = [*outcome.problems]
    for operator in outcome.unknown:
        nodes = [node.name or "" for node in model.graph if node.op_type == operator]
        problems.append(f"operator {operator} is unknown to it (node {', '.join(nodes[:3])})")
    report = _tensorrt_capability.words(outcome.parts, [f"{node.name} ({node.op_type})" for node in model.graph])
    problems = [*problems[:_SHOWN_LINES], *filter(None, [report])]
    lines = "".join(f"\n  {' '.join(problem.split())[:300]}" for problem in problems)
    return BackendError(
        f"{what}:{lines}",
        fix=f"change what these lines name, or leave out target {target} or this variant"
        if not outcome.unknown
        else f"leave out target {target}, or export the model without {', '.join(outcome.unknown)}",
    )


def _check_products(wanted: Sequence[Product], found: Mapping[str, str], what: str, target: str) -> None:
    from medcompile.backends import _tensorrt_report as report

    if wrong := report.faults(wanted, found):
        lines = "".join(f"\n  {fault}" for fault in wrong[:_SHOWN_LINES])
        more = f"\n  and {len(wrong) - _SHOWN_LINES} more" if len(wrong) > _SHOWN_LINES else ""
        raise BackendError(
            f"{what}, but {len(wrong)} of {len(wanted)} linear layers don't compute in their integers:{lines}{more}",
            fix=f"keep these nodes in float (variants.<name>.keep), or leave out target {target}",
        )


def _write_layers(out: Path, target: Target, table: Mapping[str, Any]) -> None:
    with (out / PLAN).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    plan = {"size_bytes": (out / PLAN).stat().st_size, "sha256": digest}
    whole = {"library": f"{_LIBRARIES[target.name].words} {target.version}", "plan": plan, **table}
    (out / LAYERS).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


# ---- does a plan fit this machine?


def _fitting(path: Path, variant: Variant, target: Target, *, paged: bool = False) -> Any:
    """The library that runs the plan here. Raises BackendUnavailable where none does."""
    library = _LIBRARIES[target.name]
    trt = _module(library)
    _check_machine(library, str(trt.__version__), target, variant)
    if paged:
        from medcompile.kernels import tensorrt_plugin

        tensorrt_plugin.register(trt)
    _check_plan(library, trt, path, target)
    device = _device()  # raises where there is nothing to run on
    if not _runs_on(device.arch, target.arch):
        raise _misfit(library, target, f"this machine has {_capability(device.arch)} ({device.name})")
    return trt


def _check_machine(library: Library, version: str, target: Target, variant: Variant) -> None:
    """Raises BackendUnavailable where the plan was built on another kind of system, or by another version."""
    if target.os != _system():
        raise _misfit(library, target, f"on {target.os}, and this machine is {_system()}")
    compatible = variant.compute.get("version_compatible") is True
    there, here = (v.partition(".")[0] if compatible else v for v in (target.version, version))
    if here != there:
        raise _misfit(library, target, f"this machine has {library.words} {version}")


def _check_plan(library: Library, trt: Any, path: Path, target: Target) -> None:
    """Ask the library, without letting it read the plan as a plan, whether it would.

    Raises BackendUnavailable where it would on another machine, BackendError for a plan that is damaged.
    """
    table = path.with_name(LAYERS)
    size = json.loads(table.read_text(encoding="utf-8"))["plan"]["size_bytes"] if table.is_file() else None
    plan = path.read_bytes()
    if size is not None and len(plan) != size:
        raise BackendError(
            f"{path.name} holds {len(plan)} of the {size} bytes that were built: it was cut or replaced",
            fix="copy the bundle again from where it was built, or rebuild it",
        )
    from medcompile.backends._tensorrt_executor import logger_of

    messages = logger_of(trt)
    runtime = trt.Runtime(messages)
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, flags = runtime.get_engine_validity(plan)
    said = messages.said()
    if validity.name != "INVALID":
        if validity.name == "SUBOPTIMAL":
            log.warning(
                "%s: %s", path.name, "it runs on this GPU, but was built for another; a rebuild would be faster"
            )
        return
    kinds = trt.EngineInvalidityDiagnostics.__members__
    reasons = [words for name, words in _DIAGNOSES.items() if name in kinds and int(kinds[name]) & int(flags)]
    if "MALFORMED_ENGINE" in kinds and int(kinds["MALFORMED_ENGINE"]) & int(flags):
        raise BackendError(
            f"{library.words} {trt.__version__} can't use {path.name}: {' and '.join(reasons)}",
            fix="copy the bundle again from where it was built, or rebuild it",
        )
    device = _device()  # without one the library finds every plan invalid: say that first
    raise _misfit(library, target, f"on {device.name} the library refuses it: {' and '.join(reasons) or said}")


def _misfit(library: Library, target: Target, here: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"built by {library.words} {target.version} for {_capability(target.arch)}; {here}",
        fix=f"rebuild with: medcompile build --from <bundle> --targets {target.name}",
    )


def _runs_on(device: str, arch: str) -> bool:
    """Whether a GPU (sm_89) can be in what a plan was built for: sm_80+, or some of sm_80,sm_89. The library knows
    which of the later ones a listed one covers; what is older than all of them is refused here."""
    return _number(device) >= min(_number(word.rstrip("+")) for word in arch.split(","))


def _capability(arch: str) -> str:
    """sm_80+ in words: compute capability 8.0 and later."""
    numbers = [f"{n // 10}.{n % 10}" for n in (_number(word.rstrip("+")) for word in arch.split(","))]
    return f"compute capability {', '.join(numbers)}{' and later' if arch.endswith('+') else ''}"


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _device() -> Device:
    from medcompile.backends import _cuda

    return _cuda.open_cuda().device()


def _system() -> str:
    return f"{platform.system()}-{platform.machine()}".lower()


def _module(library: Library) -> Any:
    try:
        return importlib.import_module(library.module)
    except (ImportError, OSError) as error:
        raise BackendUnavailable(f"{library.module} cannot be imported: {error}", fix=library.install) from error


BACKEND = TensorRtBackend()
