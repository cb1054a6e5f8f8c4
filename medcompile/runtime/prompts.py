"""What a decoder's bundle says about text: tokenizer, chat template, window, ends. Prompts become token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import BundleError, InputError, UsageError
from medcompile.runtime.chat import ChatTemplate, Message
from medcompile.runtime.sampling import Sampling
from medcompile.runtime.text import checked, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
Prompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids as they are, or a conversation for the chat template."""


@dataclass(frozen=True)
class DecoderText:
    """Never changed after loading, so threads may share it. window: tokens of prompt and answer together, at most.

    end_ids: tokens that end an answer. sampling: how the checkpoint itself asks to be used.
    """

    tokenizer: Tokenizer
    window: int
    end_ids: tuple[int, ...] = ()
    template: ChatTemplate | None = None
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def read(cls, assets: Path) -> DecoderText:
        """From a folder with tokenizer.json, decoder.json and generation.json, and chat_template.jinja if there is one.

        Raises BundleError.
        """
        from tokenizers import Tokenizer

        facts, said = (read_json(assets / f"{name}.json", dict) for name in ("decoder", "generation"))
        template = assets / "chat_template.jinja"
        names = {k: v for k, v in said.items() if k.endswith("_token") and v is not None}
        try:
            tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no narrower type
            raise BundleError(f"{assets / 'tokenizer.json'}: {error}", fix="rebuild the bundle") from error
        try:
            return cls(
                tokenizer,
                int(facts["context"]),
                tuple(int(i) for i in said["eos_ids"]),
                ChatTemplate(template.read_text(encoding="utf-8"), names) if template.is_file() else None,
                _own_sampling(said["sampling"]),
            )
        except (KeyError, TypeError, UsageError) as error:
            raise BundleError(f"decoder.json or generation.json: {error}", fix="rebuild the bundle") from error

    def encode(self, prompt: Prompt, vocabulary: int) -> Array:
        """Token ids, int64 [tokens]: a text with the tokenizer's special tokens, a conversation with its template's.

        vocabulary: how many ids the model knows. Raises InputError for no tokens, foreign ones, or no template.
        """
        ids: Any = prompt
        if isinstance(prompt, str):
            (text,) = checked(prompt)
            ids = self.tokenizer.encode(text).ids
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.encode(self.render(prompt), add_special_tokens=False).ids  # type: ignore[arg-type]
        try:
            array = np.array(ids)
        except ValueError:  # ragged
            array = np.zeros((0, 0))
        if array.shape == (0,):
            raise InputError("a prompt without tokens", fix="give some text")
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= vocabulary:
            raise InputError(
                f"a prompt that is no text must be messages, or token ids from 0 to {vocabulary - 1}",
                fix="give a text, and let it be tokenized here",
            )
        return array.astype(np.int64)

    def room(self, ids: Array) -> int:
        """Tokens that the window has left for the answer, 1 at least. Raises InputError with the limit."""
        room = self.window - len(ids)
        if room < 1:
            raise InputError(
                f"the prompt has {len(ids)} tokens; the model's window is {self.window}, answer included",
                fix="shorten the prompt",
            )
        return room

    def render(self, messages: Sequence[Message]) -> str:
        """The text that the chat template makes of a conversation, up to where the answer begins."""
        if self.template is None:
            raise InputError("this model has no chat template", fix="give the prompt as one text")
        return self.template.render(messages)


def _own_sampling(said: Mapping[str, Any]) -> Sampling:
    """transformers' generation config in our words: without do_sample, its temperature and cuts mean nothing."""
    penalty = float(said.get("repetition_penalty", 1))
    if not said.get("do_sample"):
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        temperature=float(said.get("temperature", 1)),
        top_k=int(said.get("top_k", 50)),
        top_p=float(said.get("top_p", 1)),
        min_p=float(said.get("min_p", 0)),
        repetition_penalty=penalty,
    )
