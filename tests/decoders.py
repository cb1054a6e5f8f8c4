"""Tiny decoders with random weights, and steps over them: what tests of the llama family and its lowerings share."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from medcompile import onnx_files, sources
from medcompile.models import ModelOptions, llama
from medcompile.passes.export import export
from medcompile.passes.simplify import Simplify
from medcompile.program import Context, Program, Silent
from medcompile.runtime.decoder import StepBatch, StepModel

Array = np.ndarray[Any, Any]

VOCABULARY, POSITIONS = 128, 96
OPTIONS = ModelOptions(tasks=("generate",), profiles=())
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    "window": {"model_type": "mistral", "sliding_window": 8},
    "mixed": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "norms": {"model_type": "qwen3"},
}


def config(kind: str) -> dict[str, Any]:
    return _COMMON | KINDS[kind]


def write_checkpoint(kind: str, folder: Path, *, shard: str = "5GB") -> Path:
    """A folder that transformers saved, with a tokenizer of bytes."""
    import torch
    import transformers
    from transformers.models.auto import CONFIG_MAPPING

    torch.manual_seed(7)
    told = CONFIG_MAPPING[config(kind)["model_type"]].from_dict(config(kind))
    model = transformers.AutoModelForCausalLM.from_config(told)
    for name, parameter in model.named_parameters():  # transformers begins biases and norms at 0 and 1
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"})
    )
    return folder


def tokenizer() -> Tokenizer:
    alphabet = list(map(chr, range(33, 127)))
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "\u0120", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    return made


def simplified(folder: Path) -> Program:
    return Simplify()(export(llama.FAMILY, sources.resolve(f"path:{folder}"), OPTIONS), Context(Path(), Silent()))


def write_graph(program: Program, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    onnx_files.save({name: graph.model for name, graph in program.graphs.items()}, out)
    return out / "generate.onnx"


def reference(folder: Path) -> Any:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits_of(model: Any, ids: Array) -> Array:
    """transformers' logits [tokens, vocabulary] of one sequence."""
    import torch

    with torch.inference_mode():
        result: Array = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return result


class Sequences:
    """Sequences with blocks of their own, out of order, and steps over any of them at once."""

    def __init__(self, model: StepModel, capacity: int, count: int, seed: int = 0) -> None:
        self.model = model
        each = -(-capacity // model.block_size)
        free = np.random.default_rng(seed).permutation(model.blocks)
        assert each * count <= model.blocks
        self.tables = free[: each * count].reshape(count, each).astype(np.int32)
        self.lens = [0] * count

    def step(self, new: dict[int, Sequence[int]], *, every_row: bool = False) -> dict[int, Array]:
        """Advance sequence i by the tokens new[i]. Returns the logits of its last one, or of every one."""
        starts = np.cumsum([0, *(len(ids) for ids in new.values())])
        used = max(-(-(self.lens[i] + len(ids)) // self.model.block_size) for i, ids in new.items())
        table = np.zeros((len(new), used), np.int32)
        for row, (i, ids) in zip(table, new.items(), strict=True):
            own = -(-(self.lens[i] + len(ids)) // self.model.block_size)
            row[:own] = self.tables[i, :own]
        batch = StepBatch(
            input_ids=np.concatenate([np.asarray(ids, np.int64) for ids in new.values()]),
            positions=np.concatenate([np.arange(len(ids)) + self.lens[i] for i, ids in new.items()]),
            query_starts=starts.astype(np.int32),
            past_lens=np.array([self.lens[i] for i in new], np.int32),
            block_table=table,
            logit_rows=np.arange(starts[-1]) if every_row else starts[1:] - 1,
        )
        logits = self.model.step(batch).copy()
        for i, ids in new.items():
            self.lens[i] += len(ids)
        rows = itertools.pairwise(starts) if every_row else ((j, j + 1) for j in range(len(new)))
        return {i: logits[a:b] for i, (a, b) in zip(new, rows, strict=True)}


def chunked_logits(model: StepModel, texts: Sequence[Array], seed: int = 0) -> list[Array]:
    """The logits of every token of texts, in ragged chunks of random lengths that join and leave as they like."""
    random = np.random.default_rng(seed)
    running = Sequences(model, max(map(len, texts)), len(texts), seed)
    found: list[list[Array]] = [[] for _ in texts]
    while left := [i for i, text in enumerate(texts) if running.lens[i] < len(text)]:
        new = {}
        for i in left:
            if count := int(random.integers(0, 14)):
                new[i] = texts[i][running.lens[i] : running.lens[i] + count]
        if new:
            for i, logits in running.step(new, every_row=True).items():
                found[i].append(logits)
    return [np.concatenate(pieces) for pieces in found]
