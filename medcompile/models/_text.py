"""What a decoder's runtime needs of its checkpoint beside numbers: tokenizer, chat template, and how it generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.errors import SourceError

if TYPE_CHECKING:
    from medcompile.sources import Checkpoint

# Anything that shows whether two tokenizers begin, split and end a text alike.
_PROBE = "The patient (62 y/o) denies chest pain; BP 128/84.\n\nCaf\u00e9 \u03b1-blocker  x2"
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def tokenizer(checkpoint: Checkpoint) -> tuple[Any, tuple[str, ...]]:
    """The checkpoint's tokenizer as a tokenizers.Tokenizer that gives what transformers' would. Raises SourceError.

    It is tokenizer.json as it stands, unless transformers changes it by tokenizer_config.json (a beginning that is
    put before every text, say) or makes it of older files.
    """
    import transformers
    from tokenizers import Tokenizer

    folder = checkpoint.folder
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = theirs.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
        raise SourceError(
            f"{checkpoint.source}: no tokenizer can be made of {folder.name}: {error}",
            fix="save the tokenizer with transformers' save_pretrained(), and put its tokenizer.json there",
        ) from error
    path = folder / "tokenizer.json"
    if path.is_file():
        own = Tokenizer.from_file(str(path))
        own.no_truncation()
        own.no_padding()
        if own.encode(_PROBE).ids == theirs(_PROBE).input_ids:
            return own, ()
    backend.no_truncation()
    backend.no_padding()
    if path.is_file():
        return backend, ("tokenizer: changed as tokenizer_config.json asks, so that ids are those of transformers",)
    return backend, ()


def chat_template(folder: Path) -> str | None:
    """The checkpoint's chat template (Jinja), from whichever file it keeps it in; the default one of several."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        told = _read_json(folder / name).get("chat_template")
        if isinstance(told, list):
            told = {one["name"]: one["template"] for one in told}.get("default")
        if told:
            return str(told)
    return None


def generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """eos_ids (generation ends at any of them), bos_id, pad_id, the tokens' texts as chat templates name them, and the
    checkpoint's own sampling settings, where it says any."""
    said = {**checkpoint.config, **_read_json(checkpoint.folder / "generation_config.json")}
    texts = _read_json(checkpoint.folder / "tokenizer_config.json")
    ends = said.get("eos_token_id")
    result: dict[str, Any] = {
        "eos_ids": sorted(set(ends if isinstance(ends, list) else [] if ends is None else [ends])),
        "bos_id": said.get("bos_token_id"),
        "pad_id": said.get("pad_token_id"),
        "sampling": {k: said[k] for k in _SAMPLING if said.get(k) is not None},
    }
    for name in ("bos_token", "eos_token", "pad_token"):
        token = texts.get(name)
        result[name] = token.get("content") if isinstance(token, dict) else token
    return result


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
