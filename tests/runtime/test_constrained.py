from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from medcompile.errors import InputError, UsageError
from medcompile.runtime.constrained import Grammars
from medcompile.runtime.generator import Generator
from medcompile.runtime.prompts import DecoderText
from medcompile.runtime.sampling import Sampling
from tests.runtime.fake_decoder import FakeDecoder

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {
        "drug": {"type": "string", "maxLength": 8},
        "mg": {"type": "integer", "minimum": 0, "maximum": 999},
        "route": {"enum": ["oral", "iv"]},
    },
    "required": ["drug", "mg", "route"],
    "additionalProperties": False,
}


def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["</s>"])
    return found


TOKENIZER = tokenizer()
END = 256


def generator(guess: int = 0, blocks: int = 300) -> Generator:
    model = FakeDecoder(blocks=blocks, block_size=4, vocabulary=260)  # wider than the tokenizer, as models often are
    return Generator(model, DecoderText(TOKENIZER, 400, (END,)), guess=guess)


def asked(response_format: dict[str, Any], **more: Any) -> Sampling:
    return Sampling(max_tokens=120, response_format=response_format, **more)


JSON = {"type": "json_schema", "json_schema": {"schema": {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}}}


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_an_answer_under_a_schema_is_json_that_the_schema_accepts(seed: int | None) -> None:
    validate = pytest.importorskip("jsonschema").validate
    sampling = asked(JSON) if seed is None else asked(JSON, temperature=1.0, seed=seed)
    (answer,) = generator().generate("note", sampling)
    assert answer.finish_reason == "stop"
    validate(json.loads(answer.text), SCHEMA)


def test_an_answer_under_an_expression_matches_it_and_ends_with_it() -> None:
    pattern = r"BP [0-9]{2,3}/[0-9]{2} mmHg"
    for seed in range(5):
        (answer,) = generator().generate("note", asked({"type": "regex", "regex": pattern}, temperature=2.0, seed=seed))
        assert re.fullmatch(pattern, answer.text)
        assert answer.finish_reason == "stop"


def test_guessing_preemption_and_company_change_no_constrained_answer() -> None:
    prompts = ['{"drug": "x", "mg": 12, "route": "oral"}', "mg: 12", '"route": "iv"']
    samplings = [asked(JSON), asked(JSON, temperature=1.0, seed=5), Sampling(max_tokens=40)]
    alone = [generator().generate(p, s)[0] for p, s in zip(prompts, samplings, strict=True)]
    crowded = generator(guess=6, blocks=45)
    together = crowded.generate(prompts, samplings)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert crowded.stats.accepted > 0


def test_masks_along_a_draft_are_those_of_taking_it_and_leave_no_trace() -> None:
    one, other = (Grammars(TOKENIZER, 260, [END]).constraint({"type": "regex", "regex": "ab+c"}) for _ in range(2))
    a, b, c, x = (TOKENIZER.token_to_id(t) for t in "abcx")
    masks = one.allowed([a, b, x, b])
    assert [None if m is None else m.nonzero()[0].tolist() for m in masks] == [[a], [b], [b, c], None, None]
    other.advance(a)
    assert one.allowed([])[0] is not None
    one.advance(a)
    assert (one.allowed([])[0] == other.allowed([])[0]).all()  # type: ignore[union-attr]
    assert not one.done
    one.advance(b)
    one.advance(c)
    assert one.done


def test_a_schema_that_cannot_be_used_is_refused_when_it_is_submitted() -> None:
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}
    with pytest.raises(InputError, match="response_format"):
        generator().submit("note", asked(wrong))
    with pytest.raises(InputError, match="unclosed"):
        generator().submit("note", asked({"type": "regex", "regex": "a(b"}))


@pytest.mark.parametrize("shape", [{"type": "xml"}, {}, {"type": "regex"}, {"type": "json_schema", "json_schema": 5}])
def test_a_response_format_of_unknown_shape_is_refused_with_those_there_are(shape: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        generator().submit("note", Sampling(response_format={"type": "xml"} | shape))
    assert "json_schema" in error.value.fix


def test_free_text_is_a_format_too() -> None:
    free, unasked = (generator().generate("note", s) for s in (asked({"type": "text"}), Sampling(max_tokens=120)))
    assert free == unasked
