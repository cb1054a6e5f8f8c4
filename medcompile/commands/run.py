"""medcompile run: texts, images or prompts through a bundle, answers to stdout."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medcompile.commands.options import AsJson, BundlePath, Threads
from medcompile.errors import InputError, UsageError

if TYPE_CHECKING:
    from medcompile.runtime.session import Session


def run(
    bundle_path: BundlePath,
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Texts (none, or -, reads stdin as one text), or paths of images."),
    ] = None,
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="A file that holds one text.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A class to match images with; give at least two.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Of an answer that is generated; default: what the model's window holds.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Which of the bundle's tasks; default: its first.")] = None,
    backend: Annotated[str, typer.Option(help="auto, a target or a backend.")] = "auto",
    variant: Annotated[str, typer.Option(help="auto, or a variant's name.")] = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run a bundle: entities, classes, masked words or vectors of texts; vectors of images, or how well prompts fit;
    answers of decoders, as they grow."""
    from medcompile.runtime.session import load

    with load(bundle_path, backend=backend, variant=variant, threads=threads) as session:
        chosen = task or session.bundle.tasks[0]
        if chosen == "image":
            _run_images(session, text or [], prompt or [], as_json)
            return
        texts: list[str | bytes] = [*(text or ())]
        texts += [_read(path) for path in file or ()]
        if not texts or texts == ["-"]:
            texts = [sys.stdin.buffer.read()]
        if chosen == "generate":
            _run_decoder(session, texts, max_tokens, as_json)
            return
        answers = _answers(session, chosen, texts)
    for answer in answers:
        typer.echo(json.dumps(answer, ensure_ascii=False) if as_json else _told(chosen, answer))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", fix="check the path after --file") from error


def _answers(session: Session, task: str, texts: list[str | bytes]) -> list[Any]:
    """One JSON-able answer per text."""
    if task == "embed":
        return [row.tolist() for row in session.embed(texts)]
    if task == "token-classification":
        return [[asdict(entity) for entity in found] for found in session.extract(texts)]
    if task == "sequence-classification":
        return [[asdict(score) for score in scores] for scores in session.classify(texts)]
    if task == "text":
        return [row.tolist() for row in session.embed_texts(texts)]
    if task == "fill-mask":
        return [[[asdict(fill) for fill in fills] for fills in session.fill_mask(t)] for t in texts]
    raise UsageError(f"no task {task!r} in this bundle", fix=f"choose from: {', '.join(session.bundle.tasks)}")


def _run_images(session: Session, paths: list[str], prompts: list[str], as_json: bool) -> None:
    """A line for each image as it is done. A bad one is told of on stderr, and the others are unharmed."""
    if not paths:
        raise UsageError("no image to run on", fix="give the paths of images after the bundle")
    classes = session.towers.classes(prompts) if prompts else None
    bad = 0
    for result, path in zip(session.towers.images(paths), paths, strict=True):
        if result.embedding is None:
            bad += 1
            typer.echo(str(result.error), err=True)
        elif classes is None:
            answer: Any = result.embedding.tolist()
            typer.echo(json.dumps({"image": path, "embedding": answer}) if as_json else _told("image", answer))
        else:
            row = session.towers.scores(result.embedding[None], classes)[0]
            order = row.argsort(kind="stable")[::-1]
            found = [{"label": prompts[i], "score": float(row[i])} for i in order]
            told = f"{path}\n{_told('sequence-classification', found)}"
            typer.echo(json.dumps({"image": path, "scores": found}, ensure_ascii=False) if as_json else told)
    if bad:
        raise InputError(f"{bad} of {len(paths)} images can't be used", fix="see above; the others were answered")


def _run_decoder(session: Session, texts: list[str | bytes], max_tokens: int | None, as_json: bool) -> None:
    """Each text's answer, by the checkpoint's own sampling: as the user's words in a conversation, if it has a chat
    template, else as they are."""
    from dataclasses import replace

    from medcompile.runtime.text import checked

    text = session.generator.text
    sampling = replace(text.sampling, max_tokens=max_tokens)
    strings = checked(texts)
    prompts = [[{"role": "user", "content": s}] if text.template else s for s in strings]
    if as_json:
        for completion in session.generator.generate(prompts, sampling):
            typer.echo(json.dumps(asdict(completion), ensure_ascii=False))
        return
    for prompt in prompts:
        for chunk in session.chunks(prompt, sampling):
            typer.echo(chunk.text, nl=False)
        typer.echo()


def _told(task: str, answer: Any) -> str:
    if task in ("embed", "image", "text"):
        head = " ".join(f"{x:+.4f}" for x in answer[:8])
        return f"[{len(answer)}] {head} ..."
    if task == "token-classification":
        lines = (f"{e['start']:>6} {e['end']:>6}  {e['score']:.3f}  {e['label']:<20} {e['text']}" for e in answer)
        return "\n".join(lines) or "no entities"
    if task == "sequence-classification":
        return "\n".join(f"{s['score']:.3f}  {s['label']}" for s in answer)
    return "\n\n".join("\n".join(f"{f['score']:.3f}  {f['token']}" for f in fills) for fills in answer)
