from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from medcompile.backends import Executor, check_feeds
from medcompile.errors import BundleError, InputError, ProfileError, UsageError
from medcompile.runtime import towers as towers_module
from medcompile.runtime.deadlines import Request
from medcompile.runtime.image import ImageTransform
from medcompile.runtime.towers import Towers, image_batch, unit
from medcompile.spec import Axis, GraphSpec, Profile, TensorSpec
from tests.runtime.fakes import VOCABULARY, text_assets, write_assets

EDGE, DIM = 4, 6
TRANSFORM = {
    "size": [EDGE, EDGE],
    "mode": "squash",
    "crop": None,
    "resample": "bilinear",
    "fill": 0,
    "rescale": 1 / 255,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
}
WEIGHTS = np.random.default_rng(0).normal(size=(3, DIM))
TABLE = np.random.default_rng(1).normal(size=(len(VOCABULARY), DIM))


def image_spec(batch: tuple[int, int, int] = (1, 4, 8), *, resolution: tuple[int, int, int] | None = None) -> GraphSpec:
    edge: int | str = EDGE if resolution is None else "resolution"
    axes = [Axis("batch", *batch)] + ([Axis("resolution", *resolution)] if resolution else [])
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, edge, edge))
    embedding = TensorSpec("embedding", "float32", ("batch", DIM))
    return GraphSpec("image", (pixels,), (embedding,), (Profile("default", tuple(axes)),))


def text_spec() -> GraphSpec:
    inputs = tuple(TensorSpec(n, "int64", ("batch", "sequence")) for n in ("input_ids", "attention_mask"))
    profile = Profile("default", (Axis("batch", 1, 2, 8), Axis("sequence", 1, 8, 16)))
    return GraphSpec("text", inputs, (TensorSpec("embedding", "float32", ("batch", DIM)),), (profile,))


class Tower(Executor):
    """Image: the mean colour, weighed. Text: the sum over its ids' rows, later ones counting more."""

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__(spec)
        self.shapes: list[tuple[int, ...]] = []

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        check_feeds(self.spec, feeds)
        self.shapes.append(feeds[self.spec.inputs[0].name].shape)
        if self.spec.name == "image":
            answer = feeds["pixel_values"].mean((2, 3)) @ WEIGHTS
        else:
            ids = feeds["input_ids"]
            place = np.arange(1, ids.shape[1] + 1)[None, :, None]
            answer = (TABLE[ids] * place * feeds["attention_mask"][..., None]).sum(1)
        return {"embedding": answer.astype(np.float32)}

    def close(self) -> None:
        pass


def made(image: GraphSpec | None = None, **facts: Any) -> Towers:
    graphs = {"image": image or image_spec(), "text": text_spec()}
    executors = {name: Tower(spec) for name, spec in graphs.items()}
    return Towers(text_assets(max_length=16), ImageTransform.of(TRANSFORM), executors, graphs, **facts)


def shapes(towers: Towers, task: str) -> list[tuple[int, ...]]:
    executor = towers._executors[task]
    assert isinstance(executor, Tower)
    return executor.shapes


def colours(n: int, seed: int = 0) -> list[Any]:
    """Images of one colour each, uint8 [5, 7, 3]."""
    return [np.full((5, 7, 3), c, np.uint8) for c in np.random.default_rng(seed).integers(0, 256, (n, 3))]


def expected(images: list[Any]) -> Any:
    mean, std = np.array(TRANSFORM["mean"]), np.array(TRANSFORM["std"])
    return np.stack([((i[0, 0] / 255 - mean) / std) @ WEIGHTS for i in images])


def expected_text(text: str) -> Any:
    ids = np.array(text_assets().tokenizer.encode(text).ids)
    return (TABLE[ids] * np.arange(1, len(ids) + 1)[:, None]).sum(0)


def png(array: Any) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def test_images_embed_to_one_row_each_in_order_whatever_the_number_of_batches() -> None:
    towers, images = made(), colours(19)
    got = towers.embed_images(images, normalize=False)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected(images), rtol=1e-4, atol=1e-5)
    assert shapes(towers, "image") == [(4, 3, 4, 4)] * 4 + [(3, 3, 4, 4)]


def test_paths_bytes_arrays_and_pillow_images_of_the_same_pixels_embed_alike(tmp_path: Path) -> None:
    (array,) = colours(1)
    path = tmp_path / "scan.png"
    path.write_bytes(png(array))
    kinds = [path, str(path), png(array), bytearray(png(array)), array, PIL.Image.fromarray(array)]
    together = made().embed_images(iter(kinds))
    for kind, row in zip(kinds, together, strict=True):
        np.testing.assert_array_equal(made().embed_images(kind), [row])  # a single one is a list of one
    np.testing.assert_array_equal(together, together[[0] * len(kinds)])


def test_an_array_of_four_dimensions_is_several_images_and_no_image_gives_no_row() -> None:
    images = colours(3)
    np.testing.assert_array_equal(made().embed_images(np.stack(images)), made().embed_images(images))
    assert made().embed_images([]).shape == (0, DIM)


def test_embeddings_have_unit_length_unless_told_otherwise() -> None:
    rows = made().embed_images(colours(5))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(rows, unit(made().embed_images(colours(5), normalize=False)), rtol=1e-6)


def test_a_batch_is_filled_up_to_the_profiles_min_and_the_filling_does_not_count() -> None:
    towers, images = made(image_spec((4, 4, 4))), colours(6)
    np.testing.assert_allclose(towers.embed_images(images, normalize=False), expected(images), rtol=1e-4, atol=1e-5)
    assert shapes(towers, "image") == [(4, 3, 4, 4)] * 2


def test_bad_images_get_their_own_errors_and_the_others_their_embeddings(tmp_path: Path) -> None:
    images: list[Any] = colours(12)
    good = expected(images)
    (tmp_path / "notes.png").write_text("this is a text")
    images[3], images[7], images[11] = tmp_path / "notes.png", b"", 4.5
    results = list(made().images(iter(images), normalize=False))
    assert [r.index for r in results] == list(range(12))
    assert [r.index for r in results if r.error is not None] == [3, 7, 11]
    for r in results:
        if r.error is None:
            assert r.embedding is not None
            np.testing.assert_allclose(r.embedding, good[r.index], rtol=1e-4, atol=1e-5)
    assert "notes.png" in str(results[3].error)
    assert "image 7" in str(results[7].error)


def test_embedding_a_list_with_bad_images_names_every_one() -> None:
    images: list[Any] = colours(30)
    images[2] = images[29] = b"GIF?"
    with pytest.raises(InputError, match="2 of 30 images can't be used") as error:
        made().embed_images(images)
    assert "[2] image 2" in str(error.value)
    assert "[29] image 29" in str(error.value)
    with pytest.raises(InputError, match="and 5 more"):
        made().embed_images([b""] * 25)


def test_images_are_read_a_few_batches_ahead_and_no_further() -> None:
    read = 0

    def endless() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield colours(1)[0]

    results = made(image_spec((1, 2, 2))).images(endless())
    for _ in range(5):
        next(results)
    assert read <= 5 + 3 * 2


def test_the_next_batch_is_decoded_while_the_model_runs_this_one() -> None:
    spec = image_spec((1, 2, 2))
    decoded = [threading.Event() for _ in range(4)]

    class Watched:
        size = (EDGE, EDGE)

        def pixels(self, source: int, **_: object) -> Any:
            decoded[source].set()
            return np.zeros((3, EDGE, EDGE), np.float32)

    class Slow(Tower):
        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            assert decoded[2].wait(10) and decoded[3].wait(10)  # else the model would wait for them after this batch
            return super().run(feeds)

    towers = Towers(None, Watched(), {"image": Slow(spec)}, {"image": spec})  # type: ignore[arg-type]
    assert towers.embed_images(range(4)).shape == (4, DIM)  # type: ignore[arg-type]


def test_the_memory_of_a_batch_is_bounded_by_its_images_size(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = image_spec((1, 8, 64), resolution=(4, 8, 64))
    monkeypatch.setattr(towers_module, "BATCH_BYTES", 12 * 16 * 16 * 5)
    assert image_batch(spec, (16, 16)) == Axis("batch", 1, 5, 5)
    assert image_batch(spec, (4, 4)) == Axis("batch", 1, 8, 64)
    assert image_batch(spec, (64, 64)).max == 1


def test_another_resolution_is_taken_where_a_profile_holds_it() -> None:
    towers = made(image_spec(resolution=(4, 4, 8)))
    towers.embed_images(colours(2), resolution=8)
    towers.embed_images(colours(2))
    assert shapes(towers, "image") == [(2, 3, 8, 8), (2, 3, 4, 4)]
    with pytest.raises(ProfileError, match="9 x 9 pixels is outside every profile"):
        towers.embed_images(colours(2), resolution=9)
    with pytest.raises(ProfileError, match="8 x 8"):
        made().embed_images(colours(2), resolution=8)


def test_texts_embed_in_order_with_padding_that_does_not_count() -> None:
    texts = ["chest pain", "", "the patient denies fever, no injury", "kidney"] * 5
    got = made().embed_texts(texts, normalize=False)
    np.testing.assert_allclose(got, [expected_text(t) for t in texts], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made().embed_texts("kidney"), unit(got[3:4]))
    assert made().embed_texts([]).shape == (0, DIM)


def test_a_text_beyond_the_context_is_cut_as_its_tokenizer_cuts_it_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = "the patient denies chest pain " * 9
    tokenizer = text_assets().tokenizer
    tokenizer.enable_truncation(16)
    ids = np.array(tokenizer.encode(long).ids)
    assert ids[-1] == VOCABULARY.index("[SEP]")
    with caplog.at_level(logging.WARNING, "medcompile"):
        got = made().embed_texts([long, "kidney", long], normalize=False)
    np.testing.assert_allclose(got[0], (TABLE[ids] * np.arange(1, 17)[:, None]).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(got[0], got[2])
    (record,) = caplog.records
    assert record.getMessage() == "2 of 3 texts are longer than the model's 16 tokens and were cut"


def test_match_is_the_softmax_of_scaled_cosines_over_the_prompts() -> None:
    towers = made(logit_scale=7.5, logit_bias=-2.0, templates=["an x of {}", "{}"])
    images, prompts = colours(3), ["pain", "fever", "kidney injury"]
    cosines = unit(expected(images)) @ unit(np.stack([expected_text(p) for p in prompts])).T
    logits = 7.5 * cosines - 2.0
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    got = towers.match(images, prompts, templates=["{}"])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)


def test_a_class_is_the_normalized_mean_of_normalized_embeddings_over_names_and_templates() -> None:
    towers = made(templates=["chest {}", "no {}, no fever"])
    texts = [
        ["chest pain", "no pain, no fever"],
        ["chest fever", "no fever, no fever", "chest met", "no met, no fever"],
    ]
    wanted = [unit(unit(np.stack([expected_text(t) for t in group])).mean(0)) for group in texts]
    got = towers.classes({"A": "pain", "B": ["fever", "met"]})
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_array_equal(got, towers.classes([["pain"], ["fever", "met"]]))
    np.testing.assert_array_equal(got, towers.classes(["pain", ["fever", "met"]], towers.templates))


def test_braces_in_a_prompt_are_taken_as_they_are() -> None:
    assert made().classes(["a {0}", "{}"], ["no {}"]).shape == (2, DIM)


@pytest.mark.parametrize(
    ("prompts", "templates", "says"),
    [
        ([], None, "several prompts"),
        ("pain", None, "several prompts"),
        ({"A": []}, None, "a class has no prompt"),
        (["pain"], [], "templates are texts"),
        (["pain"], "a {}", "templates are texts"),
        (["pain"], ["an x-ray"], "templates are texts"),
        (["pain"], ["{} and {}"], "templates are texts"),
    ],
)
def test_prompts_and_templates_that_say_nothing_are_refused(prompts: Any, templates: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        made().classes(prompts, templates)


def test_a_tower_that_is_not_there_is_a_usage_error_that_names_those_that_are() -> None:
    towers = made()
    alone = Towers(towers.text, None, towers._executors, {"text": text_spec()})
    with pytest.raises(UsageError, match="no task image here; the tasks are: text"):
        alone.embed_images(colours(1))
    assert alone.embed_texts("pain").shape == (1, DIM)


def test_streamed_images_come_with_their_keys_and_a_bad_one_with_its_error() -> None:
    images: list[Any] = colours(9)
    good = unit(expected(images))
    images[4] = b"not an image"
    requests = [Request(image, key=f"study {i}") for i, image in enumerate(images)]
    with made().stream(requests, max_latency_ms=0) as answers:
        got = list(answers)
    assert [a.key for a in got] == [f"study {i}" for i in range(9)]
    for answer in got:
        if answer.index == 4:
            assert isinstance(answer.error, InputError)
        else:
            assert answer.value is not None
            np.testing.assert_allclose(answer.value, good[answer.index], rtol=1e-4, atol=1e-5)


def test_streamed_texts_equal_embedded_ones() -> None:
    texts = ["chest pain", "kidney", "no fever"]
    with made().stream(texts, "text", max_latency_ms=0) as answers:
        got = [a.value for a in answers]
    np.testing.assert_allclose(np.stack([g for g in got if g is not None]), made().embed_texts(texts), rtol=1e-6)
    with pytest.raises(UsageError, match="no task 'audio'"):
        made().stream(texts, "audio", max_latency_ms=0)


def test_towers_read_what_their_graphs_need_from_a_bundles_assets(tmp_path: Path) -> None:
    write_assets(tmp_path)
    (tmp_path / "transform.json").write_text(json.dumps(TRANSFORM))
    facts = {"logit_scale": 50.0, "logit_bias": 0.5, "templates": ["an x of {}"], "unescape": True}
    (tmp_path / "towers.json").write_text(json.dumps(facts))
    read = Towers.read(tmp_path, {}, {"image": image_spec(), "text": text_spec()})
    assert (read.logit_scale, read.logit_bias, read.templates) == (50.0, 0.5, ("an x of {}",))
    assert read.transform is not None and read.transform.size == (EDGE, EDGE)
    (tmp_path / "transform.json").unlink()
    assert Towers.read(tmp_path, {}, {"text": text_spec()}).transform is None
    del facts["logit_bias"]
    (tmp_path / "towers.json").write_text(json.dumps(facts))
    with pytest.raises(BundleError, match=r"towers\.json: no 'logit_bias'"):
        Towers.read(tmp_path, {}, {"text": text_spec()})


def test_texts_of_open_clip_are_unescaped_as_its_tokenizers_do() -> None:
    towers = made(unescape=True)
    assert np.array_equal(towers.embed_texts("p &amp;lt; 5"), towers.embed_texts("p < 5"))
    assert not np.array_equal(made().embed_texts("p &amp;lt; 5"), made().embed_texts("p < 5"))


def test_one_frame_of_a_file_with_several_is_taken_by_its_number() -> None:
    pages = [PIL.Image.fromarray(np.full((EDGE, EDGE, 3), level, np.uint8)) for level in (10, 200)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    towers = made()
    chosen = towers.embed_images(file.getvalue(), normalize=False, frame=1)
    np.testing.assert_allclose(chosen, towers.embed_images(pages[1], normalize=False))
    with pytest.raises(InputError, match="2 frames, and none was chosen"):
        towers.embed_images(file.getvalue())
