from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from medcompile.runtime.detokenize import TextStream

BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level() -> Tokenizer:
    """GPT-2's way: a token is a few bytes under printable names, and may end inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = [("Ġ", "t"), ("h", "e"), ("ð", "Ł"), ("â", "Ĥ")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama's way: pieces with spaces as underlines, single bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", *"abcdefghijklmnopqrstuvwxyz.", "\u2581the", "\u2581pain", "er"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
TEXT = "the pain \U0001f600\U0001f468\u200d\U0001f469 caf\u00e9 \u20ac\u03b1 \u4e2d\u6587 er."


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for i in ids:
        pieces.append(stream.push(i))
        if stream.stopped is not None:
            return pieces
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_join_to_the_whole_text_and_no_character_is_cut(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert len(ids) > len(TEXT)  # characters of several tokens
    pieces = streamed(tokenizer, [], ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("at", [1, 5, 9, 14, 30])
def test_an_answer_goes_on_from_its_prompt_with_the_space_between(name: str, at: int) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the pain er the pain er the pain er the pain er", add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    assert tokenizer.decode(ids[:at]) + "".join(streamed(tokenizer, ids[:at], ids[at:])) == whole


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_comes_back_from_byte_level_tokens(text: str) -> None:
    ids = TOKENIZERS["byte level"].encode(text, add_special_tokens=False).ids
    assert "".join(streamed(TOKENIZERS["byte level"], [], ids)) == text


@given(st.lists(st.integers(0, 259), max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_byte_level_tokens_at_all_stream_to_what_the_tokenizer_decodes(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert "".join(streamed(tokenizer, [], ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 280), max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_byte_fallback_tokens_stream_to_what_the_tokenizer_decodes_if_their_bytes_are_characters(
    ids: list[int],
) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    text = "".join(streamed(tokenizer, [], ids))
    whole = tokenizer.decode(ids)
    assert text == whole or "\ufffd" in whole


def test_special_tokens_leave_no_text() -> None:
    tokenizer = TOKENIZERS["byte level"]
    end = tokenizer.token_to_id("<|end|>")
    ids = tokenizer.encode("the", add_special_tokens=False).ids
    assert "".join(streamed(tokenizer, [], [*ids, end, end, *ids])) == "thethe"


def test_a_word_after_a_special_token_keeps_its_space() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    the = tokenizer.token_to_id("\u2581the")
    ids = [the, 2, 2, the, 2, the]
    assert "".join(streamed(tokenizer, [the], ids)) == tokenizer.decode([the, *ids])[len("the") :] == " the the the"


def test_a_stop_string_over_token_borders_ends_the_text_before_it_and_is_never_shown() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("pain:\n\nEND of it", add_special_tokens=False).ids
    pieces = streamed(tokenizer, [], ids, ("\n\nEND", "never"))
    assert "".join(pieces) == "pain:"
    assert len(pieces) == len("pain:\n\nEND")  # the tokens after it were not read


def test_what_might_become_a_stop_string_is_held_back_only_as_long_as_it_might() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a##b#", add_special_tokens=False).ids
    assert streamed(tokenizer, [], ids, ("###",)) == ["a", "", "", "##b", "", "#"]


def test_the_earliest_of_several_stop_strings_wins() -> None:
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer, [], ("Ġ", "the", "he"))
    (the,) = [tokenizer.token_to_id("Ġt")]
    assert stream.push(the) == " "
    assert stream.push(tokenizer.token_to_id("he")) == ""
    assert stream.stopped == "the"
    assert stream.finish() == ""


@given(st.text("ab#", max_size=20), st.sampled_from([("##",), ("a#", "#a"), ("ab", "b#b"), ("aba",)]))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_stopping_gives_the_text_before_the_first_stop_string(text: str, stop: tuple[str, ...]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    # The first to be complete ends the answer: nothing after it exists.
    ends = sorted((text.find(s) + len(s), -len(s)) for s in stop if s in text)
    expected = text[: ends[0][0] + ends[0][1]] if ends else text
    assert "".join(streamed(tokenizer, [], ids, stop)) == expected


def test_the_trained_medical_tokenizer_streams_a_note(shared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "models" / "tiny-medllama" / "tokenizer.json"))
    ids = tokenizer.encode(
        "BP 128/84, temp 37.2 \u00b0C; \u03b1-blocker since 2019.\n\nPlan: see cardiology \u2192 soon"
    ).ids
    for cut in range(1, len(ids)):
        head = tokenizer.decode(ids[:cut])
        if not head.endswith("\ufffd"):
            assert head + "".join(streamed(tokenizer, ids[:cut], ids[cut:])) == tokenizer.decode(ids)
