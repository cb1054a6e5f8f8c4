"""Menus: which formats a target computes in, and the ways there are to find each format's numbers.

A menu is a set of formats that one bundle can mix: they share the float type and all other settings. Several menus of a
target differ in those. Nothing here is a rule about which layers take which format; that is what the search finds.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from medcompile.errors import UsageError
from medcompile.search.cost import FLOAT
from medcompile.search.line import Assignment
from medcompile.spec import LayerRule, Precision, Scalar, Target, Variant

_INT8 = Variant("int8", weights=Precision.INT8, activations=Precision.INT8, method="smoothquant")
_WEIGHTS = Variant("int8-weights", weights=Precision.INT8)


@dataclass(frozen=True)
class Menu:
    """base: nothing quantized. formats: by name, variants that differ in how the format's numbers are found; the first
    is tried alone where there is no data to compare them on."""

    name: str
    base: Variant
    formats: Mapping[str, tuple[Variant, ...]]

    def mixture(self, name: str, assignment: Assignment, ways: Mapping[str, Variant]) -> Variant:
        """The variant in which each group has its format. ways: the chosen one of each format.

        The variant's own format is one with static activations where there is such, because symmetry, clipping and
        method are theirs; else the most common one.
        """
        counts = Counter(f for f in assignment.values() if f != FLOAT)
        if not counts:
            return replace(self.base, name=name)
        main = min(counts, key=lambda f: (not _is_static(ways[f]), -counts[f], f))
        rules = tuple(
            _rule(node, None if format_ == FLOAT else ways[format_])
            for group, format_ in sorted(assignment.items())
            if format_ != main
            for node in group
        )
        compute: dict[str, Scalar] = dict(self.base.compute)
        for format_ in counts:
            compute |= ways[format_].compute
        return replace(ways[main], name=name, layers=rules, compute=compute)


def menus(target: Target, floats: Sequence[str], objective: str, *, decoder: bool) -> tuple[Menu, ...]:
    """The target's menus, the fastest floats first. floats: what it computes in, such as bfloat16, float32.

    Raises UsageError for a backend that is not searched.
    """
    kinds = {
        "openvino": _openvino_decoder if decoder else _openvino,
        "onnxruntime": _onnxruntime_decoder if decoder else _onnxruntime,
        "tensorrt": _tensorrt_decoder if decoder else _tensorrt,
    }
    if target.backend not in kinds:
        raise UsageError(
            f"optimize has no menu of formats for {target.name}",
            fix="leave it out of targets, or write variants instead of optimize",
        )
    found = kinds[target.backend](tuple(floats), objective)
    if objective != "size":
        return found
    # Tables that tokens are looked up in are most of a small model, and add nothing to its time.
    smaller = tuple(
        replace(m, name=f"{m.name}, int8 embeddings", formats={f: _embedded(w) for f, w in m.formats.items()})
        for m in found
    )
    return (*smaller, *found)


def format_of(variant: Variant) -> str:
    """The name that a variant's own format has in menus."""
    if variant.weights is None:
        return FLOAT
    if variant.block_size:
        return f"{variant.weights}-g{variant.block_size}"
    if variant.activations is None:
        return f"{variant.weights}-weights"
    return f"{variant.weights}-dynamic" if variant.dynamic else str(variant.weights)


def _embedded(ways: tuple[Variant, ...]) -> tuple[Variant, ...]:
    return tuple(replace(way, embeddings=Precision.INT8) for way in ways)


def _is_static(variant: Variant) -> bool:
    return variant.activations is not None and not variant.dynamic


def _rule(node: str, variant: Variant | None) -> LayerRule:
    pattern = glob.escape(node)
    if variant is None:
        return LayerRule(pattern)
    return LayerRule(pattern, variant.weights, variant.activations, variant.dynamic, variant.block_size)


def _static(base: Variant, *, symmetric: bool) -> tuple[Variant, ...]:
    """The ways to static int8: SmoothQuant's strength searched by itself, or none of it and a range by each method."""
    eased = replace(_INT8, symmetric=symmetric, compute=base.compute, float_dtype=base.float_dtype)
    plain = [replace(eased, method="rtn", clipping=c) for c in ("mse", "percentile", "entropy")]
    return tuple(replace(way, bias_correction=b) for way in (eased, *plain) for b in (False, True))


def _weight_only(
    base: Variant, name: str, methods: Sequence[str], block_size: int | None = None
) -> tuple[Variant, ...]:
    weights = Precision.INT4 if name.startswith("int4") else Precision.INT8
    made = replace(base, name=name, weights=weights, block_size=block_size)
    return tuple(replace(made, method=method) for method in methods)


def _dynamic(base: Variant) -> dict[str, tuple[Variant, ...]]:
    made = replace(base, name="int8-dynamic", weights=Precision.INT8, activations=Precision.INT8, dynamic=True)
    return {"int8-dynamic": (made,)}


def _openvino(floats: tuple[str, ...], objective: str) -> tuple[Menu, ...]:
    found = []
    for dtype in (f for f in ("bfloat16", "float32") if f in floats):
        base = Variant(FLOAT, compute={"float": dtype})
        grouped = replace(base, compute={**base.compute, "dynamic_group": 128})
        formats = {"int8": _static(base, symmetric=False), **_dynamic(grouped)}
        if objective == "size":
            formats |= {"int4-g32": _weight_only(base, "int4-g32", ("awq", "gptq", "rtn"), 32)}
        found.append(Menu(dtype, base, formats))
    return tuple(found)


def _onnxruntime(floats: tuple[str, ...], objective: str) -> tuple[Menu, ...]:
    base = Variant(FLOAT)
    formats = {
        "int8": _static(base, symmetric=False),
        **_dynamic(base),
        "int8-g128": _weight_only(base, "int8-g128", ("rtn",), 128),
        "int8-weights": (_WEIGHTS,),
    }
    if objective == "size":
        formats |= {"int4-g32": _weight_only(base, "int4-g32", ("awq", "gptq", "rtn"), 32)}
    # Rescaling a tensor that other nodes read too is an operator of its own here, which small models feel.
    unscaled = {**formats, "int8": tuple(way for way in formats["int8"] if way.method == "rtn")}
    return (Menu("float32", base, formats), Menu("float32, unscaled", base, unscaled))


def _tensorrt(floats: tuple[str, ...], objective: str) -> tuple[Menu, ...]:
    found = []
    for dtype in ("float16", "bfloat16", "float32"):
        base = Variant(FLOAT, float_dtype=Precision(dtype))
        formats = {"int8": _static(base, symmetric=True)}
        formats |= {"int4-g128": _weight_only(base, "int4-g128", ("awq", "gptq", "rtn"), 128)}
        found.append(Menu(dtype, base, formats))
    return tuple(found)


def _openvino_decoder(floats: tuple[str, ...], objective: str) -> tuple[Menu, ...]:
    found = []
    for group in (128, 32, 0):
        for dtype in (f for f in ("bfloat16", "float32") if f in floats):
            compute: dict[str, Scalar] = {"float": dtype, "kv": dtype, "dynamic_group": group}
            base = Variant(FLOAT, compute=compute)
            menu = _decoder_menu(
                f"{dtype}, activations by {group or 'none'}", base, (128, 32) if group == 0 else (group,)
            )
            found.append(replace(menu, formats={**menu.formats, **_dynamic(base)}) if group else menu)
    return tuple(found)


def _onnxruntime_decoder(floats: tuple[str, ...], objective: str) -> tuple[Menu, ...]:
    base = Variant(FLOAT)
    menu = _decoder_menu("float32", base, (128, 32))
    # Products of 8 bits: where all weights fit the cache, arithmetic decides, and 4 bits are no faster.
    products = {**_dynamic(base), "int8-g128": _weight_only(base, "int8-g128", ("rtn",), 128)}
    return (replace(menu, formats={**menu.formats, **products}),)


def _tensorrt_decoder(floats: tuple[str, ...], objective: str) -> tuple[Menu, ...]:
    bases = (Variant(FLOAT, float_dtype=Precision(dtype)) for dtype in ("float16", "bfloat16"))
    return tuple(_decoder_menu(str(base.float_dtype), base, (128,)) for base in bases)


def _decoder_menu(name: str, base: Variant, blocks: Sequence[int]) -> Menu:
    formats = {f"int4-g{b}": _weight_only(base, f"int4-g{b}", ("gptq", "awq", "rtn"), b) for b in blocks}
    return Menu(name, base, {**formats, "int8-weights": _weight_only(base, "int8-weights", ("rtn",))})
