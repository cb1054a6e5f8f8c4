"""Tokenizers of encoders, of every age, as a tokenizers.Tokenizer: BERT's from vocab.txt, CLIP's from its two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medcompile.errors import SourceError

_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """The folder's tokenizer, without truncation and padding, and notes on what was assumed. Raises SourceError."""
    from tokenizers import Tokenizer

    notes: tuple[str, ...] = ()
    if (folder / "tokenizer.json").is_file():
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        _complete(made)
    elif (folder / "vocab.txt").is_file():
        made, notes = _word_piece(folder)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        made = _clip_bpe(folder)
    else:
        raise SourceError(
            f"{folder.name}: neither tokenizer.json nor vocab.txt", fix="add the tokenizer's files to the folder"
        )
    made.no_truncation()
    made.no_padding()
    return made, notes


def settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none."""
    file = folder / "tokenizer_config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _complete(made: Any) -> None:
    """Add the special tokens around texts to a WordPiece file that says none: transformers' BertTokenizer, which such
    files are read by, puts them there whatever the file says."""
    from tokenizers import models, processors

    begin, end = (made.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    if made.post_processor is None and isinstance(made.model, models.WordPiece) and None not in (begin, end):
        made.post_processor = processors.BertProcessing(("[SEP]", end), ("[CLS]", begin))


def _word_piece(folder: Path) -> tuple[Any, tuple[str, ...]]:
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    words = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")  # line number = id
    said = settings(folder)
    notes: tuple[str, ...] = ()
    lowercase = said.get("do_lower_case")
    if lowercase is None:
        # Cased checkpoints of 2019 often say nothing; a vocabulary with capitals would be wasted by lowercasing.
        capitals = sum(w != w.lower() for w in words if not w.startswith("["))
        lowercase = capitals == 0
        notes = (
            f"tokenizer: the checkpoint does not say whether it is cased; its vocabulary has {capitals} entries with "
            f"capitals, so text is {'lowercased' if lowercase else 'kept cased'}",
        )
    made = BertWordPieceTokenizer(
        {word: i for i, word in enumerate(words)},
        lowercase=bool(lowercase),
        strip_accents=said.get("strip_accents"),
        handle_chinese_chars=bool(said.get("tokenize_chinese_chars", True)),
    )
    made.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in words])
    return made._tokenizer, notes


def _clip_bpe(folder: Path) -> Any:
    """Byte pairs of words in lower case, as CLIP cuts them. Source: transformers' CLIPTokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges: list[Any] = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    if _BEGIN not in vocabulary or _END not in vocabulary or any(len(m) != 2 for m in merges):
        raise SourceError(
            f"{folder.name}: vocab.json and merges.txt are not those of CLIP", fix="add tokenizer.json to the folder"
        )
    made = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", fuse_unk=False, unk_token=_END)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([_BEGIN, _END])
    made.post_processor = processors.RobertaProcessing(
        (_END, vocabulary[_END]),
        (_BEGIN, vocabulary[_BEGIN]),
        False,  # trim_offsets
        False,  # add_prefix_space
    )
    return made
