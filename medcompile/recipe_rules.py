"""Rules that tie a recipe's keys together: what no single key can get wrong by itself.

They run on the plain values, whether or not each key passed its own check, so that all problems come out at once.
What one key alone may hold is the schema's business, in recipe.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

from medcompile import metrics, models
from medcompile.recipe_yaml import Keys, nearest, shown
from medcompile.spec import WEIGHT_ONLY_METHODS

Task = Literal["embed", "token-classification", "sequence-classification", "fill-mask", "image", "text", "generate"]

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

FLOAT = "float"
"""What a recipe calls the format of layers that are not quantized."""

_CALIBRATED = ("smoothquant", *WEIGHT_ONLY_METHODS)

_NOT_OF_STORED = (
    *("activations", "dynamic", "symmetric", "block_size", "method", "smoothing"),
    *("layers", "clipping", "bias_correction"),
)

Broken = Iterator[tuple[Keys, str, str]]
"""(way to the value, message, fix) for each rule broken."""


def broken(value: dict[str, Any]) -> Broken:
    """Every rule that the recipe breaks. Parts of a wrong type are passed over: the schema tells of them."""
    model = mapping(value, "model")
    variants = {str(n): v for n, v in mapping(value, "variants").items() if isinstance(v, dict)}
    yield from _model_checks(model)
    yield from _shape_checks(mapping(value, "shapes"))
    yield from _budget_checks(mapping(value, "budget"), model)
    if value.get("kv") is not None and _tasks(model) and "generate" not in _tasks(model):
        yield ("kv",), "kv is for the task generate, which is not asked for", "remove it"
    yield from _search_checks(value)
    for name in mapping(value, "variants"):
        if not NAME.fullmatch(name):
            yield ("variants", name), f"variants: {shown(name)} is not a name (a-z, 0-9, . _ -)", "rename the variant"
    for name, variant in variants.items():
        yield from _variant_checks(("variants", name), variant)
        yield from _graph_checks(("variants", name, "graphs"), variant.get("graphs"), _tasks(model))
    static = [n for n, v in variants.items() if any(map(_is_static, _forms(v)))]
    needs = [n for n, v in variants.items() if v.get("method") in _CALIBRATED or v.get("bias_correction") is True]
    static += [n for n in needs if n not in static]
    calibration = mapping(value, "calibration")
    if static and value.get("calibration") is None:
        yield (
            ("calibration",),
            f"missing key 'calibration' in the file; variants.{static[0]} needs statistics of activations",
            "add calibration: {data: <manifest>}, or dynamic: true to the variant",
        )
    percentile, method = calibration.get("percentile"), calibration.get("method")
    if percentile is not None and "percentile" not in (method, *(v.get("clipping") for v in variants.values())):
        yield ("calibration", "percentile"), "calibration.percentile goes with method: percentile", "change the method"
    if percentile is None and method == "percentile":
        yield ("calibration", "method"), "calibration.method percentile has no percentile", "add percentile: 99.99"


def _search_checks(value: dict[str, Any]) -> Broken:
    """Either variants or optimize, and what goes with it."""
    searched = value.get("optimize") is not None
    if searched and value.get("variants") is not None:
        yield (
            ("optimize",),
            "optimize finds the variants, and variants are listed too",
            "remove variants, or optimize with tuning and search",
        )
    elif not searched and value.get("variants") is None:
        yield (
            ("variants",),
            "missing key 'variants' in the file",
            "add variants: {fp32: {}, int8: {weights: int8, activations: int8}}, or optimize: latency",
        )
    for key in ("tuning", "search"):
        if not searched and value.get(key) is not None:
            yield (key,), f"{key} goes with optimize, which is not asked for", f"remove {key}, or variants"
    for key in ("calibration", "tuning"):
        if searched and value.get(key) is None:
            yield (
                (key,),
                f"missing key {key!r} in the file; optimize needs data of three roles",
                f"add {key}: {{data: <manifest>}}, other items than evaluation's",
            )


def method_of(variant: dict[str, Any]) -> str:
    """The quantizer of a variant: the one it names, else smoothquant for calibrated activations whose clipping is not
    chosen, and rtn otherwise."""
    smooth = not variant.get("clipping") and any(_is_static(f) and f["activations"] == "int8" for f in _forms(variant))
    return variant.get("method") or ("smoothquant" if smooth else "rtn")


def _forms(variant: dict[str, Any]) -> list[dict[str, Any]]:
    """The variant's own format and those of its layers, as mappings; without what is written as `float`."""
    return [variant, *(layer for layer in mapping(variant, "layers").values() if isinstance(layer, dict))]


def _is_static(form: dict[str, Any]) -> bool:
    return form.get("activations") is not None and form.get("dynamic") is not True


def _model_checks(model: dict[str, Any]) -> Broken:
    source, revision, tasks = model.get("source"), model.get("revision"), _tasks(model)
    from_hub = isinstance(source, str) and source.startswith("hf:")
    if from_hub and revision is None:
        yield (
            ("model", "revision"),
            "missing key 'revision' in model; a hub model is pinned to a commit",
            "add revision: <the commit's 40 hex digits, on the model page under Files and versions, History>",
        )
    elif from_hub and not (isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision)):
        yield (
            ("model", "revision"),
            f"model.revision: {shown(revision)} is not a commit (40 of 0-9 a-f); branches and tags can move",
            "write the full commit, in quotes if it is all digits",
        )
    elif isinstance(source, str) and source.startswith(("path:", "package:")) and revision is not None:
        yield ("model", "revision"), "model.revision belongs to hf: sources", "remove it"
    family = model.get("family")
    if family in models.names():
        known = models.get(str(family)).tasks
        for task in (t for t in tasks if t not in known):
            yield (
                ("model", "tasks"),
                f"model.tasks: the family {family} has no task {task}{nearest(task, known)}",
                f"choose from: {', '.join(known)}",
            )
    if tasks and "embed" not in tasks:
        for key in ("pooling", "normalize"):
            if key in model:
                yield ("model", key), f"model.{key} is for the task embed, which is not asked for", "remove it"
    if tasks and not {"image", "text"} & set(tasks) and "templates" in model:
        yield ("model", "templates"), "model.templates is for the tasks image and text", "remove it"
    if model.get("labels") and tasks and not any(t.endswith("-classification") for t in tasks):
        yield ("model", "labels"), "model.labels is for classification tasks, which are not asked for", "remove it"


def _shape_checks(shapes: dict[str, Any]) -> Broken:
    named = [n for n, v in shapes.items() if isinstance(v, dict)]
    if named and len(named) < len(shapes):
        plain = next(n for n in shapes if n not in named)
        yield ("shapes", plain), "shapes mixes axes and named profiles", f"put {plain} into each profile"
    groups: list[tuple[Keys, Any]] = [(("shapes", n), shapes[n]) for n in named] or [(("shapes",), shapes)]
    for way, axes in groups:
        if not axes and named:
            yield way, f"{'.'.join(map(str, way))} has no axes", "write for example batch: [1, 8, 64]"
        for axis, sizes in axes.items():
            place, example = (*way, axis), f"write {axis}: [min, opt, max], for example [1, 8, 64]"
            label = ".".join(map(str, place))
            if isinstance(sizes, dict) and not named:
                continue
            whole = isinstance(sizes, list) and all(type(s) is int for s in sizes)
            if not whole or len(sizes) != 3:
                yield place, f"{label}: {shown(sizes)} is not three whole numbers", example
            elif not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                yield (
                    place,
                    f"{label}: {sizes} is not 1 <= min <= opt <= max",
                    f"write {axis}: {sorted(max(1, s) for s in sizes)}",
                )


def _budget_checks(budget: dict[str, Any], model: dict[str, Any]) -> Broken:
    tasks = _tasks(model)
    for metric in budget if tasks else ():
        if not any(metrics.is_metric(task, metric) for task in tasks):
            known = sorted({name.replace("@k", "@1") for task in tasks for name in metrics.metric_names(task)})
            yield (
                ("budget", metric),
                f"budget: no metric {shown(metric)} for {', '.join(tasks)}{nearest(metric, known)}",
                f"choose from: {', '.join(known)}",
            )
        yield from _margin_checks(metric, mapping(budget, metric), tasks)


def _margin_checks(metric: str, margin: dict[str, Any], tasks: list[str]) -> Broken:
    costs, drop, way = margin.get("costs"), margin.get("max_drop"), ("budget", metric)
    if not metrics.is_cost(metric):
        if isinstance(drop, int | float) and drop >= 1:
            yield (
                (*way, "max_drop"),
                f"budget.{metric}.max_drop: {drop} is not less than 1",
                "write a fraction: 0.01 is one point",
            )
        if costs is not None:
            yield (*way, "costs"), f"budget.{metric}: costs belong to the metric cost", "remove them"
    elif not isinstance(costs, dict):
        yield (
            way,
            f"missing key 'costs' in budget.{metric}: what each mistake costs",
            "add costs: {disease: {healthy: 10}}, or of entities {missed: 10, false_alarm: 1}",
        )
    elif "token-classification" in tasks and set(costs) - set(metrics.COSTS_OF_ENTITIES):
        yield (
            (*way, "costs"),
            f"budget.{metric}.costs: of entities they are {' and '.join(metrics.COSTS_OF_ENTITIES)}",
            "write costs: {missed: 10, false_alarm: 1}",
        )


def _variant_checks(way: Keys, variant: dict[str, Any]) -> Broken:
    weights, label = variant.get("weights"), ".".join(map(str, way))
    given = [k for k in _NOT_OF_STORED if variant.get(k) not in (None, False, "rtn", {})]
    if weights == "stored" and given:
        yield (
            (*way, given[0]),
            f"{label}: stored weights have the formats that the checkpoint gave them",
            f"remove {', '.join(given)}, or write weights: int8 or int4",
        )
        return
    yield from _format_checks(way, variant)
    for pattern, layer in mapping(variant, "layers").items():
        if isinstance(layer, dict):
            yield from _format_checks((*way, "layers", pattern), layer)
    forms = _forms(variant)
    if variant.get("symmetric") is False and any(form.get("weights") == "float8" for form in forms):
        yield (*way, "symmetric"), f"{label}: float8 has no zero points that could move", "remove symmetric"
    if "symmetric" in variant and not any(map(_is_static, forms)):
        dynamic = any(form.get("dynamic") is True for form in forms)
        yield (
            (*way, "symmetric"),
            f"{label}: symmetric belongs to calibrated activations, and these are dynamic"
            if dynamic
            else f"{label}: symmetric is about activations, which stay in float",
            "remove symmetric",
        )
    yield from _method_checks(way, variant)
    if variant.get("embeddings") is not None and not any(map(_has_weights, forms)):
        yield (*way, "embeddings"), f"{label} quantizes embeddings but no weights", "add weights: int8"


def _has_weights(form: dict[str, Any]) -> bool:
    return form.get("weights") not in (None, FLOAT)


def _format_checks(way: Keys, form: dict[str, Any]) -> Broken:
    """Of a variant, or of some of its layers: weights, activations, dynamic, block_size."""
    weights, activations = form.get("weights"), form.get("activations")
    label = ".".join(map(str, way))
    if activations is not None and not _has_weights(form):
        yield (*way, "activations"), f"{label} quantizes activations but no weights", "add weights: int8"
    if activations is not None and weights == "int4":
        yield (*way, "activations"), f"{label}: int4 weights go with float activations", "remove activations"
    if "float8" in (weights, activations) and None not in (weights, activations) and weights != activations:
        yield (*way, "activations"), f"{label}: float8 goes with float8", "write float8 for weights and activations"
    if weights == "float8" and (activations is None or form.get("dynamic") is True):
        yield (
            (*way, "weights"),
            f"{label}: float8 has one stored scale per tensor, for weights and activations both",
            "add activations: float8, and leave out dynamic",
        )
    if form.get("dynamic") is True and activations is None:
        yield (
            (*way, "dynamic"),
            f"{label}: dynamic says how activations are quantized, and they are not",
            ("add activations: int8, or remove dynamic"),
        )
    if form.get("block_size") is not None and (weights not in ("int4", "int8") or activations is not None):
        yield (
            (*way, "block_size"),
            f"{label}: block_size is for int4 or int8 weights under activations that stay in float",
            "remove block_size, or write weights: int8 without activations",
        )


def _method_checks(way: Keys, variant: dict[str, Any]) -> Broken:
    """How a variant's numbers are found: method, smoothing, clipping, bias_correction."""
    forms, label, named = _forms(variant), ".".join(map(str, way)), variant.get("method")
    if named == "smoothquant" and all(form.get("activations") is None for form in forms):
        yield (*way, "method"), f"{label}: smoothquant eases activations, which stay in float", "write method: rtn"
    if named in WEIGHT_ONLY_METHODS and not any(_has_weights(f) and f.get("activations") is None for f in forms):
        yield (
            (*way, "method"),
            f"{label}: {named} is for quantized weights under activations that stay in float",
            "write weights: int4 without activations, or another method",
        )
    method = method_of(variant)
    if variant.get("smoothing") is not None and method != "smoothquant":
        yield (*way, "smoothing"), f"{label}: smoothing goes with method: smoothquant", "remove smoothing"
    if variant.get("clipping") is not None and not any(map(_is_static, forms)):
        yield (
            (*way, "clipping"),
            f"{label}: clipping is about activations that calibration measures, and there are none",
            "remove clipping, or add activations: int8",
        )
    elif variant.get("clipping") is not None and method == "smoothquant":
        yield (
            (*way, "clipping"),
            f"{label}: clipping has no say where smoothquant rescales the channels, which then take all that was seen",
            "write method: rtn, or remove clipping",
        )
    if variant.get("bias_correction") is True and any(form.get("weights") == "float8" for form in forms):
        yield (*way, "bias_correction"), f"{label}: bias_correction is for integer weights", "remove it"
    elif variant.get("bias_correction") is True and not any(map(_has_weights, forms)):
        yield (*way, "bias_correction"), f"{label}: bias_correction is for quantized weights", "add weights: int8"


def _graph_checks(way: Keys, graphs: object, tasks: list[str]) -> Broken:
    for graph in graphs if isinstance(graphs, list) and tasks else ():
        if graph not in tasks:
            yield (
                way,
                f"{'.'.join(map(str, way))}: no graph {shown(graph)}{nearest(str(graph), tasks)}",
                f"choose from the tasks: {', '.join(tasks)}",
            )


def _tasks(model: dict[str, Any]) -> list[str]:
    """The tasks asked for, or none if one of them is unknown: that is reported already, and nothing follows from it."""
    asked = model.get("tasks")
    return asked if isinstance(asked, list) and all(t in get_args(Task) for t in asked) else []


def mapping(value: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under key, or an empty one where something else stands there."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}
