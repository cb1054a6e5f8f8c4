"""A small tokenizer, and executors in numpy whose answers depend on ids, types, mask and neighbours, row by row."""

from __future__ import annotations

import json
import string
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from medcompile.backends import Executor, check_feeds
from medcompile.runtime.text import TextAssets
from medcompile.spec import Axis, GraphSpec, Profile, TensorSpec

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "patient", "denies", "chest", "pain", "kidney", "injury", "met", "##form", "##in", "no", "fever", ","]
VOCABULARY = [*SPECIAL, *WORDS, *string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase), ".", "é"]
LABELS = ("O", "B-Disease", "I-Disease")
HIDDEN = 6
RADIUS = 4
"""How many tokens to each side a fake token answer looks at; less than what a window of 64 shares with the next."""

Array = np.ndarray[Any, Any]


def tokenizer() -> Tokenizer:
    t = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    t.add_special_tokens(SPECIAL)
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    t.enable_truncation(7)  # what a checkpoint's file may carry, and what the runtime must switch off
    t.enable_padding(length=7)
    return t


def text_assets(max_length: int = 64, **facts: Any) -> TextAssets:
    return TextAssets(tokenizer(), max_length=max_length, mask_token="[MASK]", **facts)


def spec(
    task: str, *, batch: tuple[int, int, int] = (1, 4, 8), sequence: tuple[int, int, int] = (4, 16, 64)
) -> GraphSpec:
    shape = ("batch", "sequence")
    inputs = [TensorSpec(n, "int64", shape) for n in ("input_ids", "attention_mask", "token_type_ids")]
    if task == "fill-mask":
        inputs.append(TensorSpec("mask_position", "int64", ("batch",)))
    output = {
        "embed": TensorSpec("embedding", "float32", ("batch", HIDDEN)),
        "token-classification": TensorSpec("logits", "float32", ("batch", "sequence", len(LABELS))),
        "sequence-classification": TensorSpec("logits", "float32", ("batch", len(LABELS))),
        "fill-mask": TensorSpec("logits", "float32", ("batch", len(VOCABULARY))),
    }[task]
    profile = Profile("default", (Axis("batch", *batch), Axis("sequence", *sequence)))
    return GraphSpec(task, tuple(inputs), (output,), (profile,))


class FakeExecutor(Executor):
    """Answers that change if an id, a type, the mask or the place of a row is wrong, and that never see padding."""

    def __init__(self, graph: GraphSpec) -> None:
        super().__init__(graph)
        self.shapes: list[tuple[int, ...]] = []
        self.threads: set[int] = set()
        self.is_closed = False
        width = graph.outputs[0].shape[-1]
        assert isinstance(width, int)
        self.table = np.random.default_rng(0).normal(size=(len(VOCABULARY), width))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self.spec, feeds)
        assert not self.is_closed
        self.shapes.append(feeds["input_ids"].shape)
        self.threads.add(threading.get_ident())
        mask = feeds["attention_mask"][..., None]
        features = self.table[feeds["input_ids"]] * (1 + feeds["token_type_ids"][..., None])
        if self.spec.name in ("embed", "sequence-classification"):
            answer = (features * mask).sum(1) / mask.sum(1)
        else:
            answer = features.copy()
            for shift in range(1, RADIUS + 1):
                answer[:, shift:] += (features * mask)[:, :-shift] / 4
                answer[:, :-shift] += (features * mask)[:, shift:] / 3
            if self.spec.name == "fill-mask":
                answer = answer[np.arange(len(answer)), feeds["mask_position"]]
        return {self.spec.outputs[0].name: answer.astype(np.float32)}

    def close(self) -> None:
        self.is_closed = True


def write_assets(folder: Path, **facts: Any) -> None:
    """tokenizer.json, text.json and labels.json as a build leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    text = {"max_length": 64, "pooling": "mean", "normalize": False, "pad_id": 0, "mask_token": "[MASK]"}
    (folder / "text.json").write_text(json.dumps({**text, "has_token_types": True, **facts}))
    (folder / "labels.json").write_text(json.dumps(LABELS))
