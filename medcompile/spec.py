"""The words of the house: shapes, profiles, variants, targets, budgets, evidence and artifacts.

Frozen dataclasses over the standard library alone, because both halves (compiler and runtime) import them and
`import medcompile` must stay cheap. What reads YAML lives in recipe.py; what reads a bundle lives in bundle.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from fnmatch import translate
from functools import cache

from medcompile.errors import ProfileError

Dim = int | str
"""One entry of a shape: a fixed size, or the name of a dynamic axis."""

Scalar = str | int | float | bool

ABSENT = "none"
"""Target.arch where a machine has no device of that kind."""

GRAPH_VERIFIED = "graph verified on CPU, engine not yet run"
"""Artifact.verified_on where its typed graph stood in for it: the very file that the backend built it from."""

NOT_VERIFIED = "not verified"
"""Artifact.verified_on where neither it nor its graph was run on the evaluation data."""

WEIGHT_ONLY_METHODS = ("awq", "gptq")
"""Quantizers of weights whose activations stay in float."""

_ON_DEVICE = "verified on device: "


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: numpy dtype name and shape, whose strings name dynamic axes."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Axis:
    """The range of a dynamic axis: 1 <= min <= opt <= max, in elements."""

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ProfileError(
                f"axis {self.name}: [{self.min}, {self.opt}, {self.max}] is not 1 <= min <= opt <= max",
                fix=f"write shapes.{self.name} as [min, opt, max] in rising order",
            )


@dataclass(frozen=True)
class Profile:
    """One set of axis ranges that an engine is built for."""

    name: str
    axes: tuple[Axis, ...]

    def axis(self, name: str) -> Axis:
        """The axis called name. Raises ProfileError if this profile has none."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise ProfileError(
            f"profile {self.name} has no axis {name!r}; it has {', '.join(a.name for a in self.axes) or 'none'}",
            fix=f"add shapes.{name}: [min, opt, max] to the recipe and rebuild",
        )


@dataclass(frozen=True)
class GraphSpec:
    """The face of one graph: its name (a task, for encoders), inputs, outputs and profiles."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]


class Stage(IntEnum):
    """How far a program has been lowered. CALIBRATED is reached only where a method needs statistics."""

    EXPORTED = 1
    SIMPLIFIED = 2
    CALIBRATED = 3
    QUANTIZED = 4
    TYPED = 5


class Precision(StrEnum):
    """Number formats a variant may ask for, by their field names."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"
    FLOAT8 = "float8"
    STORED = "stored"


@dataclass(frozen=True)
class LayerRule:
    """What the linear layers whose nodes match a pattern have instead of their variant's format.

    pattern: a glob over node names, as in Variant.keep. The other fields are Variant's; weights None leaves those
    layers in the variant's float_dtype.
    """

    pattern: str
    weights: Precision | None = None
    activations: Precision | None = None
    dynamic: bool = False
    block_size: int | None = None


@dataclass(frozen=True)
class Variant:
    """A precision recipe. Everything that decides numbers is named here; nothing is left to a backend's default.

    float_dtype: dtype of whatever stays in floating point. weights, activations: an integer format, or float8 (E4M3);
    None leaves them in float_dtype. Weights may be stored: as the checkpoint has them, which came quantized.
    dynamic: activation scales are taken per token at run time instead of from calibration.
    symmetric: activation zero points are 0 (what TensorRT asks for); False lets them move (CPU targets only).
    block_size: weights share a scale per block of this many inputs; None is one scale per output channel.
    embeddings: INT8 stores the tables that tokens are looked up in as integers, with a scale per token; None in float.
    method: how weights and scales are found (a quantizer's name). smoothing: SmoothQuant's strength in [0, 1];
        None searches it for each tensor.
    graphs: which graphs this precision is for; the others stay in float32. Empty: all.
    keep: glob patterns over node names that stay in float. compute: settings a backend would else choose by itself.
    layers: other formats for some linear layers; the first rule that matches a node holds, and keep goes before all.
        method is for the layers whose format it fits; the others then have rtn.
    clipping: how an activation's range is found, instead of the recipe's calibration.method; empty: as that says.
    bias_correction: what rounding a weight does to the mean of a layer's output is taken off its bias.
    """

    name: str
    float_dtype: Precision = Precision.FLOAT32
    weights: Precision | None = None
    activations: Precision | None = None
    dynamic: bool = False
    symmetric: bool = True
    block_size: int | None = None
    embeddings: Precision | None = None
    method: str = "rtn"
    smoothing: float | None = None
    graphs: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    compute: Mapping[str, Scalar] = field(default_factory=dict)
    layers: tuple[LayerRule, ...] = ()
    clipping: str = ""
    bias_correction: bool = False

    @property
    def quantized(self) -> bool:
        """True if any linear layer is."""
        return self.weights is not None or any(rule.weights is not None for rule in self.layers)

    def on(self, graph: str) -> Variant:
        """What this variant means for that graph: itself, or float32 with the same compute settings."""
        if not self.graphs or graph in self.graphs:
            return self
        return Variant(self.name, compute=self.compute)

    def for_node(self, name: str) -> Variant:
        """What this variant means for the linear layer of that name: one format, in weights to method; no layers."""
        if kept(name, self.keep):
            return self._form(LayerRule(name))
        return self._form(next((rule for rule in self.layers if kept(name, (rule.pattern,))), None))

    @property
    def forms(self) -> tuple[Variant, ...]:
        """Every format that its linear layers may have, as for_node() gives it: its own, then those of its rules."""
        return (self._form(None), *map(self._form, self.layers))

    def _form(self, rule: LayerRule | None) -> Variant:
        if rule is None and not self.layers:
            return self
        form = rule or self
        made = replace(
            self,
            weights=form.weights,
            activations=form.activations,
            dynamic=form.dynamic,
            block_size=form.block_size,
            layers=(),
        )
        return made if made._method_fits else replace(made, method="rtn")

    @property
    def _method_fits(self) -> bool:
        if self.method == "smoothquant":
            return self.activations is Precision.INT8
        if self.method in WEIGHT_ONLY_METHODS:
            return self.activations is None and self.weights in (Precision.INT8, Precision.INT4)
        return True

    @property
    def needs_statistics(self) -> bool:
        """True where calibration data must be run before quantization."""
        return any(
            (form.activations is not None and not form.dynamic)
            or (form.weights is not None and (form.method != "rtn" or form.bias_correction))
            for form in self.forms
        )

    @property
    def any_dynamic(self) -> bool:
        """True if some layer's activation scales are taken at run time."""
        return any(form.dynamic for form in self.forms)

    @property
    def any_weight_only(self) -> bool:
        """True if some layer multiplies stored integers with activations in float."""
        return any(form.weights is not None and form.activations is None for form in self.forms)


def kept(name: str, patterns: tuple[str, ...]) -> bool:
    """True if one of patterns, globs over node names, means the node of that name: `encoder.layer.3.output.dense`
    means the node of that module."""
    return any(_matches(pattern)(name) is not None for pattern in patterns)


@cache
def _matches(pattern: str) -> Callable[[str], re.Match[str] | None]:
    """fnmatch keeps too few patterns to match hundreds of rules with hundreds of nodes."""
    return re.compile("|".join(map(translate, (pattern, f"{pattern}/*")))).match


@dataclass(frozen=True)
class Target:
    """Where an artifact runs. name is what a recipe says (onnxruntime-cpu); version is the backend library's.

    arch: of the device that runs it: x86_64, sm_89; sm_80+ of an artifact that any such GPU or later takes.
    """

    name: str
    backend: str
    device: str
    arch: str = ""
    os: str = ""
    version: str = ""

    @property
    def present(self) -> bool:
        """False of a probed machine that has the library but no such device: it builds artifacts, and runs none."""
        return self.arch != ABSENT

    @property
    def verified_on(self) -> str:
        """Artifact.verified_on of one that ran on this machine: `verified on device: cuda sm_89`."""
        return f"{_ON_DEVICE}{self.device} {self.arch}".rstrip()


class Verdict(StrEnum):
    NON_INFERIOR = "non-inferior"
    INFERIOR = "inferior"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Margin:
    """One line of a budget: the largest tolerated drop of a metric, and the confidence of the one-sided test.

    max_drop of a metric of which less is better (cost, flips, ece) is the rise, or the share, that is tolerated.
    costs: of the metric cost, by the right class and the one given instead; of entities, missed and false_alarm.
    """

    metric: str
    max_drop: float
    confidence: float = 0.95
    costs: Mapping[str, Mapping[str, float] | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """The outcome of one non-inferiority test, paired against the fp32 reference on the same items.

    difference is value - reference, signed so that a loss is negative whatever the metric's direction; of perplexity,
    as a share of the reference's.
    lower is the one-sided lower confidence bound of difference; interval is two-sided at the same confidence: the
    margin's own, or the higher one at which Holm's procedure judged it beside the graph's other margins.
    margin None: reported only, not judged, and verdict is None. samples counts items, units what was resampled.
    discordant: items whose decision differs from the reference's (None where the metric has no decisions).
    power: chance of "non-inferior" at zero true drop; samples_needed: items for a power of 0.8.
    note: what a verdict does not say alone (a margin below one event; what an extreme leaves open; NaN; Holm's step).
    p_value: of a true drop of the margin or more, before Holm; None where nothing is judged, or by an extreme.
    """

    metric: str
    reference: float
    value: float
    difference: float
    lower: float
    interval: tuple[float, float]
    confidence: float
    samples: int
    units: int
    unit: str
    method: str
    margin: float | None = None
    verdict: Verdict | None = None
    discordant: int | None = None
    power: float | None = None
    samples_needed: int | None = None
    graph: str = ""
    note: str = ""
    p_value: float | None = None


@dataclass(frozen=True)
class Artifact:
    """One graph of one variant, lowered for one target: a file of the bundle that a backend can load.

    path is relative to the bundle's root, with forward slashes. verified_on: where its evidence was made, and on
    what: Target.verified_on, GRAPH_VERIFIED or NOT_VERIFIED. latency_ms: median time of one run at the profile's opt
    shape on that device; None if not run.
    notes: what the backend did and which settings it used, in words.
    """

    graph: str
    variant: str
    target: Target
    path: str
    sha256: str
    size_bytes: int
    evidence: tuple[Evidence, ...] = ()
    verified_on: str = ""
    latency_ms: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        """True if its evidence was made by running it, and not its graph."""
        return self.verified_on.startswith(_ON_DEVICE)

    @property
    def verdict(self) -> Verdict | None:
        """The worst verdict over its judged metrics; None where nothing was judged."""
        verdicts = [e.verdict for e in self.evidence if e.verdict is not None]
        for worst in (Verdict.INFERIOR, Verdict.INCONCLUSIVE, Verdict.NON_INFERIOR):
            if worst in verdicts:
                return worst
        return None
