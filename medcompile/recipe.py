"""Recipes: the YAML file that says what to build, read into a frozen Recipe of spec's types.

The schema lives here, but for that of a variant: recipe_variants.py. Rules that tie keys together are
recipe_rules.py's, and reading YAML with line and column is recipe_yaml.py's. Whether the model itself can do what is
asked (512 positions, its tasks' weights) is for the family to say later.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema

from medcompile import models, recipe_rules, recipe_yaml
from medcompile.errors import RecipeError
from medcompile.recipe_rules import Task
from medcompile.recipe_variants import Section, VariantKeys, unique, variant_of, variant_plain
from medcompile.recipe_yaml import Document, failure, nearest, shown
from medcompile.spec import Axis, Margin, Profile, Variant

TargetName = Literal[
    "onnxruntime-cpu", "openvino-cpu", "tensorrt-rtx", "tensorrt", "onnxruntime-cuda", "onnxruntime-rtx", "null"
]

_SOURCES = {
    "hf": (r"hf:[\w.-]+(/[\w.-]+)?", "hf:<organization>/<model>"),
    "path": (r"path:.+", "path:<folder>"),
    "package": (r"package:[\w.-]+==[\w.+!-]+/.+", "package:<distribution>==<version>/<path inside it>"),
}
_RANGE = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 3, "maxItems": 3}


def _name(value: str) -> str:
    if not recipe_rules.NAME.fullmatch(value):
        plain = re.sub(r"[^a-z0-9._-]+", "-", value.lower()).strip("-._") or "my-model"
        raise failure(f"{shown(value)} is not a name (a-z, 0-9, and . _ - after the first)", f"write {plain}")
    return value


def _family(value: str) -> str:
    if value not in models.names():
        known = models.names()
        raise failure(f"no model family {shown(value)}{nearest(value, known)}", f"choose from: {', '.join(known)}")
    return value


def _source(value: str) -> str:
    scheme, colon, rest = value.partition(":")
    if not colon or scheme not in _SOURCES:
        forms = ", ".join(form for _, form in _SOURCES.values())
        raise failure(f"{shown(value)} does not say where the model comes from", f"write one of: {forms}")
    if scheme == "package" and "==" not in rest:
        raise failure(f"{shown(value)} pins no version", f"write {_SOURCES['package'][1]}")
    if not re.fullmatch(_SOURCES[scheme][0], value):
        raise failure(f"{shown(value)} is not of the form {_SOURCES[scheme][1]}", f"write {_SOURCES[scheme][1]}")
    return value


def _templates(values: list[str]) -> list[str]:
    for value in values:
        if value.count("{}") != 1:
            raise failure(f"{shown(value)} has not one {{}} for the name of a class", 'write "an image of {}"')
    return values


def _listed(value: Any) -> Any:
    """One name counts as a list of one."""
    return [value] if isinstance(value, str) else value


class ModelKeys(Section):
    """What to compile. source is pinned: a hub revision, or a package's version."""

    family: Annotated[str, AfterValidator(_family)] = Field(
        description="The architecture family: a file in medcompile/models/.", examples=["bert"]
    )
    tasks: Annotated[list[Task], AfterValidator(unique)] = Field(
        min_length=1, description="One graph is built for each task.", examples=["[embed]"]
    )
    source: Annotated[str, AfterValidator(_source)] = Field(
        description="hf:<organization>/<model>, path:<folder>, or package:<distribution>==<version>/<path inside it>.",
        examples=['"hf:organization/model"'],
    )
    revision: str | None = Field(
        default=None, description="The hub commit, 40 hexadecimal digits. Only with hf:.", examples=["<40 hex digits>"]
    )
    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="How embed makes one vector of a text's tokens.", examples=["mean"]
    )
    normalize: bool = Field(
        default=True, description="Whether embed() scales vectors to length 1 by default.", examples=["true"]
    )
    templates: Annotated[list[str], AfterValidator(_templates)] | None = Field(
        default=None,
        min_length=1,
        description="What match() puts the name of a class into, at {}; default: as the model was trained.",
        examples=['["this is a photo of {}"]'],
    )
    max_length: int | None = Field(
        default=None, ge=8, description="Longest window in tokens; default: the model's own.", examples=["512"]
    )
    labels: Annotated[list[str], AfterValidator(unique)] | None = Field(
        default=None,
        min_length=2,
        description="Names of the labels in the order of their ids, where the checkpoint's own are missing or odd.",
        examples=["[O, B-Disease, I-Disease]"],
    )


class CalibrationKeys(Section):
    """Real data that static quantization measures activations on. Never random, never the evaluation data."""

    data: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_listed),
        AfterValidator(unique),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    ] = Field(
        min_length=1,
        description="A manifest in calibration/, or a path to one; or several, say of images and of captions.",
        examples=["my-notes"],
    )
    samples: int = Field(default=256, ge=8, description="How many items of each to run.", examples=["256"])
    method: Literal["minmax", "percentile", "entropy", "mse"] = Field(
        default="mse", description="How the range of an activation is chosen from its histogram.", examples=["mse"]
    )
    percentile: float | None = Field(
        default=None, gt=50, lt=100, description="For method percentile: the share kept, in %.", examples=["99.99"]
    )
    batch: int = Field(default=8, ge=1, description="Items per run.", examples=["8"])


class EvaluationKeys(Section):
    """Labelled data that every artifact is judged on against the original model."""

    data: str = Field(min_length=1, description="A manifest in calibration/, or a path to one.", examples=["my-devel"])
    samples: int | None = Field(default=None, ge=8, description="How many items; default: all.", examples=["500"])


class TuningKeys(Section):
    """Labelled data that a search sees as often as it likes. The evaluation data then is for the final test alone."""

    data: str = Field(min_length=1, description="A manifest in calibration/, or a path to one.", examples=["my-tuning"])
    samples: int | None = Field(default=None, ge=8, description="How many items; default: all.", examples=["500"])


class SearchKeys(Section):
    """How far a search may go."""

    confirmations: int = Field(
        default=3,
        ge=1,
        le=10,
        description="Most looks at the evaluation data; the confidence is raised to allow for all of them.",
        examples=["3"],
    )
    points: int = Field(default=24, ge=2, description="Most bundles to judge on the tuning data.", examples=["24"])
    batches: int = Field(
        default=4, ge=1, description="Calibration batches that layers are compared on, alone.", examples=["2"]
    )
    measured: list[str] = Field(
        default_factory=list,
        description="Bundles that were verified on a target that is not here: their times are its cost model.",
        examples=["[engines/from-the-gpu]"],
    )


def _costs(costs: dict[str, Any]) -> dict[str, float | dict[str, float]]:
    """One number each, or one for each wrong answer."""

    def number(cost: Any) -> float:
        if type(cost) not in (int, float) or not 0 <= cost < math.inf:
            raise failure(f"{shown(cost)} is no cost", "write a number from 0")
        return float(cost)

    return {k: {n: number(c) for n, c in v.items()} if isinstance(v, dict) else number(v) for k, v in costs.items()}


class MarginKeys(Section):
    """How much of a metric may be lost, and how sure the test must be that no more was."""

    max_drop: float = Field(
        gt=0,
        description="Largest tolerated drop, as a fraction: 0.01 is one point. Of cost: the rise, in its unit.",
        examples=["0.01"],
    )
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="Confidence of the one-sided test.", examples=["0.95"]
    )
    costs: Annotated[dict[str, Any], AfterValidator(_costs)] | None = Field(
        default=None,
        description="Of the metric cost: what each mistake costs, by the right class and the wrong one (1 where none is"
        " named); of entities, missed and false_alarm.",
        examples=["{disease: {healthy: 10}}", "{missed: 10, false_alarm: 1}"],
    )


class KvKeys(Section):
    """How a decoder keeps keys and values: in pools of blocks, so many tokens each."""

    block_size: Literal[16, 32] = Field(
        default=32, description="Tokens in a block; OpenVINO has blocks of 32 alone.", examples=["32"]
    )


class _RecipeKeys(Section):
    """The whole file."""

    model_config = ConfigDict(title="medcompile recipe")

    schema_: str | None = Field(default=None, alias="$schema", description="For editors: where the JSON Schema lies.")
    schema_version: Literal[1] = Field(description="The version of this format.", examples=["1"])
    name: Annotated[str, AfterValidator(_name)] = Field(
        description="Names the bundle: engines/<name>.", examples=["my-model"]
    )
    model: ModelKeys = Field(description="What to compile.", examples=["{family: bert, tasks: [embed], source: ...}"])
    shapes: Annotated[
        dict[str, Any],
        WithJsonSchema(
            {
                "type": "object",
                "additionalProperties": {
                    "anyOf": [_RANGE, {"type": "object", "additionalProperties": _RANGE, "minProperties": 1}]
                },
            }
        ),
    ] = Field(
        min_length=1,
        description="[min, opt, max] of every dynamic axis, or named profiles that each hold such a map.",
        examples=["{batch: [1, 8, 64], sequence: [8, 128, 512]}"],
    )
    calibration: CalibrationKeys | None = Field(
        default=None, description="Needed by variants with static activations.", examples=["{data: clinical-notes}"]
    )
    evaluation: EvaluationKeys = Field(
        description="What the result is judged on.", examples=["{data: retrieval-pairs}"]
    )
    budget: dict[str, MarginKeys] = Field(
        min_length=1, description="Metric to largest tolerated loss.", examples=["{f1: {max_drop: 0.01}}"]
    )
    variants: dict[str, VariantKeys] | None = Field(
        default=None,
        min_length=1,
        description="Name to precision; or else optimize.",
        examples=["{fp32: {}, int8: {weights: int8, activations: int8}}"],
    )
    optimize: Literal["latency", "size", "throughput"] | None = Field(
        default=None,
        description="Instead of variants: find the precision of each layer that is best at this, inside the budget.",
        examples=["latency"],
    )
    tuning: TuningKeys | None = Field(
        default=None, description="Goes with optimize: the data that its search sees.", examples=["{data: my-tuning}"]
    )
    search: SearchKeys | None = Field(
        default=None, description="Goes with optimize: how far to search.", examples=["{confirmations: 3}"]
    )
    kv: KvKeys | None = Field(default=None, description="For the task generate.", examples=["{block_size: 32}"])
    targets: Annotated[list[TargetName], AfterValidator(unique)] = Field(
        min_length=1, description="Where the bundle shall run.", examples=["[onnxruntime-cpu]"]
    )


@dataclass(frozen=True)
class Recipe:
    """A recipe that passed every check. manifests: data name -> the manifest's path, as found."""

    name: str
    model: ModelKeys
    profiles: tuple[Profile, ...]
    calibration: CalibrationKeys | None
    evaluation: EvaluationKeys
    budget: tuple[Margin, ...]
    variants: tuple[Variant, ...]
    targets: tuple[str, ...]
    kv: KvKeys | None
    optimize: str | None
    tuning: TuningKeys | None
    search: SearchKeys
    path: Path = field(compare=False)
    manifests: Mapping[str, Path] = field(compare=False)

    def variant(self, name: str) -> Variant:
        """The variant called name, which must be there."""
        return next(v for v in self.variants if v.name == name)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at path, with `key.path=value` overrides laid over it. Raises RecipeError with every problem found."""
    document = recipe_yaml.read(Path(path), str(path))
    manifests: dict[str, Path] = {}
    keys = None
    if not document.problems or document.value is not None:
        recipe_yaml.override(document, overrides)
        keys = recipe_yaml.validate(_RecipeKeys, document)
        if isinstance(document.value, dict):
            for way, message, fix in recipe_rules.broken(document.value):
                is_name = len(way) == 2 and way[0] in {"budget", "variants"}
                document.report(way, message, fix, at_key=is_name)
            manifests = _find_manifests(document, Path(path))
    if keys is None or document.problems:
        raise RecipeError(document.in_order())
    return Recipe(
        name=keys.name,
        model=keys.model,
        profiles=_profiles(keys.shapes),
        calibration=keys.calibration,
        evaluation=keys.evaluation,
        budget=tuple(Margin(metric, m.max_drop, m.confidence, m.costs or {}) for metric, m in keys.budget.items()),
        variants=tuple(variant_of(name, v) for name, v in (keys.variants or {}).items()),
        targets=tuple(keys.targets),
        kv=(keys.kv or KvKeys()) if "generate" in keys.model.tasks else None,
        optimize=keys.optimize,
        tuning=keys.tuning,
        search=keys.search or SearchKeys(),
        path=Path(path),
        manifests=manifests,
    )


def resolved(recipe: Recipe) -> str:
    """The recipe as canonical YAML with every default written out; load() of it gives an equal recipe."""
    profiles = {p.name: {a.name: [a.min, a.opt, a.max] for a in p.axes} for p in recipe.profiles}
    document = {
        "schema_version": 1,
        "name": recipe.name,
        "model": _plain(recipe.model),
        "shapes": profiles,
        "calibration": _plain(recipe.calibration) if recipe.calibration else None,
        "evaluation": _plain(recipe.evaluation),
        "budget": {m.metric: _margin_plain(m) for m in recipe.budget},
        "optimize": recipe.optimize,
        "tuning": _plain(recipe.tuning) if recipe.tuning else None,
        "search": _plain(recipe.search) if recipe.optimize else None,
        "variants": {v.name: variant_plain(v) for v in recipe.variants} or None,
        "kv": _plain(recipe.kv) if recipe.kv else None,
        "targets": list(recipe.targets),
    }
    kept = {k: v for k, v in document.items() if v is not None}
    return yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def digest(recipe: Recipe) -> str:
    """sha256 hex of the resolved recipe: equal for recipes that mean the same, whatever their comments and layout."""
    return hashlib.sha256(resolved(recipe).encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a recipe, with descriptions, for editors and other tools."""
    schema = _RecipeKeys.model_json_schema(by_alias=True)
    schema["$defs"]["ModelKeys"]["properties"]["family"]["enum"] = list(models.names())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _find_manifests(document: Document, recipe: Path) -> dict[str, Path]:
    """The manifests that the recipe names, by name; one that is nowhere is reported."""
    found: dict[str, Path] = {}
    for section in ("calibration", "tuning", "evaluation"):
        named = _listed(recipe_rules.mapping(document.value, section).get("data"))
        for name in named if isinstance(named, list) else ():
            if not isinstance(name, str) or not name:
                continue
            file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
            folders = (recipe.parent / ".." / "calibration", Path("calibration"), recipe.parent)
            path = next((f / file for f in folders if (f / file).is_file()), None)
            if path is None:
                known = sorted({p.stem for f in folders[:2] for p in f.glob("*.yaml")})
                choice = (
                    f"choose from: {', '.join(known)}; or give the path of a manifest" if known else "check the path"
                )
                document.report((section, "data"), f"no data manifest {shown(name)}{nearest(name, known)}", choice)
            else:
                found[name] = path
    return found


def _profiles(shapes: Mapping[str, Any]) -> tuple[Profile, ...]:
    named = shapes if all(isinstance(v, dict) for v in shapes.values()) else {"default": shapes}
    return tuple(Profile(n, tuple(Axis(a, *sizes) for a, sizes in axes.items())) for n, axes in named.items())


def _margin_plain(margin: Margin) -> dict[str, Any]:
    return {"max_drop": margin.max_drop, "confidence": margin.confidence} | (
        {"costs": dict(margin.costs)} if margin.costs else {}
    )


def _plain(keys: ModelKeys | CalibrationKeys | EvaluationKeys | TuningKeys | SearchKeys | KvKeys) -> dict[str, Any]:
    """A section's keys with defaults, less those that are unset or say nothing for its tasks."""
    plain = keys.model_dump(exclude_none=True)
    if isinstance(keys, ModelKeys) and "embed" not in keys.tasks:
        del plain["pooling"], plain["normalize"]
    return plain
