"""What quantization costs a decoder: perplexity, KL divergence and agreement against fp32, by method and block size.

    python benchmarks/decoder_perplexity.py CHECKPOINT JSONL [--write benchmarks/results/decoder_perplexity.md]

CHECKPOINT: a folder of the llama family (tokenizer.json, safetensors). JSONL: MedQuAD answers (fields id, focus,
answer; calibration data and evaluation data are of different diseases, told apart by a hash of focus). All graphs run
on ONNX Runtime's CPU with attention written out for fresh sequences. Texts are cut into windows of at most 512 tokens;
a window begins with the last token of the one before (a stride of 511), is run as a fresh sequence, and its first
token is context alone, so every token of a text but its first is scored once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from medcompile import sources
from medcompile.models import ModelOptions, llama
from medcompile.passes.calibrate import Calibrate
from medcompile.passes.export import export
from medcompile.passes.quantize import Quantize
from medcompile.passes.simplify import Simplify
from medcompile.program import Context, Program, Silent
from medcompile.rewrites import fresh_attention
from medcompile.run_onnx import run_onnx
from medcompile.spec import Precision, Variant

if TYPE_CHECKING:
    import onnx_ir as ir

WINDOW, BATCH_TOKENS, RESAMPLES = 512, 1024, 2000
EVALUATION_SHARE = 5  # of 20 diseases
Array = np.ndarray[Any, Any]

INT4, INT8 = Precision.INT4, Precision.INT8
VARIANTS = (
    Variant("int8 rtn", weights=INT8),
    Variant("int8 rtn, embeddings int8", weights=INT8, embeddings=INT8),
    Variant("int8 W8A8 per token", weights=INT8, activations=INT8, dynamic=True),
    Variant("int8 W8A8 static, smoothquant", weights=INT8, activations=INT8, method="smoothquant"),
    *(
        Variant(f"int4 {method}, block {size}", weights=INT4, block_size=size, method=method)
        for size in (32, 128)
        for method in ("rtn", "awq", "gptq")
    ),
    Variant("int4 rtn, block 32, lm_head float", weights=INT4, block_size=32, keep=("lm_head",)),
    Variant("int4 gptq, block 32, lm_head float", weights=INT4, block_size=32, method="gptq", keep=("lm_head",)),
)


@dataclass
class Score:
    """Sums by document: negative log-likelihood, KL divergence from fp32, equal best tokens; scored tokens."""

    loss: list[float] = field(default_factory=list)
    divergence: float = 0.0
    equal: int = 0


def documents(path: Path, tokenizer: Tokenizer, *, evaluation: bool, tokens: int) -> list[Array]:
    """Token ids of answers, in an order fixed by their ids, until there are so many tokens."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    rows = [r for r in rows if (_digest(r["focus"]) % 20 < EVALUATION_SHARE) == evaluation]
    found: list[Array] = []
    for row in sorted(rows, key=lambda r: _digest(r["id"])):
        if sum(map(len, found)) >= tokens:
            break
        found.append(np.array(tokenizer.encode(row["answer"]).ids))
    return found


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def batches(texts: Sequence[Array]) -> Iterator[tuple[list[int], dict[str, Array]]]:
    """(document of each window, feeds) of ragged batches of fresh sequences."""
    windows = [
        (i, ids[at : at + WINDOW]) for i, ids in enumerate(texts) for at in range(0, max(len(ids) - 1, 1), WINDOW - 1)
    ]
    held: list[tuple[int, Array]] = []
    for one in [*windows, None]:
        if held and (one is None or sum(len(w) for _, w in held) + len(one[1]) > BATCH_TOKENS):
            lengths = [len(w) for _, w in held]
            yield (
                [i for i, _ in held],
                {
                    "input_ids": np.concatenate([w for _, w in held]).astype(np.int64),
                    "positions": np.concatenate([np.arange(n) for n in lengths]),
                    "query_starts": np.cumsum([0, *lengths]).astype(np.int32),
                    "logit_rows": np.arange(sum(lengths)),
                },
            )
            held = []
        if one is not None:
            held.append(one)


def log_probabilities(program: Program, texts: Sequence[Array]) -> Iterator[Array]:
    model = program.graphs["generate"].model.clone()
    fresh_attention.rewrite(model)
    feeds = (fresh_attention.feeds_of(model, f) for _, f in batches(texts))
    for outputs in run_onnx(model, feeds, ("logits",)):
        logits = outputs["logits"] - outputs["logits"].max(axis=1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def scored(programs: dict[str, Program], texts: Sequence[Array]) -> dict[str, Score]:
    """The first program is the reference. All go through the texts side by side."""
    scores = {name: Score([0.0] * len(texts)) for name in programs}
    runs = [log_probabilities(p, texts) for p in programs.values()]
    for (owners, feeds), answers in zip(batches(texts), zip(*runs, strict=True), strict=True):
        starts, ids = feeds["query_starts"], feeds["input_ids"]
        reference = answers[0]
        for score, answer in zip(scores.values(), answers, strict=True):
            for owner, start, end in zip(owners, starts[:-1], starts[1:], strict=True):
                score.loss[owner] -= float(answer[np.arange(start, end - 1), ids[start + 1 : end]].sum())
            inner = np.delete(np.arange(len(ids)), starts[1:] - 1)
            score.divergence += float((np.exp(reference[inner]) * (reference[inner] - answer[inner])).sum())
            score.equal += int((reference[inner].argmax(1) == answer[inner].argmax(1)).sum())
    return scores


def change(score: Score, reference: Score, lengths: Array) -> tuple[float, float, float]:
    """Change of perplexity in %, and a 95 % interval from documents drawn again."""
    moved = np.array(score.loss) - np.array(reference.loss)
    drawn = np.random.default_rng(0).integers(0, len(moved), (RESAMPLES, len(moved)))
    draws = 100 * np.expm1(moved[drawn].sum(1) / lengths[drawn].sum(1))
    low, high = np.percentile(draws, [2.5, 97.5])
    return 100 * float(np.expm1(moved.sum() / lengths.sum())), float(low), float(high)


def linear_bits(program: Program) -> float:
    """Bits per weight over all linear layers, with scales as float16."""
    stored = weights = 0.0
    for node in program.graphs["generate"].model.graph:
        if node.op_type not in ("MatMul", "MatMulInteger") or node.inputs[1] is None:
            continue
        value: ir.Value | None = node.inputs[1]
        producer = node.inputs[1].producer()
        scales = 0
        if producer is not None and producer.op_type == "DequantizeLinear":
            value, scale = producer.inputs[0], producer.inputs[1]
            assert scale is not None and scale.const_value is not None
            scales = scale.const_value.size
        if value is not None and value.const_value is not None:
            weights += value.const_value.size
            stored += value.const_value.size * value.const_value.dtype.bitwidth + 16 * scales
    return stored / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--calibration-tokens", type=int, default=30_000)
    parser.add_argument("--evaluation-tokens", type=int, default=40_000)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(given.checkpoint / "tokenizer.json"))
    seen = documents(given.data, tokenizer, evaluation=False, tokens=given.calibration_tokens)
    texts = documents(given.data, tokenizer, evaluation=True, tokens=given.evaluation_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        plain = Context(Path(scratch), Silent(), None, lambda _: (f for _, f in batches(seen)), run_onnx)
        checkpoint = sources.resolve(f"path:{given.checkpoint}", cache=Path(scratch) / "cache")
        program = Simplify()(export(llama.FAMILY, checkpoint, ModelOptions(("generate",), ())), plain)
        calibrated = Calibrate()(program, plain)
        programs, seconds = {"fp32": program}, {"fp32": 0.0}
        for variant in VARIANTS:
            started = time.perf_counter()
            context = Context(Path(scratch), Silent(), variant, plain.batches, run_onnx)
            programs[variant.name] = Quantize()(calibrated, context)
            seconds[variant.name] = time.perf_counter() - started
            print(f"{variant.name}: {seconds[variant.name]:.1f} s", flush=True)
        scores = scored(programs, texts)
        bits = {name: linear_bits(p) for name, p in programs.items()}
    text = _report(given, seen, texts, scores, seconds, bits)
    print(text)
    if given.write:
        given.write.write_text(text, encoding="utf-8")


def _report(
    given: argparse.Namespace,
    seen: Sequence[Array],
    texts: Sequence[Array],
    scores: dict[str, Score],
    seconds: dict[str, float],
    bits: dict[str, float],
) -> str:
    lengths = np.array([len(t) - 1 for t in texts])
    total, reference = int(lengths.sum()), scores["fp32"]
    lines = [
        f"# What quantization costs a decoder: {given.checkpoint.name}",
        "",
        f"`python benchmarks/decoder_perplexity.py CHECKPOINT {given.data.name}`",
        "",
        f"Calibrated on {len(seen)} answers ({sum(map(len, seen)):,} tokens), judged on {len(texts)} answers about "
        f"other diseases ({total:,} scored tokens). Windows of {WINDOW} tokens, stride {WINDOW - 1}, each a fresh "
        "sequence; its first token is context alone. All linear layers are quantized, lm_head too unless said. "
        "Where a block does not divide a layer's inputs, that layer has smaller blocks (bits count them).",
        "Change: of perplexity against fp32, with a paired 95 % bootstrap interval over answers. Agreement: share of "
        "tokens after which the most probable next one is the same. Bits: per weight of linear layers, scales in 16 "
        "bits. Seconds: of the quantize pass, on two shared cores.",
        "",
        "| variant | perplexity | change, % | interval, % | KL, 1e-3 nats | agreement | bits | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, score in scores.items():
        perplexity = np.exp(sum(score.loss) / total)
        moved, low, high = change(score, reference, lengths)
        divergence, equal = 1000 * score.divergence / total, score.equal / total
        lines.append(
            f"| {name} | {perplexity:.3f} | {moved:+.3f} | {low:+.3f} to {high:+.3f} | "
            f"{divergence:.3f} | {equal:.4f} | {bits[name]:.2f} | {seconds[name]:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
