"""Recipes: what good ones become, and what every bad one is told."""

# ruff: noqa: E501 (a table reads better with one case a line)

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medcompile import recipe
from medcompile.errors import Problem, RecipeError
from medcompile.spec import Axis, LayerRule, Margin, Precision

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

GOOD = """\
schema_version: 1
name: good
model:
  family: bert
  tasks: [embed]
  source: hf:organization/model
  revision: 67c9c25b46986521ca33df05d8540da1210b3256
  pooling: mean
shapes:
  batch: [1, 8, 64]
  sequence: [8, 128, 512]
calibration:
  data: notes
  samples: 64
  method: mse
evaluation:
  data: pairs
budget:
  cosine: {max_drop: 0.01}
variants:
  fp32: {}
  int8:
    weights: int8
    activations: int8
    symmetric: false
targets: [onnxruntime-cpu, openvino-cpu]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place for recipes, with the two manifests that GOOD names (only that they are there matters)."""
    (tmp_path / "calibration").mkdir()
    for name in ("notes", "pairs"):
        (tmp_path / "calibration" / f"{name}.yaml").write_text("name: x\n")
    (tmp_path / "recipes").mkdir()
    return tmp_path


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipes" / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(folder: Path, text: str | bytes, overrides: tuple[str, ...] = ()) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        recipe.load(write(folder, text), overrides)
    assert str(caught.value) == "\n".join(str(p) for p in caught.value.problems)
    return caught.value.problems


def test_a_good_recipe_becomes_the_types_of_spec(folder: Path) -> None:
    loaded = recipe.load(write(folder, GOOD))
    assert loaded.name == "good"
    assert loaded.model.tasks == ["embed"]
    assert loaded.model.normalize is True
    assert [p.name for p in loaded.profiles] == ["default"]
    assert loaded.profiles[0].axes == (Axis("batch", 1, 8, 64), Axis("sequence", 8, 128, 512))
    assert loaded.budget == (Margin("cosine", 0.01, 0.95),)
    assert loaded.calibration is not None
    assert loaded.calibration.batch == 8
    int8 = loaded.variant("int8")
    assert (int8.weights, int8.activations, int8.symmetric) == (Precision.INT8, Precision.INT8, False)
    assert loaded.variant("fp32").float_dtype is Precision.FLOAT32
    assert loaded.targets == ("onnxruntime-cpu", "openvino-cpu")
    assert loaded.manifests["pairs"].samefile(folder / "calibration" / "pairs.yaml")


def test_calibrated_activations_are_smoothed_unless_the_variant_says_otherwise(folder: Path) -> None:
    given = ("variants.dynamic={weights: int8, activations: int8, dynamic: true}", "variants.w8={weights: int8}")
    loaded = recipe.load(write(folder, GOOD), given)
    assert [loaded.variant(n).method for n in ("int8", "dynamic", "w8", "fp32")] == ["smoothquant", "rtn", "rtn", "rtn"]
    assert loaded.variant("int8").smoothing is None
    plain = recipe.load(write(folder, GOOD), ("variants.int8.method=rtn",))
    assert plain.variant("int8").method == "rtn"
    fixed = recipe.load(write(folder, GOOD), ("variants.int8.smoothing=0.75",))
    assert fixed.variant("int8").smoothing == 0.75
    assert recipe.load(write(folder, recipe.resolved(fixed))) == fixed


def test_named_profiles_keep_their_names(folder: Path) -> None:
    axes = "  {}: {{batch: [1, 1, 8], sequence: [8, 64, 128]}}\n"
    text = GOOD.replace("  batch: [1, 8, 64]\n  sequence: [8, 128, 512]\n", axes.format("short") + axes.format("long"))
    assert [p.name for p in recipe.load(write(folder, text)).profiles] == ["short", "long"]


# (what to put in place of what in GOOD, where the problem stands, what the message says, what the fix says)
BAD = {
    "unknown key": (("    weights: int8", "    weigths: int8"), (23, 5), "'weigths' in variants.int8. Did you mean 'weights'?", ""),
    "unknown key at the root": (("targets:", "target:"), (26, 1), "'target' in the file. Did you mean 'targets'?", ""),
    "key that belongs elsewhere": (("name: good", "name: good\npooling: cls"), (3, 1), "unknown key 'pooling'", "move it to model"),
    "missing section": (("name: good\n", ""), (1, 1), "missing key 'name' in the file", "add name:"),
    "missing key": (("  family: bert\n", ""), (3, 1), "missing key 'family' in model", "add family: bert"),
    "text for a number": (("samples: 64", "samples: many"), (14, 12), "must be a whole number, not the text 'many'", "256"),
    "true for a number": (("samples: 64", "samples: true"), (14, 12), "must be a whole number, not true", ""),
    "fraction for a whole number": (("samples: 64", "samples: 6.5"), (14, 12), "must be a whole number, not 6.5", ""),
    "yes for true": (("symmetric: false", "symmetric: no"), (25, 16), "must be true or false, not the text 'no'", ""),
    "list for a mapping": (("evaluation:\n  data: pairs", "evaluation: [pairs]"), (16, 13), "must be a mapping", ""),
    "text for a list": (("[embed]", "embed"), (5, 10), "must be a list, not the text 'embed'", "[embed]"),
    "endless number": (("samples: 64", "samples: " + "9" * 5000), (14, 12), "can't be read as int", "plain"),
    "nothing for a variant": (("fp32: {}", "fp32:"), (21, 8), "must be a mapping of keys to values, not nothing", "fp32: {}"),
    "nothing for a section": (("model:\n", "unused:\n"), (3, 1), "unknown key 'unused'", "keys here"),
    "wrong task": (("[embed]", "[embedd]"), (5, 11), "'embedd' is not known here. Did you mean 'embed'?", "fill-mask"),
    "task twice": (("[embed]", "[embed, embed]"), (5, 10), "'embed' stands here twice", "once"),
    "no task": (("[embed]", "[]"), (5, 10), "model.tasks is empty", "[embed]"),
    "wrong family": (("bert\n", "brt\n"), (4, 11), "no model family 'brt'. Did you mean 'bert'?", "bert"),
    "wrong method": (("method: mse", "method: msee"), (15, 11), "Did you mean 'mse'?", "entropy"),
    "wrong precision": (("    weights: int8", "    weights: int7"), (23, 14), "'int7' is not known here. Did you mean", "int4"),
    "wrong schema version": (("version: 1", "version: 2"), (1, 17), "2 is not known here", "choose from: 1"),
    "bad name": (("name: good", "name: My Model"), (2, 7), "'My Model' is not a name", "write my-model"),
    "bad variant name": (("  int8:\n", "  INT8:\n"), (22, 3), "'INT8' is not a name", "rename"),
    "unknown target": (("openvino-cpu", "openvino"), (26, 28), "Did you mean 'openvino-cpu'?", "tensorrt-rtx"),
    "unquoted null": (("openvino-cpu", "null"), (26, 28), 'Write "null" in quotes', ""),
    "target twice": (("openvino-cpu", "onnxruntime-cpu"), (26, 10), "stands here twice", ""),
    "shape not rising": (("[1, 8, 64]", "[1, 64, 8]"), (10, 10), "[1, 64, 8] is not 1 <= min <= opt <= max", "[1, 8, 64]"),
    "shape with zero": (("[1, 8, 64]", "[0, 8, 64]"), (10, 10), "is not 1 <= min", ""),
    "shape of two": (("[1, 8, 64]", "[1, 8]"), (10, 10), "is not three whole numbers", "[min, opt, max]"),
    "shape of words": (("[1, 8, 64]", "[a, b, c]"), (10, 10), "is not three whole numbers", ""),
    "axes and profiles mixed": (("[1, 8, 64]", "{x: [1, 2, 3]}"), (11, 13), "mixes axes and named profiles", "each profile"),
    "branch as revision": (("67c9c25b46986521ca33df05d8540da1210b3256", "main"), (7, 13), "'main' is not a commit", "full commit"),
    "short revision": (("67c9c25b46986521ca33df05d8540da1210b3256", "67c9c25"), (7, 13), "is not a commit", ""),
    "no revision": (("  revision: 67c9c25b46986521ca33df05d8540da1210b3256\n", ""), (3, 1), "missing key 'revision'", "40 hex"),
    "revision of a folder": (("hf:organization/model", "path:here"), (7, 13), "belongs to hf: sources", "remove"),
    "package without version": (("hf:organization/model", "package:x/y"), (6, 11), "pins no version", "<version>"),
    "package without path": (("hf:organization/model", "package:x==1"), (6, 11), "is not of the form package:", ""),
    "bare source": (("hf:organization/model", "organization/model"), (6, 11), "does not say where", "hf:<organization>"),
    "deep hub path": (("hf:organization/model", "hf:a/b/c"), (6, 11), "is not of the form hf:", ""),
    "wrong metric": (("cosine:", "f1:"), (19, 3), "no metric 'f1' for embed", "cosine"),
    "misspelt metric": (("cosine:", "cosin:"), (19, 3), "Did you mean 'cosine'?", ""),
    "drop in percent": (("max_drop: 0.01", "max_drop: 1"), (19, 22), "1 is not less than 1", ""),
    "drop of zero": (("max_drop: 0.01", "max_drop: 0"), (19, 22), "0 is not more than 0", ""),
    "confidence in percent": (("0.01}", "0.01, confidence: 95}"), (19, 40), "95 is not less than 1", ""),
    "empty budget": (("  cosine: {max_drop: 0.01}", "  {}"), (19, 3), "budget is empty", "max_drop"),
    "int4 activations": (("activations: int8", "activations: int4"), (24, 18), "'int4' is not known here", "int8"),
    "int4 with activations": (("    weights: int8", "    weights: int4"), (24, 18), "int4 weights go with float activations", ""),
    "float8 with int8": (("    weights: int8", "    weights: float8"), (24, 18), "float8 goes with float8", "for weights and"),
    "stored in blocks": (("fp32: {}", "fp32: {weights: stored, block_size: 32}"), (21, 39), "formats that the checkpoint", "remove block"),
    "float8 alone": (("fp32: {}", "fp32: {weights: float8}"), (21, 19), "one stored scale per tensor", "activations: float8"),
    "activations alone": (("    weights: int8\n", ""), (23, 18), "quantizes activations but no weights", "weights: int8"),
    "block under int8": (("symmetric: false", "block_size: 128"), (25, 17), "block_size is for int4 or int8", "int8"),
    "odd block": (("symmetric: false", "block_size: 100"), (25, 17), "100 is not known here", "128"),
    "dynamic and symmetric": (("symmetric: false", "symmetric: false\n    dynamic: true"), (25, 16), "dynamic", "remove symmetric"),
    "dynamic without activations": (("fp32: {}", "fp32: {dynamic: true}"), (21, 19), "and they are not", "activations: int8"),
    "symmetric without activations": (("fp32: {}", "fp32: {symmetric: false}"), (21, 21), "stay in float", ""),
    "smoothquant on float": (("fp32: {}", "fp32: {method: smoothquant}"), (21, 18), "stay in float", "rtn"),
    "gptq on int8 activations": (("symmetric: false", "method: gptq"), (25, 13), "stay in float", "int4 without activations"),
    "awq on float": (("fp32: {}", "fp32: {method: awq}"), (21, 18), "awq is for quantized weights", "int4"),
    "embeddings alone": (("fp32: {}", "fp32: {embeddings: int8}"), (21, 22), "embeddings but no weights", "int8"),
    "layers of no format": (("fp32: {}", 'fp32: {layers: {"*": int8}}'), (21, 24), "'int8' is no format of layers", "write float, or {weights: int8}"),
    "layers without weights": (("fp32: {}", 'fp32: {layers: {"*": {}}}'), (21, 19), "missing key 'weights' in variants.fp32.layers.*", "int8"),
    "unknown key of layers": (("fp32: {}", 'fp32: {layers: {"*": {weight: int8}}}'), (21, 25), "'weight' in variants.fp32.layers.*. Did you mean 'weights'?", ""),
    "float layers with activations": (("fp32: {}", 'fp32: {layers: {"*": {weights: float, activations: int8}}}'), (21, 54), "activations but no weights", ""),
    "int4 layers with activations": (("fp32: {}", 'fp32: {layers: {"*": {weights: int4, activations: int8}}}'), (21, 53), "variants.fp32.layers.*: int4 weights go with float", ""),
    "stored with layers": (("fp32: {}", 'fp32: {weights: stored, layers: {"*": float}}'), (21, 35), "formats that the checkpoint", "remove layers"),
    "clipping with smoothquant": (("symmetric: false", "clipping: mse\n    method: smoothquant"), (25, 15), "clipping has no say where", "rtn"),
    "clipping of float": (("fp32: {}", "fp32: {clipping: mse}"), (21, 20), "and there are none", "activations: int8"),
    "bias of float": (("fp32: {}", "fp32: {bias_correction: true}"), (21, 27), "is for quantized weights", "int8"),
    "bias of float8": (("fp32: {}", "fp32: {weights: float8, activations: float8, bias_correction: true}"), (21, 65), "is for integer weights", "remove it"),
    "asymmetric float8": (("symmetric: false", 'symmetric: false\n    layers: {"*": {weights: float8, activations: float8}}'), (25, 16), "no zero points", "remove symmetric"),
    "smoothing without smoothquant": (("symmetric: false", "smoothing: 0.5\n    method: rtn"), (25, 16), "goes with method: smoothquant", ""),
    "compute with a list": (("fp32: {}", "fp32: {compute: {a: [1]}}"), (21, 19), "a is neither text", ""),
    "no calibration": (("calibration:\n  data: notes\n  samples: 64\n  method: mse\n", ""), (1, 1), "variants.int8 needs statistics", "dynamic: true"),
    "percentile unused": (("method: mse", "method: mse\n  percentile: 99.9"), (16, 15), "goes with method: percentile", ""),
    "percentile missing": (("method: mse", "method: percentile"), (15, 11), "has no percentile", "99.99"),
    "percentile as fraction": (("method: mse", "method: percentile\n  percentile: 0.999"), (16, 15), "is not more than 50", ""),
    "manifest missing": (("data: notes", "data: nots"), (13, 9), "no data manifest 'nots'. Did you mean 'notes'?", "pairs"),
    "pooling without embed": (("[embed]", "[fill-mask]"), (8, 12), "is for the task embed", "remove"),
    "labels without classes": (("pooling: mean", "labels: [O, B-X]"), (8, 11), "is for classification tasks", "remove"),
    "duplicate key": (("  pooling: mean", "  family: bert"), (8, 3), "key 'family' again; line 4 has it", "keep one"),
    "tab": (("  family", "\tfamily"), (4, 1), "a tab; YAML is indented with spaces", "spaces"),
    "unclosed bracket": (("[embed]", "[embed"), (6, 9), "not valid YAML", "brackets"),
    "alias": (("pooling: mean", "pooling: *x"), (8, 12), "anchors and aliases are not used here", "write the value out"),
    "anchor": (("pooling: mean", "pooling: &x mean"), (8, 12), "anchors and aliases are not used here", ""),
    "tag": (("pooling: mean", "pooling: !!python/name:os.system x"), (8, 12), "is not used here", "remove the tag"),
    "merge key": (("pooling: mean", "<<: {pooling: mean}"), (8, 3), "unknown key '<<'", ""),
    "two documents": (("name: good", "---\nname: good"), (2, 1), "not valid YAML", ""),
    "control character": (("pooling: mean", "pooling: me\x07an"), (8, 14), "control character", "delete"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_a_bad_recipe_is_told_where_what_and_how_to_mend_it(folder: Path, case: str) -> None:
    (old, new), place, message, fix = BAD[case]
    assert old in GOOD
    found = problems(folder, GOOD.replace(old, new, 1))
    told = [p for p in found if message in p.message]
    assert told, f"{message!r} is not in:\n" + "\n".join(map(str, found))
    assert (told[0].line, told[0].column) == place
    assert told[0].path.endswith("recipes/r.yaml")
    assert fix in told[0].fix
    assert all(p.fix for p in found)


def test_unknown_key_reads_as_a_compiler_would_say_it(folder: Path) -> None:
    path = write(folder, GOOD.replace("symmetric:", "symetric:"))
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    first = (
        f"{path}:25:5: unknown key 'symetric' in variants.int8. Did you mean 'symmetric'?\n  fix: keys here: float, "
    )
    assert str(caught.value).startswith(first)
    assert caught.value.exit_code == 2


def test_all_problems_come_at_once_in_file_order(folder: Path) -> None:
    text = (
        GOOD.replace("family: bert", "famly: bert")
        .replace("[1, 8, 64]", "[9, 8, 64]")
        .replace("mse", "guess")
        .replace("data: pairs", "data: nowhere")
        .replace("max_drop: 0.01", "max_drop: lots")
        .replace("openvino-cpu", "abacus")
    )
    lines = [p.line for p in problems(folder, text)]
    assert lines == sorted(lines)
    assert set(lines) == {3, 4, 10, 15, 17, 19, 26}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"\x7fELF\x00\x00", "is a binary file"),
        ("name: b\u00e9b\u00e9\n".encode("latin-1"), "is not UTF-8 text here"),
        (b"#" * 1_000_001, "is larger than 1 MB"),
        (b"just words\n", "expected keys and values, found the text 'just words'"),
        (b"- a\n- b\n", "expected keys and values, found a list"),
        (b"[" * 5000, "is nested too deeply"),
    ],
)
def test_a_file_that_is_no_recipe_gets_one_clear_problem(folder: Path, content: bytes, message: str) -> None:
    found = problems(folder, content)
    assert len(found) == 1
    assert message in found[0].message


def test_non_utf8_bytes_are_placed_by_line_and_column(folder: Path) -> None:
    assert (found := problems(folder, b"a: 1\nbb: \xff\n")[0]).line == 2
    assert found.column == 5


def test_a_folder_or_a_missing_file_is_no_recipe(folder: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder, not a file"):
        recipe.load(folder)
    write(folder, GOOD)
    with pytest.raises(RecipeError, match=r"no such file\. Did you mean 'r\.yaml'\?"):
        recipe.load(folder / "recipes" / "rr.yaml")


def test_aliases_can_not_blow_a_small_file_up(folder: Path) -> None:
    text = "a: &a [x, x]\nb: &b [*a, *a]\n"
    assert "anchors and aliases" in problems(folder, text)[0].message


def test_scientific_notation_is_a_number_and_dates_are_text(folder: Path) -> None:
    loaded = recipe.load(write(folder, GOOD.replace("0.01", "1e-2").replace("name: good", 'name: "2024-01-01"')))
    assert loaded.budget[0].max_drop == 0.01
    assert loaded.name == "2024-01-01"


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(folder: Path) -> None:
    plain = recipe.load(write(folder, GOOD))
    assert recipe.load(write(folder, b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())) == plain


def test_overrides_set_scalars_lists_and_whole_sections(folder: Path) -> None:
    path = write(folder, GOOD)
    settings_given = (
        "calibration.samples=32",
        "targets.1=tensorrt",
        "shapes.batch.2=128",
        "variants.fp16={float: float16}",
        "variants.int8.symmetric=true",
    )
    loaded = recipe.load(path, settings_given)
    assert loaded.calibration is not None
    assert loaded.calibration.samples == 32
    assert loaded.targets == ("onnxruntime-cpu", "tensorrt")
    assert loaded.profiles[0].axis("batch").max == 128
    assert loaded.variant("fp16").float_dtype is Precision.FLOAT16
    assert loaded.variant("int8").symmetric is True


def test_an_override_finds_names_that_hold_dots_and_appends_to_lists(folder: Path) -> None:
    path = write(folder, GOOD.replace("  int8:\n", "  int8.v2:\n"))
    loaded = recipe.load(path, ("variants.int8.v2.symmetric=true", 'targets.2="null"'))
    assert loaded.variant("int8.v2").symmetric is True
    assert loaded.targets[-1] == "null"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("calibration.sample=3", "unknown key 'sample' in calibration. Did you mean 'samples'?"),
        ("calibration.samples=few", "must be a whole number, not the text 'few'"),
        ("calibration.samples", "is not key.path=value"),
        ("=3", "is not key.path=value"),
        ("targets.7=openvino-cpu", "targets is a list; '7' is not an index from 0 to 2"),
        ("name.first=x", "name is the text 'good', which has no keys"),
        ("name=[", "not valid YAML"),
        ("model.tasks.0=embedd", "Did you mean 'embed'?"),
        ("shapes.batch=[3, 2, 1]", "is not 1 <= min"),
        ("bogus.deep.key=1", "unknown key 'bogus' in the file"),
    ],
)
def test_a_bad_override_is_named_by_its_own_words(folder: Path, setting: str, message: str) -> None:
    found = problems(folder, GOOD, (setting,))
    assert found[0].path == f"--set {setting}"
    assert str(found[0]).startswith(f"--set {setting}: ")
    assert message in found[0].message


def test_an_override_can_mend_a_bad_value(folder: Path) -> None:
    path = write(folder, GOOD.replace("samples: 64", "samples: many"))
    loaded = recipe.load(path, ("calibration.samples=64",))
    assert loaded == recipe.load(write(folder, GOOD))


def test_a_stored_variant_resolves_to_an_equal_one(folder: Path) -> None:
    loaded = recipe.load(write(folder, GOOD.replace("fp32: {}", "fp32: {weights: stored}", 1)))
    assert loaded.variant("fp32").weights == "stored"
    assert not loaded.variant("fp32").needs_statistics
    assert recipe.load(write(folder, recipe.resolved(loaded))) == loaded


MIXED = """\
  mixed:
    weights: int8
    activations: int8
    symmetric: false
    bias_correction: true
    layers:
      "*.layer.0.*": float
      "*output.dense": {weights: int4, block_size: 32}
      "*": {weights: int8, activations: int8, dynamic: true}
  some: {layers: {"*query": {weights: int8, activations: int8}}}
  clipped: {weights: int8, activations: int8, clipping: percentile}
  blocks: {weights: int4, block_size: 64, method: gptq, layers: {"lm_head": {weights: int8, activations: int8}}}
  fp8: {weights: float8, activations: float8}
targets:"""


def test_layers_have_formats_of_their_own_in_the_order_that_they_are_written(folder: Path) -> None:
    loaded = recipe.load(write(folder, GOOD.replace("targets:", MIXED)))
    mixed = loaded.variant("mixed")
    assert mixed.bias_correction
    assert mixed.layers == (
        LayerRule("*.layer.0.*"),
        LayerRule("*output.dense", Precision.INT4, block_size=32),
        LayerRule("*", Precision.INT8, Precision.INT8, dynamic=True),
    )
    assert [loaded.variant(n).method for n in ("mixed", "some", "clipped", "blocks")] == [
        "smoothquant",
        "smoothquant",
        "rtn",
        "gptq",
    ]
    assert loaded.variant("clipped").clipping == "percentile"
    assert recipe.load(write(folder, recipe.resolved(loaded))) == loaded
    validator = jsonschema.Draft202012Validator(recipe.json_schema())
    assert validator.is_valid(yaml.safe_load(GOOD.replace("targets:", MIXED)))
    assert not validator.is_valid(yaml.safe_load(GOOD.replace("targets:", MIXED.replace('0.*": float', '0.*": fp32'))))


@pytest.mark.parametrize(
    "variant",
    [
        "{layers: {'*': {weights: int8, activations: int8}}}",
        "{weights: int8, bias_correction: true}",
        "{weights: int8, layers: {'*': {weights: int8, activations: int8}}}",
    ],
)
def test_whatever_needs_statistics_needs_calibration(variant: str, folder: Path) -> None:
    text = GOOD.replace("calibration:\n  data: notes\n  samples: 64\n  method: mse\n", "")
    text = text[: text.index("  int8:\n")] + f"  x: {variant}\n" + text[text.index("targets:") :]
    (problem,) = problems(folder, text)
    assert "variants.x needs statistics" in problem.message
    kept = recipe.load(write(folder, text.replace(variant, "{layers: {'*': {weights: int4, block_size: 32}}}")))
    assert not kept.variant("x").needs_statistics


def test_a_percentile_may_be_for_a_variants_clipping(folder: Path) -> None:
    text = GOOD.replace("method: mse", "percentile: 99.9")
    assert "goes with method: percentile" in problems(folder, text)[0].message
    loaded = recipe.load(write(folder, text.replace("targets:", MIXED)))
    assert loaded.calibration is not None and loaded.calibration.percentile == 99.9


def test_resolved_text_has_every_default_and_loads_to_an_equal_recipe(folder: Path) -> None:
    loaded = recipe.load(write(folder, GOOD))
    text = recipe.resolved(loaded)
    assert "batch: 8" in text
    assert "confidence: 0.95" in text
    assert "normalize: true" in text
    again = recipe.load(write(folder, text))
    assert again == loaded
    assert recipe.resolved(again) == text


def test_digest_ignores_comments_and_layout_and_sees_every_value(folder: Path) -> None:
    digest = recipe.digest(recipe.load(write(folder, GOOD)))
    assert (
        recipe.digest(recipe.load(write(folder, "# hello\n" + GOOD.replace("samples: 64", "samples:   64")))) == digest
    )
    assert recipe.digest(recipe.load(write(folder, GOOD.replace("samples: 64", "samples: 65")))) != digest
    assert recipe.digest(recipe.load(write(folder, GOOD), ("budget.cosine.confidence=0.9",))) != digest


def test_manifests_are_found_beside_the_recipe_by_path_and_in_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = folder / "recipes" / "own.yml"
    own.write_text("name: own\n")
    loaded = recipe.load(write(folder, GOOD.replace("data: notes", "data: own.yml")))
    assert loaded.manifests["own.yml"].samefile(own)
    elsewhere = folder / "a" / "b" / "r.yaml"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text(GOOD)
    with pytest.raises(RecipeError, match="no data manifest 'notes'"):
        recipe.load(elsewhere)
    monkeypatch.chdir(folder)
    assert recipe.load(elsewhere).manifests["notes"].samefile(folder / "calibration" / "notes.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_recipe_loads_and_its_name_is_its_file_name(path: Path) -> None:
    loaded = recipe.load(path)
    assert loaded.name == path.stem
    least = {"int8", "int4"} if loaded.model.tasks == ["generate"] else {"fp32", "int8", "int8-dynamic"}
    assert loaded.optimize or least <= {v.name for v in loaded.variants}
    assert recipe.load(path, ()) == loaded


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_recipe_is_valid_by_the_json_schema(path: Path) -> None:
    schema = recipe.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))


def test_the_json_schema_refuses_what_load_refuses_and_describes_every_key() -> None:
    schema = recipe.json_schema()
    validator = jsonschema.Draft202012Validator(schema)
    good = yaml.safe_load(GOOD)
    assert validator.is_valid(good)
    assert validator.is_valid(good | {"$schema": "recipe.schema.json"})
    for bad in (
        {**good, "extra": 1},
        {**good, "targets": ["abacus"]},
        {**good, "shapes": {"batch": [1, 2]}},
        {**good, "budget": {}},
        {**good, "model": {**good["model"], "family": "brt"}},
        {**good, "variants": {"x": {"quantise": True}}},
    ):
        assert not validator.is_valid(bad)
    for section in (schema, *schema["$defs"].values()):
        for key, value in section["properties"].items():
            assert value.get("description"), key


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mangled_recipe_loads_or_raises_recipe_error_alone(folder: Path, data: st.DataObject) -> None:
    text = GOOD
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(st.text("ab1: -[]{}\n\t'\"!&*|>?%@,#\0é~", max_size=6)) + text[end:]
    try:
        loaded = recipe.load(write(folder, text))
    except RecipeError as error:
        assert error.problems
        assert all(p.message and p.line >= 0 for p in error.problems)
    else:
        assert recipe.load(write(folder, recipe.resolved(loaded))) == loaded
