from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile.errors import BundleError, CacheFull, InputError, UsageError
from medcompile.runtime.chat import ChatTemplate
from medcompile.runtime.generator import Generator
from medcompile.runtime.prompts import DecoderText
from medcompile.runtime.sampling import Sampling
from tests.runtime.fake_decoder import FakeDecoder, letters

END = 23
TEXT = DecoderText(letters(), 60, (END,))


def make(text: DecoderText = TEXT, **model: int) -> tuple[FakeDecoder, Generator]:
    fake = FakeDecoder(**model)
    return fake, Generator(fake, text, step_tokens=16, requests=4)


def ids(text: str) -> list[int]:
    return [ord(c) - ord("a") for c in text]


def test_answers_come_in_the_order_of_their_prompts_and_are_the_models_own() -> None:
    fake, generator = make(blocks=64)
    prompts = ["abc", "hello", "b", "xxabcxxabc"]
    answers = generator.generate(prompts, Sampling(max_tokens=12))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = fake.greedy(ids(prompt), 12, END)
        assert list(answer.token_ids) == expected
        assert answer.prompt_tokens == len(prompt)
        assert answer.finish_reason == ("stop" if expected[-1] == END else "length")
        assert answer.text == "".join(chr(ord("a") + i) for i in expected if i != END)
    assert {a.finish_reason for a in answers} == {"stop", "length"} or len(answers[0].token_ids) == 12


def test_chunks_join_to_the_completion() -> None:
    _, generator = make(blocks=64)
    sampling = Sampling(max_tokens=20, logprobs=2)
    (whole,) = generator.generate("hello", sampling)
    chunks = list(generator.stream("hello", sampling))
    assert "".join(c.text for c in chunks) == whole.text
    assert tuple(i for c in chunks for i in c.token_ids) == whole.token_ids
    assert tuple(p for c in chunks for p in c.logprobs) == whole.logprobs
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert [p.token_id for p in whole.logprobs] == [p.top[0][0] for p in whole.logprobs] == list(whole.token_ids)


def test_a_stop_string_ends_the_answer_before_it_and_a_stop_id_after_it() -> None:
    fake, generator = make(blocks=64)
    expected = fake.greedy(ids("hello"), 10)
    word = "".join(chr(ord("a") + i) for i in expected[3:5])
    (answer,) = generator.generate("hello", Sampling(max_tokens=10, stop=word, ignore_eos=True))
    assert (answer.stop, answer.finish_reason) == (word, "stop")
    assert answer.text.endswith("".join(chr(ord("a") + i) for i in expected[:3])[-3:])
    assert list(answer.token_ids) == expected[:5]
    (answer,) = generator.generate("hello", Sampling(max_tokens=10, stop_ids=(expected[2],), ignore_eos=True))
    at = expected.index(expected[2]) + 1
    assert (answer.stop, list(answer.token_ids)) == (expected[2], expected[:at])
    assert len(answer.text) == at - 1


def test_an_end_token_is_passed_over_when_asked() -> None:
    fake = FakeDecoder(blocks=64)
    end = fake.greedy(ids("hello"), 4)[3]
    _, generator = make(DecoderText(letters(), 60, (end,)), blocks=64)
    (short,) = generator.generate("hello", Sampling(max_tokens=10))
    (long,) = generator.generate("hello", Sampling(max_tokens=10, ignore_eos=True))
    assert short.token_ids[-1] == end
    assert len(short.token_ids) <= 4
    assert len(long.token_ids) == 10


def test_a_prompt_that_leaves_no_room_in_the_window_is_refused_with_the_limit() -> None:
    _, generator = make(blocks=64)
    with pytest.raises(InputError, match="60 tokens; the model's window is 60"):
        generator.submit("a" * 60)
    (answer,) = generator.generate("a" * 59, Sampling(max_tokens=10, ignore_eos=True))
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


def test_a_request_that_the_pool_could_never_hold_is_refused_with_numbers() -> None:
    fake, generator = make(blocks=4)
    with pytest.raises(CacheFull, match="10 tokens of prompt and up to 8 of answer need 5 blocks of 4; the pool has 4"):
        generator.submit("a" * 10, Sampling(max_tokens=8))
    (answer,) = generator.generate("a" * 10, Sampling(max_tokens=7, ignore_eos=True))  # the last is not computed
    assert list(answer.token_ids) == fake.greedy([0] * 10, 7)
    (answer,) = generator.generate("a" * 10, Sampling(ignore_eos=True))  # no limit asked: what the pool holds
    assert len(answer.token_ids) == 7


@pytest.mark.parametrize(
    "prompt", ["", [], [99], [-1], [1.5], [[1]], [[1], [1, 2]], ["a", "b"], 7, None, {"a": 1}, [{"role": "user"}, 1]]
)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    _, generator = make()
    with pytest.raises(InputError):
        generator.submit(prompt)
    assert generator.stats.waiting == 0
    assert generator.generate([]) == []


def test_token_ids_may_be_a_list_or_an_array() -> None:
    _, generator = make(blocks=64)
    a, b, c = generator.generate(["abc", [0, 1, 2], np.array([0, 1, 2])], Sampling(max_tokens=5))  # type: ignore[list-item]
    assert a == b == c


def test_a_conversation_goes_through_the_chat_template() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' if add_generation_prompt }}", {})
    _, generator = make(DecoderText(letters(), 60, (END,), template), blocks=64)
    talk = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}]
    assert generator.generate([talk], Sampling(max_tokens=5)) == generator.generate("abcdx", Sampling(max_tokens=5))
    with pytest.raises(InputError, match="no chat template"):
        make()[1].submit(talk)


def test_a_second_question_about_the_same_note_computes_the_note_no_more() -> None:
    fake, generator = make(blocks=64)
    note = "abcdefghijklmnopqrst"
    generator.generate(note + "aa", Sampling(max_tokens=2))
    before = fake.computed_tokens
    (answer,) = generator.generate(note + "bb", Sampling(max_tokens=2))
    assert answer.cached_tokens == 20
    assert fake.computed_tokens - before <= 3
    (answer,) = generator.generate(note + "cc", Sampling(max_tokens=2), cache_salt="another tenant")
    assert answer.cached_tokens == 0


def test_a_seed_gives_the_same_answer_in_any_company_and_none_gives_others() -> None:
    _, generator = make(blocks=64)
    sampling = Sampling(max_tokens=15, temperature=1.5, seed=11, ignore_eos=True)
    (alone,) = generator.generate("hello", sampling)
    crowd = generator.generate(["a", "hello", "bb", "hello"], [Sampling(max_tokens=9), sampling, sampling, sampling])
    assert crowd[1].token_ids == crowd[3].token_ids == alone.token_ids
    free = generator.generate(["hello"] * 8, Sampling(max_tokens=15, temperature=1.5, ignore_eos=True))
    assert len({a.token_ids for a in free}) > 1


def test_a_server_submits_steps_and_reads() -> None:
    fake, generator = make(blocks=64)
    first = generator.submit("hello", Sampling(max_tokens=8, ignore_eos=True))
    assert generator.step()
    second = generator.submit("abc", Sampling(max_tokens=3, ignore_eos=True))
    while generator.step():
        pass
    assert list(first.completion().token_ids) == fake.greedy(ids("hello"), 8)
    assert list(second.completion().token_ids) == fake.greedy(ids("abc"), 3)
    assert not generator.step()


def test_cancelling_frees_blocks_at_once_and_keeps_what_was_said() -> None:
    _, generator = make(blocks=64)
    request = generator.submit("hello", Sampling(max_tokens=30, ignore_eos=True))
    for _ in range(4):
        generator.step()
    generator.cancel(request)
    assert generator.stats.free_blocks == 64
    answer = request.completion()
    assert answer.finish_reason == "cancelled"
    assert len(answer.token_ids) >= 4
    generator.cancel(request)  # a second time means nothing
    assert not generator.step()


def test_a_reader_that_goes_away_cancels_its_request() -> None:
    _, generator = make(blocks=64)
    chunks = generator.stream("hello", Sampling(max_tokens=30, ignore_eos=True))
    assert generator.stats.waiting == 0  # nothing runs for one who never reads
    next(chunks)
    assert generator.stats.running == 1
    chunks.close()  # type: ignore[attr-defined]
    assert generator.stats.running == 0
    assert generator.stats.free_blocks == 64


def test_a_request_cancelled_while_the_model_runs_harms_no_other() -> None:
    fake, generator = make(blocks=64)
    doomed = generator.submit("hello", Sampling(max_tokens=30, ignore_eos=True))
    kept = generator.submit("abc", Sampling(max_tokens=8, ignore_eos=True))
    step = fake.step

    def cancelling(batch: Any) -> Any:
        if len(fake.batches) == 2:
            other = threading.Thread(target=generator.cancel, args=(doomed,))
            other.start()
            other.join(5)
            assert not other.is_alive()  # it did not have to wait for the step
            assert doomed.sequence.blocks == []
        return step(batch)

    fake.step = cancelling  # type: ignore[method-assign]
    while generator.step():
        pass
    assert list(kept.completion().token_ids) == fake.greedy(ids("abc"), 8)
    assert doomed.completion().finish_reason == "cancelled"
    assert generator.stats.free_blocks == 64


def test_a_step_that_fails_can_be_taken_again() -> None:
    fake, generator = make(blocks=64)
    note = "abcdefgh"
    generator.generate(note, Sampling(max_tokens=1))
    request = generator.submit(note, Sampling(max_tokens=6, ignore_eos=True))  # wholly cached: its step copies a block
    step = fake.step

    def broken(batch: Any) -> Any:
        raise RuntimeError("out of memory")

    fake.step = broken  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            generator.step()
    fake.step = step  # type: ignore[method-assign]
    while generator.step():
        pass
    assert list(request.completion().token_ids) == fake.greedy(ids(note), 6)


def test_an_answer_that_was_read_can_not_be_read_again_and_nobody_hangs() -> None:
    _, generator = make(blocks=64)
    request = generator.submit("hello", Sampling(max_tokens=4))
    assert len(list(generator.chunks(request))) >= 1
    assert list(generator.chunks(request)) == []
    assert len(request.completion().token_ids) >= 1


def test_an_error_in_one_requests_grammar_ends_that_request_alone() -> None:
    class Refusing:
        def allowed(self, draft: list[int]) -> Any:
            raise InputError("too much work", fix="simplify")

    fake, generator = make(blocks=64)
    doomed = generator.submit("hello")
    doomed._constraint = Refusing()  # type: ignore[assignment]
    (kept,) = generator.generate("abc", Sampling(max_tokens=8, ignore_eos=True))
    assert list(kept.token_ids) == fake.greedy(ids("abc"), 8)
    for read in (doomed.completion, lambda: list(generator.chunks(doomed))):
        with pytest.raises(InputError, match="too much work"):
            read()
    assert generator.stats.free_blocks == 64


def test_many_threads_share_a_generator_and_each_gets_its_own_answers() -> None:
    fake, generator = make(blocks=40)
    found: dict[int, list[list[int]]] = {}

    def ask(who: int) -> None:
        prompts = [[who, i, 2, 3, 4] for i in range(6)]
        if who % 2:
            found[who] = [list(a.token_ids) for a in generator.generate(prompts, Sampling(max_tokens=9))]
        else:
            found[who] = [
                [i for c in generator.stream(p, Sampling(max_tokens=9)) for i in c.token_ids] for p in prompts
            ]

    threads = [threading.Thread(target=ask, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {who: [fake.greedy([who, i, 2, 3, 4], 9, END) for i in range(6)] for who in range(6)} == found
    assert generator.stats.free_blocks == 40


def test_one_bad_prompt_of_many_leaves_nothing_behind() -> None:
    _, generator = make(blocks=64)
    with pytest.raises(InputError):
        generator.generate(["fine", "a" * 99, "fine"])
    assert (generator.stats.waiting, generator.stats.running) == (0, 0)


def test_closing_cancels_closes_the_model_and_takes_no_more() -> None:
    fake, generator = make(blocks=64)
    with generator:
        request = generator.submit("hello")
    assert request.finish_reason == "cancelled"
    assert fake.closed
    with pytest.raises(UsageError, match="closed"):
        generator.submit("hello")


def test_steps_that_could_not_hold_every_running_request_are_refused() -> None:
    with pytest.raises(UsageError) as error:
        Generator(FakeDecoder(), TEXT, step_tokens=4, requests=8)
    assert error.value.fix


def test_a_bundles_assets_say_how_to_read_and_how_to_end(tmp_path: Path) -> None:
    letters().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "decoder.json").write_text(json.dumps({"context": 50, "vocabulary": 24}))
    said = {"eos_ids": [23, 22], "bos_token": "<s>", "eos_token": None, "bos_id": 1}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "generation.json").write_text(json.dumps(said | {"sampling": sampling}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    text = DecoderText.read(tmp_path)
    assert (text.window, text.end_ids) == (50, (23, 22))
    assert text.sampling == Sampling(temperature=0.6, top_p=0.9, top_k=50)  # transformers' own default top_k
    assert text.render([{"role": "user", "content": "ab"}]) == "<s>ab"
    (tmp_path / "generation.json").write_text(json.dumps(said | {"sampling": {"temperature": 0.6}}))
    assert DecoderText.read(tmp_path).sampling == Sampling()  # without do_sample it is greedy
    (tmp_path / "decoder.json").write_text("{}")
    with pytest.raises(BundleError, match="context"):
        DecoderText.read(tmp_path)


def test_rows_of_a_draft_do_not_reach_into_the_answer_before_they_are_chosen() -> None:
    _, generator = make(blocks=64)
    request = generator.submit([1, 2, 3], Sampling(max_tokens=8))
    rows = request.rows(np.array([7, 8]))
    assert [r.history.tolist() for r in rows] == [[1, 2, 3], [1, 2, 3, 7], [1, 2, 3, 7, 8]]
    assert request.sequence.tokens.tolist() == [1, 2, 3]
