"""Greedy tokens of a whole decoder in float32, one by one, against transformers' generate.

    python benchmarks/decoder_models.py build path:.../tiny-medllama FOLDER --variants fp32
    python benchmarks/decoder_exactness.py FOLDER TEXTS [--prompts 100] [--tokens 48] [--write FILE]

TEXTS: a .jsonl file; prompts are beginnings of its longest fields, and every second one goes on where the one before
it ended, so that half of them can begin with computed blocks of another. FOLDER may be a bundle (--checkpoint then
names the folder for transformers). Each prompt is answered

    alone      one request at a time, every prompt anew
    ragged     requests join between steps at random, others beside them are cancelled half way, the pool is so small
               that sequences are preempted, prefixes are shared
    guessed    the same, with speculation by prompt lookup

A token that differs counts as a difference, unless the two largest logits of transformers lie within 1e-3 there, which
other kernels at other batch sizes may well order otherwise: such ties are counted beside. Either ends the comparison
of that answer, as all later tokens follow from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import decoder_models
import numpy as np
from tokenizers import Tokenizer

from medcompile.runtime.generator import Generator, Stats
from medcompile.runtime.request import Request
from medcompile.runtime.sampling import Sampling

Array = np.ndarray[Any, Any]
TIE = 1e-3
SHORT, LONG = 24, 160
"""Tokens of prompts: from, to."""

HEADING = """# Greedy tokens in float32 beside transformers' generate

Made by `benchmarks/decoder_exactness.py`, which says how; one model after another.
"""


@dataclass(frozen=True)
class Expected:
    """transformers' tokens, and how far the two largest logits lay apart at each."""

    tokens: list[int]
    gaps: list[float]


@dataclass
class Tally:
    """What comparing gave. equal: answers that are the same to the end; compared: tokens."""

    equal: int = 0
    compared: int = 0
    ties: int = 0
    differences: list[str] = field(default_factory=list)

    def compare(self, index: int, got: Sequence[int], expected: Expected) -> None:
        for at, (mine, theirs) in enumerate(zip(got, expected.tokens, strict=False)):
            if mine != theirs:
                if expected.gaps[at] < TIE:
                    self.ties += 1
                else:
                    self.differences.append(f"prompt {index}, token {at}: gap {expected.gaps[at]:.4f}")
                return
            self.compared += 1
        if len(got) == len(expected.tokens):
            self.equal += 1
        else:
            self.differences.append(f"prompt {index}: {len(got)} tokens in place of {len(expected.tokens)}")


def prompts_of(path: Path, tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Token ids: pairs of a beginning of a text and a longer beginning of the same."""
    random = np.random.default_rng(0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found: list[list[int]] = []
    for row in rows:
        ids = tokenizer.encode(max((v for v in row.values() if isinstance(v, str)), key=len)).ids
        if len(ids) >= LONG and len(found) < count:
            first = int(random.integers(SHORT, LONG // 2))
            found += [ids[:first], ids[: int(random.integers(first + 1, LONG))]]
    if len(found) < count:
        raise SystemExit(f"{path.name} has texts for {len(found)} prompts only")
    return found[:count]


def expected_of(checkpoint: Path, prompts: Sequence[Sequence[int]], tokens: int, cache: Path) -> list[Expected]:
    """Answers of transformers' generate, prompt by prompt, in float32 and greedy. Kept in cache."""
    key = hashlib.sha256(json.dumps([str(checkpoint), prompts, tokens]).encode()).hexdigest()[:16]
    path = cache / f"expected-{key}.json"
    if not path.exists():
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        found = []
        for ids in prompts:
            with torch.inference_mode():
                result = model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
                    max_new_tokens=tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            two = torch.cat(result.logits).topk(2).values
            found.append([result.sequences[0, len(ids) :].tolist(), (two[:, 0] - two[:, 1]).tolist()])
        cache.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return [Expected(*pair) for pair in json.loads(path.read_text())]


def alone(generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """A salt for each, so that no prompt finds computed blocks of another."""
    return [list(generator.generate([ids], sampling, cache_salt=str(i))[0].token_ids) for i, ids in enumerate(prompts)]


def ragged(generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling) -> tuple[list[list[int]], int]:
    """Joining at random, among requests that are cancelled. Returns the answers, and how many were cancelled."""
    random = np.random.default_rng(1)
    requests: dict[int, Request] = {}
    others: list[Request] = []
    waiting = random.permutation(len(prompts)).tolist()
    cancelled = 0
    while waiting or any(r.finish_reason is None for r in requests.values()):
        for _ in range(min(len(waiting), int(random.integers(0, 4)))):
            i = waiting.pop()
            requests[i] = generator.submit(prompts[i], sampling, priority=int(random.integers(0, 3)))
            if random.random() < 0.2:
                others.append(generator.submit(prompts[int(random.integers(len(prompts)))], sampling))
        for _ in range(int(random.integers(1, 12))):
            generator.step()
        for other in [o for o in others if random.random() < 0.3]:
            cancelled += other.finish_reason is None
            generator.cancel(other)
            others.remove(other)
    for other in others:
        generator.cancel(other)
    return [[t for c in requests[i].news for t in c.token_ids] for i in range(len(prompts))], cancelled


def row(name: str, how: str, tally: Tally, stats: Stats, cancelled: int) -> str:
    cells = [name, how, tally.equal, tally.compared, tally.ties, len(tally.differences), stats.preemptions]
    cells += [stats.cached, cancelled, f"{stats.accepted} of {stats.guessed}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--variant", default="fp32")
    parser.add_argument("--targets", nargs="+", default=list(decoder_models.TARGETS))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--blocks", type=int, default=32, help="of the small pool, 32 tokens each")
    parser.add_argument("--write", type=Path, help="append the table to this file")
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(given.folder / "assets" / "tokenizer.json"))
    prompts = prompts_of(given.texts, tokenizer, given.prompts)
    checkpoint = given.checkpoint or decoder_models.checkpoint_of(given.folder)
    expected = expected_of(checkpoint, prompts, given.tokens, given.folder / "cache")
    sampling = Sampling(max_tokens=given.tokens)
    lines = [
        f"{checkpoint.name if given.checkpoint else given.folder.name}: {given.prompts} prompts of {SHORT} to {LONG} "
        f"tokens, up to {given.tokens} new ones each ({sum(len(e.tokens) for e in expected)} in all, "
        f"{sum(g < TIE for e in expected for g in e.gaps)} of them with the two largest logits within {TIE}).",
        "",
        "| target | how | equal answers | equal tokens | ties | differences | preemptions | prefix cache, tokens "
        "| cancelled beside | guesses right |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    worst = 0
    for target in given.targets:
        for how, blocks, guess in (("alone", 64, 0), ("ragged", given.blocks, 0), ("guessed", given.blocks, 8)):
            with decoder_models.open_generator(given.folder, target, given.variant, blocks, guess=guess) as generator:
                cancelled = 0
                if how == "alone":
                    answers = alone(generator, prompts, sampling)
                else:
                    answers, cancelled = ragged(generator, prompts, sampling)
                tally = Tally()
                for i, (got, right) in enumerate(zip(answers, expected, strict=True)):
                    tally.compare(i, got, right)
                lines.append(row(target, how, tally, generator.stats, cancelled))
            worst += len(tally.differences)
            for difference in tally.differences:
                print(f"{target}, {how}: {difference}", file=sys.stderr)
            print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if given.write:
        with given.write.open("a", encoding="utf-8") as file:
            file.write(("" if file.tell() else HEADING) + "\n" + text)
    raise SystemExit(1 if worst else 0)


if __name__ == "__main__":
    main()
