"""Tokenizers of checkpoints: what a file leaves out is what transformers puts in."""

from __future__ import annotations

import json
from pathlib import Path

from medcompile.models._tokenizers import tokenizer
from tests.runtime import fakes


def test_a_word_piece_file_without_special_tokens_around_texts_gets_those_of_transformers(tmp_path: Path) -> None:
    import transformers

    whole = fakes.tokenizer()
    facts = json.loads(whole.to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts | {"post_processor": None}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    made, _ = tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for pair in (None, "no fever"):
        encoding = made.encode("the patient denies chest pain", pair)
        expected = theirs("the patient denies chest pain", pair)
        assert encoding.ids == expected["input_ids"]
        assert encoding.type_ids == expected["token_type_ids"]
        assert encoding.ids[0] == made.token_to_id("[CLS]") and encoding.ids[-1] == made.token_to_id("[SEP]")


def test_a_file_that_says_what_stands_around_texts_is_taken_at_its_word(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    whole = fakes.tokenizer()
    whole.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", whole.token_to_id("[SEP]"))])
    whole.save(str(tmp_path / "tokenizer.json"))
    made, _ = tokenizer(tmp_path)
    assert made.encode("pain").tokens == ["pain", "[SEP]"]
