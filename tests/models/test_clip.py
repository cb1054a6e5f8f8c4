"""The clip family: the towers, taken apart, give what open_clip's and transformers' whole models give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from medcompile.errors import MedcompileError, ProfileError, SourceError, UsageError
from medcompile.models import _vit, clip
from medcompile.models._bert_config import text_config
from medcompile.passes.export import export
from medcompile.passes.linear import linear_groups
from medcompile.runtime.towers import unit
from tests.models import tiny_clip
from tests.models.tiny_clip import CONTEXT, pixels, run

# Embeddings here are of size 1; fp32 in another order of summation stays far below.
CLOSE = {"rtol": 0, "atol": 1e-5}
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def biomed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.write_open_clip(tmp_path_factory.mktemp("open_clip") / "model")


@pytest.fixture(scope="module")
def pubmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.write_hf(tmp_path_factory.mktemp("hf") / "model")


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def ids(batch: int, sequence: int, high: int, pad: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random ids and their mask; every row but the first is padded."""
    random = np.random.default_rng(batch * 100 + sequence)
    lengths = np.array([sequence, *random.integers(1, sequence + 1, batch - 1)])
    mask = (np.arange(sequence)[None] < lengths[:, None]).astype(np.int64)
    return np.where(mask == 1, random.integers(5, high, (batch, sequence)), pad), mask


def ended(batch: int, sequence: int, end: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The same, each row closed by the end token, which is also its padding."""
    tokens, mask = ids(batch, sequence, tiny_clip.END - 1, end)
    tokens = np.where((tokens == end) & (mask == 1), 5, tokens)
    tokens[np.arange(batch), mask.sum(1) - 1] = end
    return tokens, mask


def test_open_clip_towers_equal_the_whole_model(biomed: Path, tmp_path: Path) -> None:
    model = tiny_clip.open_clip_model(biomed)
    image, text = tiny_clip.graph(biomed, "image"), tiny_clip.graph(biomed, "text")
    clip.FAMILY.assets(tiny_clip.checkpoint(biomed), tiny_clip.options(), tmp_path)
    scale = json.loads((tmp_path / "towers.json").read_text())["logit_scale"]
    for batch, sequence in ((1, 3), (4, CONTEXT)):
        tokens, mask = ids(batch, sequence, 30, 0)
        looks = pixels(batch, 160)
        ours = run(image, pixel_values=looks), run(text, input_ids=tokens, attention_mask=mask)
        with torch.inference_mode():
            theirs = model.encode_image(torch.from_numpy(looks)), model.encode_text(torch.from_numpy(tokens))
            logits = model.get_logits(torch.from_numpy(looks), torch.from_numpy(tokens))[0].numpy()
        np.testing.assert_allclose(ours[0], theirs[0].numpy(), **CLOSE)
        np.testing.assert_allclose(ours[1], theirs[1].numpy(), **CLOSE)
        np.testing.assert_allclose(scale * unit(ours[0]) @ unit(ours[1]).T, logits, rtol=0, atol=1e-4)


def test_transformers_towers_equal_the_whole_model(pubmed: Path, tmp_path: Path) -> None:
    model, end = tiny_clip.hf_model(pubmed), tiny_clip.END
    image, text = tiny_clip.graph(pubmed, "image"), tiny_clip.graph(pubmed, "text")
    clip.FAMILY.assets(tiny_clip.checkpoint(pubmed), tiny_clip.options(), tmp_path)
    scale = json.loads((tmp_path / "towers.json").read_text())["logit_scale"]
    for batch, sequence in ((1, 3), (4, CONTEXT)):
        tokens, mask = ended(batch, sequence, end)
        looks = pixels(batch, 32)
        ours = run(image, pixel_values=looks), run(text, input_ids=tokens, attention_mask=mask)
        with torch.inference_mode():
            whole = model(torch.from_numpy(tokens), torch.from_numpy(looks), torch.from_numpy(mask))
            apart = model.get_image_features(torch.from_numpy(looks)).pooler_output
        np.testing.assert_allclose(ours[0], apart.numpy(), **CLOSE)
        np.testing.assert_allclose(unit(ours[0]), whole.image_embeds.numpy(), **CLOSE)
        np.testing.assert_allclose(unit(ours[1]), whole.text_embeds.numpy(), **CLOSE)
        logits = scale * unit(ours[0]) @ unit(ours[1]).T
        np.testing.assert_allclose(logits, whole.logits_per_image.numpy(), rtol=0, atol=1e-4)


def test_a_named_end_token_is_where_the_text_is_read_though_it_is_not_the_highest_id(tmp_path: Path) -> None:
    end = 7
    folder = tiny_clip.write_hf(tmp_path / "model", end)
    tokens, mask = ended(4, CONTEXT, end)
    with torch.inference_mode():
        three = tiny_clip.hf_model(folder).get_text_features(torch.from_numpy(tokens), torch.from_numpy(mask))
    ours = run(tiny_clip.graph(folder, "text"), input_ids=tokens, attention_mask=mask)
    np.testing.assert_allclose(ours, three.pooler_output.numpy(), **CLOSE)


def test_open_clip_images_of_other_sizes_get_timms_positions(biomed: Path) -> None:
    model = tiny_clip.open_clip_model(biomed)
    image = tiny_clip.graph(biomed, "image", (64, 160, 256))
    for edge in (64, 96, 160, 256):
        looks = pixels(2, edge)
        with torch.inference_mode():
            theirs = model.encode_image(torch.from_numpy(looks)).numpy()
        np.testing.assert_allclose(run(image, pixel_values=looks), theirs, **CLOSE)
    products = {node.name for group in linear_groups(image) for node in group.nodes}
    assert "trunk.patch_embed.proj/MatMul" in products
    assert len(products) == 1 + 6 * 4 + 1, "positions are no linear layer"


def test_transformers_images_of_other_sizes_get_its_own_interpolation(pubmed: Path) -> None:
    model = tiny_clip.hf_model(pubmed)
    image = tiny_clip.graph(pubmed, "image", (16, 32, 80))
    for edge in (16, 24, 32, 80):
        looks = torch.from_numpy(pixels(2, edge))
        with torch.inference_mode():
            theirs = model.get_image_features(looks, interpolate_pos_encoding=True).pooler_output.numpy()
        np.testing.assert_allclose(run(image, pixel_values=looks.numpy()), theirs, **CLOSE)


@pytest.mark.parametrize("old", [4, 14])
@pytest.mark.parametrize("new", [2, 3, 7, 14, 20, 37])
def test_interpolated_positions_are_those_of_both_libraries(old: int, new: int) -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    table = torch.from_numpy(np.random.default_rng(new).normal(size=(1, old * old, 8)).astype(np.float32))
    square = table.reshape(old, old, 8)
    timm = resample_abs_pos_embed(table, [new, new], num_prefix_tokens=0)[0]
    rows = torch.nn.functional.interpolate(square.permute(2, 0, 1)[None], size=(new, new), mode="bicubic")
    transformers = rows[0].permute(1, 2, 0).reshape(-1, 8)
    torch.testing.assert_close(_vit.interpolated(square, new, new, antialias=True), timm, rtol=0, atol=1e-5)
    torch.testing.assert_close(_vit.interpolated(square, new, new, antialias=False), transformers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("antialias", [True, False])
def test_positions_of_the_own_grid_are_the_stored_ones_to_the_last_bit(antialias: bool) -> None:
    table = torch.randn(14, 14, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_vit.interpolated(table, 14, 14, antialias=antialias), table.reshape(-1, 8))


def test_patches_equal_the_convolution() -> None:
    conv = torch.nn.Conv2d(3, 10, 4, 4)
    patches = _vit.patches(conv)
    patches.load_state_dict({"weight": conv.weight.reshape(10, -1), "bias": conv.bias})
    looks = torch.from_numpy(pixels(2, 12))
    torch.testing.assert_close(patches(looks), conv(looks).flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def test_the_reference_is_the_whole_model(biomed: Path, pubmed: Path) -> None:
    tokens, mask = ids(3, 9, 30, 0)
    theirs = tiny_clip.open_clip_model(biomed)
    reference = clip.FAMILY.reference(tiny_clip.checkpoint(biomed), "text", tiny_clip.options())
    with torch.inference_mode():
        expected = theirs.encode_text(torch.from_numpy(tokens)).numpy()
    np.testing.assert_array_equal(reference.run({"input_ids": tokens, "attention_mask": mask})["embedding"], expected)
    looks = pixels(2, 48)
    whole = tiny_clip.hf_model(pubmed)
    varied = tiny_clip.options(resolution=(16, 32, 80))
    reference = clip.FAMILY.reference(tiny_clip.checkpoint(pubmed), "image", varied)
    with torch.inference_mode():
        features = whole.get_image_features(torch.from_numpy(looks), interpolate_pos_encoding=True).pooler_output
    np.testing.assert_allclose(reference.run({"pixel_values": looks})["embedding"], features.numpy(), **CLOSE)


def test_bert_sizes_come_from_the_weights_where_no_config_lies_beside_them(biomed: Path, tmp_path: Path) -> None:
    folder = copied(biomed, tmp_path)
    shutil.rmtree(folder / "text_config")
    config, notes = text_config(tiny_clip.checkpoint(folder), tiny_clip.HUB_ID)
    assert config == tiny_clip.TEXT_CONFIG
    assert len(notes) == 1 and tiny_clip.HUB_ID in notes[0]
    with pytest.raises(SourceError, match="config of its text tower some/other is not in the folder"):
        text_config(tiny_clip.checkpoint(folder), "some/other")


def test_a_bin_checkpoint_with_old_buffers_is_taken(biomed: Path, tmp_path: Path) -> None:
    folder = copied(biomed, tmp_path)
    edit(folder / "open_clip_config.json", lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name=tiny_clip.HUB_ID))
    shutil.rmtree(folder / "text_config")
    tensors = load_file(folder / WEIGHTS) | {"text.transformer.embeddings.position_ids": torch.arange(48)[None]}
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    tokens, mask = ids(3, 9, 30, 0)
    feeds = {"input_ids": tokens, "attention_mask": mask}
    with torch.inference_mode():
        expected = tiny_clip.open_clip_model(biomed).encode_text(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(run(tiny_clip.graph(folder, "text"), **feeds), expected, **CLOSE)
    reference = clip.FAMILY.reference(tiny_clip.checkpoint(folder), "text", tiny_clip.options())
    np.testing.assert_allclose(reference.run(feeds)["embedding"], expected, **CLOSE)


def test_open_clips_own_transform_is_told(biomed: Path, tmp_path: Path) -> None:
    clip.FAMILY.assets(tiny_clip.checkpoint(biomed), tiny_clip.options(), tmp_path)
    ours = json.loads((tmp_path / "transform.json").read_text())
    theirs = tiny_clip.open_clip_model(biomed).visual.preprocess_cfg
    assert (ours["mode"], ours["resample"], ours["fill"]) == (
        theirs["resize_mode"],
        theirs["interpolation"],
        theirs["fill_color"],
    )
    assert (ours["size"], ours["crop"]) == (theirs["size"][0], list(theirs["size"]))
    assert (ours["mean"], ours["std"], ours["rescale"]) == (list(theirs["mean"]), list(theirs["std"]), 1 / 255)
    text = json.loads((tmp_path / "text.json").read_text())
    assert (text["max_length"], text["pad_id"], text["normalize"]) == (CONTEXT, 0, True)


def test_transformers_own_transform_and_padding_are_told(pubmed: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    clip.FAMILY.assets(tiny_clip.checkpoint(pubmed), tiny_clip.options(), tmp_path)
    ours = json.loads((tmp_path / "transform.json").read_text())
    theirs = CLIPImageProcessor.from_pretrained(pubmed)
    assert theirs.size["shortest_edge"] == ours["size"] == 32
    assert [theirs.crop_size["height"], theirs.crop_size["width"]] == ours["crop"]
    assert (list(theirs.image_mean), list(theirs.image_std)) == (ours["mean"], ours["std"])
    assert theirs.rescale_factor == ours["rescale"]
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = json.loads((tmp_path / "text.json").read_text())
    assert text["pad_id"] == made.token_to_id("<|endoftext|>")


def test_byte_pairs_cut_text_as_transformers_does(pubmed: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    clip.FAMILY.assets(tiny_clip.checkpoint(pubmed), tiny_clip.options("text"), tmp_path)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = CLIPTokenizer.from_pretrained(pubmed)
    for text in ("The chest X-ray's  normal\n(2x3)", "", "a <|endoftext|> b", "Caf\u00e9 \u60a3 it's"):
        assert made.encode(text).ids == theirs(text)["input_ids"], repr(text)


def test_templates_are_the_recipes_or_those_of_the_authors(biomed: Path, tmp_path: Path) -> None:
    folder = copied(biomed, tmp_path)

    def templates(*own: str) -> list[str]:
        clip.FAMILY.assets(tiny_clip.checkpoint(folder), tiny_clip.options(templates=own), tmp_path)
        found: list[str] = json.loads((tmp_path / "towers.json").read_text())["templates"]
        return found

    assert templates() == ["{}"]
    assert templates("an X-ray of {}", "{}") == ["an X-ray of {}", "{}"]
    edit(folder / "open_clip_config.json", lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name=tiny_clip.HUB_ID))
    assert templates() == ["this is a photo of {}"]
    with pytest.raises(UsageError, match=r"one \{\} each"):
        templates("no place")


def test_each_graph_has_its_own_axes(biomed: Path) -> None:
    checkpoint = tiny_clip.checkpoint(biomed)
    image, text = (clip.FAMILY.graph_spec(checkpoint, t, tiny_clip.options()) for t in ("image", "text"))
    assert image.inputs[0].shape == ("batch", 3, 160, 160)
    assert [a.name for a in image.profiles[0].axes] == ["batch"]
    assert [a.name for a in text.profiles[0].axes] == ["batch", "sequence"]
    varied = clip.FAMILY.graph_spec(checkpoint, "image", tiny_clip.options(resolution=(64, 160, 256)))
    assert varied.inputs[0].shape == ("batch", 3, "resolution", "resolution")
    with pytest.raises(ProfileError, match="resolution 150 is not a multiple of the model's patch of 16 pixels"):
        clip.FAMILY.graph_spec(checkpoint, "image", tiny_clip.options(resolution=(64, 150, 256)))


def test_a_sequence_beyond_the_tokenizers_context_is_refused(biomed: Path) -> None:
    checkpoint, wide = tiny_clip.checkpoint(biomed), tiny_clip.options("text")
    axes = tuple(a if a.name != "sequence" else type(a)("sequence", 1, 8, 48) for a in wide.profiles[0].axes)
    wide = type(wide)(("text",), (type(wide.profiles[0])("wide", axes),))
    with pytest.raises(ProfileError, match=f"the model's context is {CONTEXT}"):
        clip.FAMILY.graph_spec(checkpoint, "text", wide)


def lose(folder: Path, prefix: str) -> None:
    path = folder / WEIGHTS
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith(prefix)}
    path.unlink()
    save_file(tensors, path)


def config(folder: Path, part: str, **keys: Any) -> None:
    edit(folder / "open_clip_config.json", lambda c: (c["model_cfg"][part] if part else c["model_cfg"]).update(keys))


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no image tower": ("image", lambda f: lose(f, "visual."), "no weight visual.trunk.patch_embed"),
    "half an image tower": (
        "image",
        lambda f: lose(f, "visual.trunk.blocks.5"),
        "no weights for image: visual.trunk.b",
    ),
    "no text tower": ("text", lambda f: lose(f, "text."), "no weights for text: text.transformer"),
    "another size": ("text", lambda f: config(f, "", embed_dim=48), "has shape .* the config asks for"),
    "its own text tower": ("text", lambda f: config(f, "text_cfg", hf_model_name=""), "text tower is open_clip's own"),
    "its own image tower": ("image", lambda f: config(f, "vision_cfg", timm_model_name=None), "tower is open_clip's"),
    "a convolutional trunk": (
        "image",
        lambda f: config(f, "vision_cfg", timm_model_name="resnet18"),
        "resnet18 is no plain vision transformer",
    ),
    "another text model": (
        "text",
        lambda f: edit(f / "text_config/config.json", lambda c: c.update(model_type="roberta")),
        "its text tower is a roberta",
    ),
    "no towers in the config": (
        "text",
        lambda f: edit(f / "open_clip_config.json", lambda c: c["model_cfg"].pop("vision_cfg")),
        "no model_cfg with embed_dim",
    ),
    "another pooling": ("text", lambda f: config(f, "text_cfg", hf_pooler_type="mean_pooler"), "pools by mean_pooler"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_is_no_pair_of_known_towers_is_refused(biomed: Path, tmp_path: Path, case: str) -> None:
    task, spoil, message = BROKEN[case]
    folder = copied(biomed, tmp_path)
    spoil(folder)
    with pytest.raises(SourceError, match=message) as error:
        export(clip.FAMILY, tiny_clip.checkpoint(folder), tiny_clip.options(task))
    assert error.value.fix


def test_a_text_model_alone_is_refused(pubmed: Path, tmp_path: Path) -> None:
    folder = copied(pubmed, tmp_path)
    edit(folder / "config.json", lambda c: c.update(model_type="clip_text_model"))
    with pytest.raises(MedcompileError, match="a clip_text_model model"):
        clip.FAMILY.graph_spec(tiny_clip.checkpoint(folder), "text", tiny_clip.options())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-biomedclip", "tiny-medclip-hf"])
def test_trained_towers_equal_the_whole_model(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    checkpoint = tiny_clip.checkpoint(folder)
    high = 900
    for task in ("image", "text"):
        model, reference = tiny_clip.graph(folder, task), clip.FAMILY.reference(checkpoint, task, tiny_clip.options())
        if task == "image":
            feeds = {"pixel_values": pixels(3, int(reference.spec.inputs[0].shape[2]))}
        else:
            tokens, mask = ids(3, CONTEXT, high, 0 if "bio" in name else 3963)
            feeds = {"input_ids": tokens, "attention_mask": mask}
        np.testing.assert_allclose(run(model, **feeds), reference.run(feeds)["embedding"], **CLOSE)
