from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from medcompile.errors import BundleError, InputError, ProfileError
from medcompile.runtime.text import BATCH_TOKENS, DENSITY, SMALL_TOKENS, TextAssets, Window, checked, checked_words
from medcompile.spec import GraphSpec, TensorSpec
from tests.runtime.fakes import spec, text_assets, tokenizer, write_assets


def plain() -> Tokenizer:
    t = tokenizer()
    t.no_truncation()
    t.no_padding()
    return t


@pytest.mark.parametrize(
    "text", ["", "the patient denies chest pain.", "Metformin [SEP] no\x00 fever \U0001f600", " \n"]
)
def test_a_short_text_becomes_the_ids_and_types_the_tokenizer_itself_gives(text: str) -> None:
    assets = text_assets()
    (window,) = assets.windows(0, assets.encode([text])[0], 64)
    expected = plain().encode(text)
    assert window.ids.tolist() == expected.ids
    assert window.types.tolist() == expected.type_ids


def test_a_pair_becomes_the_ids_and_types_the_tokenizer_itself_gives() -> None:
    assets = text_assets()
    for first, second in [("kidney injury", "no"), ("no", "the patient denies pain"), ("", "pain"), ("", "")]:
        a, b = assets.encode([first, second])
        (window,) = assets.windows(0, a, 64, b)
        expected = plain().encode(first, second)
        assert window.ids.tolist() == expected.ids
        assert window.types.tolist() == expected.type_ids


def test_windows_own_every_token_once_and_each_token_where_it_is_farthest_from_a_border() -> None:
    assets = text_assets()
    rng = random.Random(0)
    for length in (8, 9, 16, 64):
        for count in [*range(length - 4, length + 12), rng.randrange(200, 400)]:
            tokens = assets.encode([" ".join("abcdefg"[rng.randrange(7)] for _ in range(count))])[0]
            windows = assets.windows(3, tokens, length)
            owned = [t for w in windows for t in range(*w.own)]
            assert owned == list(range(count))
            for window in windows:
                assert len(window.ids) <= length
                assert window.ids[0] == 2
                assert window.ids[-1] == 3
                for t in range(*window.own):
                    assert window.ids[t - window.start + window.lead] == tokens.ids[t]
                    assert context(window, t, count) == max(context(w, t, count) for w in windows)


def context(window: Window, token: int, count: int) -> int:
    """Tokens between this one and the nearer end of the window; the ends of the text itself are no border."""
    end = window.start + len(window.ids) - 2
    if not window.start <= token < end:
        return -1
    left = token - window.start if window.start else count
    right = end - 1 - token if end < count else count
    return min(left, right)


def test_the_longer_text_of_a_pair_is_cut_and_the_shorter_stands_whole_in_every_window() -> None:
    assets = text_assets()
    short, long = assets.encode(["chest pain", "no fever, " * 60])
    for a, b, kind in [(short, long, 1), (long, short, 0)]:
        windows = assets.windows(0, a, 64, b)
        assert len(windows) > 3
        assert [t for w in windows for t in range(*w.own)] == list(range(len(long)))
        for window in windows:
            assert len(window.ids) <= 64
            assert np.array_equal(window.ids[window.types == (1 - kind)][kind : kind + 2], short.ids)
            at = window.lead
            assert window.types[at] == kind
            assert window.ids[at] == long.ids[window.start]


def test_a_pair_of_two_long_texts_is_refused_with_its_number() -> None:
    assets = text_assets()
    long = assets.encode(["no fever, " * 60])[0]
    with pytest.raises(InputError, match="pair 5: both texts"):
        assets.windows(5, long, 64, long)


def test_batches_stay_inside_the_budget_and_the_profile_and_hold_every_window_once() -> None:
    assets = text_assets(512)
    graph = spec("embed", batch=(1, 8, 32), sequence=(8, 128, 512))
    rng = random.Random(1)
    texts = [" ".join(["pain"] * rng.randrange(0, 700)) for _ in range(80)]
    windows = [w for i, t in enumerate(assets.encode(texts)) for w in assets.windows(i, t, 512)]
    seen: list[int] = []
    shapes = []
    for batch in assets.batches(graph, windows):
        ids, mask = batch.feeds["input_ids"], batch.feeds["attention_mask"]
        shapes.append(ids.shape)
        assert ids.shape[0] == len(batch.rows) <= 32
        assert 8 <= ids.shape[1] <= 512
        assert ids.size <= BATCH_TOKENS
        for row, i in enumerate(batch.rows):
            assert ids[row][mask[row] == 1].tolist() == windows[i].ids.tolist()
            assert not ids[row][mask[row] == 0].any()
        assert ids.shape[1] == max(8, mask.sum(1).max())
        assert ids.size <= SMALL_TOKENS + ids.shape[1] or mask.mean() >= DENSITY
        seen += batch.rows
    assert sorted(seen) == list(range(len(windows)))
    assert shapes == sorted(shapes, key=lambda s: -s[1])


def test_short_texts_do_not_fill_up_a_batch_of_long_ones_and_a_few_texts_stay_one_batch() -> None:
    assets = text_assets(512)
    graph = spec("embed", batch=(1, 8, 32), sequence=(8, 128, 512))

    def rows_of(*sizes: int) -> list[int]:
        texts = [" ".join(["pain"] * n) for n in sizes]
        windows = [w for i, t in enumerate(assets.encode(texts)) for w in assets.windows(i, t, 512)]
        return [len(batch.rows) for batch in assets.batches(graph, windows)]

    assert rows_of(*[400] * 4, *[10] * 20) == [4, 20]
    assert rows_of(60, 10, 5) == [3]


def test_lengths_are_rounded_up_to_a_step_within_the_profile() -> None:
    assets = text_assets(512)
    texts = [" ".join(["pain"] * n) for n in (600, 77, 14, 3)]
    windows = [w for i, t in enumerate(assets.encode(texts)) for w in assets.windows(i, t, 500)]
    graph = spec("embed", batch=(1, 1, 1), sequence=(8, 128, 500))
    shapes = [batch.feeds["input_ids"].shape[1] for batch in assets.batches(graph, windows, step=16)]
    assert shapes[0] == 500 and set(shapes[-3:]) == {80, 16}
    assert [b.rows for b in assets.batches(graph, windows, step=16)] == [b.rows for b in assets.batches(graph, windows)]


def test_a_batch_below_the_profiles_min_is_filled_with_copies() -> None:
    assets = text_assets()
    windows = assets.windows(0, assets.encode(["pain"])[0], 64)
    (batch,) = assets.batches(spec("embed", batch=(4, 4, 8)), windows)
    assert batch.rows == (0,)
    assert batch.feeds["input_ids"].shape == (4, 4)
    assert (batch.feeds["input_ids"] == batch.feeds["input_ids"][0]).all()


def test_a_graph_of_fixed_shape_without_profiles_is_padded_to_it() -> None:
    assets = text_assets()
    fixed = GraphSpec("embed", tuple(TensorSpec(n, "int64", (2, 16)) for n in ("input_ids", "attention_mask")), (), ())
    windows = assets.windows(0, assets.encode(["pain " * 30])[0], assets.window_length(fixed))
    batches = list(assets.batches(fixed, windows))
    assert {b.feeds["input_ids"].shape for b in batches} == {(2, 16)}
    assert set(batches[0].feeds) == {"input_ids", "attention_mask"}


def test_a_window_above_every_profile_is_a_profile_error() -> None:
    assets = text_assets(512)
    windows = assets.windows(0, assets.encode(["pain " * 100])[0], 512)
    with pytest.raises(ProfileError, match="102 tokens"):
        next(assets.batches(spec("embed"), windows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ok \xff", r"text 0: not UTF-8 at byte 3 \(0xff\)"),
        (b"\xc3", "text 0: not UTF-8 at byte 0"),
        ("Jos\u00e9 \udc80", "text 0: a lone surrogate at character 5"),
        (["fine", 3], "text 1 is int"),
        (["fine", None], "text 1 is NoneType"),
        (None, "a text or a list of texts is wanted, not NoneType"),
        (7, "a text or a list of texts is wanted, not int"),
    ],
)
def test_a_text_that_is_no_text_is_refused_with_its_place_and_without_its_content(text: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        checked(text)  # type: ignore[arg-type]
    assert caught.value.fix
    assert "Jos" not in str(caught.value)


def test_bytes_are_decoded_and_a_single_text_becomes_a_list() -> None:
    assert checked("José".encode()) == ["José"]
    assert checked("pain") == ["pain"]
    assert checked(("a", b"b")) == ["a", "b"]


def test_a_sentence_that_is_one_text_is_not_taken_for_words() -> None:
    with pytest.raises(InputError, match="sentence 1 is one text"):
        checked_words([["chest"], "pain"])
    with pytest.raises(InputError, match="sentence 0, word 1: a lone surrogate"):
        checked_words([["chest", "\ud800"]])


def test_assets_are_read_from_their_folder_and_refused_when_broken(tmp_path: Path) -> None:
    folder = tmp_path
    write_assets(folder, max_length=48, normalize=True)
    assets = TextAssets.read(folder)
    assert (assets.max_length, assets.normalize, assets.mask_id, assets.multi_label) == (48, True, 4, False)
    (folder / "text.json").write_text('{"max_length": 48}')
    with pytest.raises(BundleError, match="no 'pad_id'"):
        TextAssets.read(folder)
    (folder / "text.json").write_text("[]")
    with pytest.raises(BundleError, match="not a JSON dict"):
        TextAssets.read(folder)
    write_assets(folder, max_length=3)
    with pytest.raises(BundleError, match="leaves no room"):
        TextAssets.read(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        TextAssets.read(folder)
