"""Variants in a recipe: the keys that one may have, and how they become a spec.Variant and keys again.

What the keys mean together is recipe_rules.py's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from medcompile import recipe_rules
from medcompile.recipe_rules import FLOAT
from medcompile.recipe_yaml import failure, shown
from medcompile.spec import LayerRule, Precision, Scalar, Variant


class Section(BaseModel):
    """A mapping of a recipe: keys that are not known are errors, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def unique(values: list[Any]) -> list[Any]:
    """Validates a list: no value stands in it twice."""
    twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
    if twice is not None:
        raise failure(f"{shown(twice)} stands here twice", f"keep {twice} once")
    return values


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if not isinstance(value, str | int | float):
            raise failure(f"{key} is neither text, a number, true nor false", f"write {key}: <one value>")
    return values


class LayerKeys(Section):
    """The format of some linear layers. In a recipe `float` alone is short for {weights: float}."""

    weights: Literal["float", "int8", "int4", "float8"] = Field(
        description="Format of the weights; float: the variant's float type.", examples=["int8"]
    )
    activations: Literal["int8", "float8"] | None = Field(
        default=None, description="Format that activations are rounded to; none for float.", examples=["int8"]
    )
    dynamic: bool = Field(
        default=False,
        description="Take activation scales per token at run time, not from calibration.",
        examples=["true"],
    )
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        default=None, description="int4 only: this many inputs share a scale.", examples=["128"]
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str) and value != FLOAT:
            raise failure(f"{shown(value)} is no format of layers", f"write {FLOAT}, or {{weights: int8}}")
        return {"weights": value} if isinstance(value, str) else value


def _short_form(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = {"anyOf": [{"const": FLOAT}, schema["additionalProperties"]]}


class VariantKeys(Section):
    """One precision. An empty variant ({}) is plain float32."""

    float_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        alias="float",
        description="What stays in floating point has this type.",
        examples=["float32"],
    )
    weights: Literal["int8", "int4", "float8", "stored"] | None = Field(
        default=None,
        description="Format of the weights; stored: as a checkpoint that came quantized has them; none for float.",
        examples=["int8"],
    )
    activations: Literal["int8", "float8"] | None = Field(
        default=None, description="Format that activations are rounded to; none for float.", examples=["int8"]
    )
    dynamic: bool = Field(
        default=False,
        description="Take activation scales per token at run time, not from calibration.",
        examples=["true"],
    )
    symmetric: bool = Field(
        default=True,
        description="Activation zero points are 0, as TensorRT wants; false is more accurate on a CPU.",
        examples=["false"],
    )
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        default=None, description="int4 only: this many inputs share a scale.", examples=["128"]
    )
    embeddings: Literal["int8"] | None = Field(
        default=None, description="Format of the table that tokens are looked up in; none for float.", examples=["int8"]
    )
    method: Literal["rtn", "smoothquant", "awq", "gptq"] | None = Field(
        default=None,
        description="How weights and scales are found; if not given, smoothquant for static int8 (rtn with clipping), "
        "else rtn.",
        examples=["rtn"],
    )
    smoothing: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="smoothquant only: how much moves to the weights; searched for each tensor if not given.",
        examples=["0.5"],
    )
    graphs: Annotated[list[str], AfterValidator(unique)] | None = Field(
        default=None,
        min_length=1,
        description="Only these graphs get this precision, the others stay float32; default: all.",
        examples=["[image]"],
    )
    keep: list[str] = Field(
        default_factory=list, description="Glob patterns over node names that stay in float.", examples=['["*pooler*"]']
    )
    layers: dict[str, LayerKeys] = Field(
        default_factory=dict,
        description="Glob patterns over node names of linear layers to the format that they have instead; the first "
        "that matches holds. The variant's method is for those whose format it fits, rtn for the others.",
        examples=['{"*output.dense": float, "*intermediate*": {weights: int8}}'],
        json_schema_extra=_short_form,
    )
    clipping: Literal["minmax", "percentile", "entropy", "mse"] | None = Field(
        default=None,
        description="How ranges of static int8 activations are chosen, instead of calibration.method; not with "
        "smoothquant, which takes all that was seen.",
        examples=["percentile"],
    )
    bias_correction: bool = Field(
        default=False,
        description="Take what rounding does to the mean of a layer's output off its bias, by calibration data.",
        examples=["true"],
    )
    compute: Annotated[
        dict[str, Any],
        AfterValidator(_scalars),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}),
    ] = Field(default_factory=dict, description="Settings that a backend would else choose by itself.", examples=["{}"])


def variant_of(name: str, keys: VariantKeys) -> Variant:
    return Variant(
        name=name,
        float_dtype=Precision(keys.float_dtype),
        weights=_precision(keys.weights),
        activations=_precision(keys.activations),
        dynamic=keys.dynamic,
        symmetric=keys.symmetric,
        block_size=keys.block_size,
        embeddings=_precision(keys.embeddings),
        method=recipe_rules.method_of(keys.model_dump()),
        smoothing=keys.smoothing,
        graphs=tuple(keys.graphs or ()),
        keep=tuple(keys.keep),
        compute=dict(keys.compute),
        layers=tuple(_rule(pattern, layer) for pattern, layer in keys.layers.items()),
        clipping=keys.clipping or "",
        bias_correction=keys.bias_correction,
    )


def _rule(pattern: str, keys: LayerKeys) -> LayerRule:
    weights = None if keys.weights == FLOAT else Precision(keys.weights)
    return LayerRule(pattern, weights, _precision(keys.activations), keys.dynamic, keys.block_size)


def _precision(name: str | None) -> Precision | None:
    return Precision(name) if name else None


def variant_plain(variant: Variant) -> dict[str, Any]:
    """A variant's keys as a recipe writes them: those that mean something for it, defaults included."""
    plain: dict[str, Any] = {"float": str(variant.float_dtype)} | _format_plain(variant)
    if variant.quantized:
        plain["method"] = variant.method
    if any(form.activations is not None and not form.dynamic for form in variant.forms):
        plain["symmetric"] = variant.symmetric
    if variant.embeddings is not None:
        plain["embeddings"] = str(variant.embeddings)
    if variant.smoothing is not None:
        plain["smoothing"] = variant.smoothing
    if variant.graphs:
        plain["graphs"] = list(variant.graphs)
    if variant.layers:
        plain["layers"] = {rule.pattern: _format_plain(rule) or FLOAT for rule in variant.layers}
    if variant.clipping:
        plain["clipping"] = variant.clipping
    if variant.bias_correction:
        plain["bias_correction"] = True
    compute: dict[str, Scalar] = dict(sorted(variant.compute.items()))
    return plain | {"keep": list(variant.keep), "compute": compute}


def _format_plain(form: Variant | LayerRule) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    if form.weights is not None:
        plain["weights"] = str(form.weights)
    if form.activations is not None:
        plain |= {"activations": str(form.activations), "dynamic": form.dynamic}
    if form.block_size is not None:
        plain["block_size"] = form.block_size
    return plain
