"""The command line. Every heavy import is inside its command, so that --help costs what typer costs.

Data goes to stdout (--json for machines), everything else to stderr. Exit codes: 0 good, 1 failed, 2 wrong usage or
recipe, 3 built but over budget.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from medcompile import __version__
from medcompile.errors import InputError, MedcompileError, UsageError

if TYPE_CHECKING:
    from medcompile.bundle import Bundle
    from medcompile.data import Dataset
    from medcompile.runtime.session import Session


class _Group(TyperGroup):
    """Turns this project's errors into a message on stderr and their exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MedcompileError as error:
            name = type(error).__name__
            text = str(error) if name == "RecipeError" else f"{name}: {error}"
            sys.stderr.write(f"{text}\n")
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError:
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A compiler for medical models: quantized, typed ONNX and engines, with the evidence that accuracy held.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON for machines to stdout.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more on stderr.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, such as engines/quickstart.")]
Threads = Annotated[int | None, typer.Option(help="Threads to run on; default: every core.")]


def main() -> None:
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


@app.command()
def build(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe, such as recipes/quickstart.yaml.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle's folder; default engines/NAME, with --from that bundle itself."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="BUNDLE", help="Build a bundle's graphs for more targets.")
    ] = None,
    targets: Annotated[str | None, typer.Option(help="With --from: the targets, with commas between them.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --from: manifest of the evaluation data; default: calibration/NAME.yaml.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the recipe.")
    ] = None,
    offline: Annotated[bool, typer.Option(help="Fetch nothing; use what is already here.")] = False,
    allow_phi: Annotated[bool, typer.Option(help="Read data whose manifest says phi: present, in this run.")] = False,
    cache: Annotated[Path | None, typer.Option(help="The cache folder; default $MEDCOMPILE_CACHE.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compile a recipe into a bundle and show the evidence. With --from, build a bundle's graphs for more targets."""
    from medcompile import bundle, terminal
    from medcompile.errors import OverBudgetError

    _check_origin(recipe, source, recipe_only={"--set": settings}, source_only={"--targets": targets, "--data": data})
    failure: OverBudgetError | None = None
    try:
        with terminal.progress(as_json, verbose) as progress:
            if recipe is not None:
                from medcompile import pipeline

                built = pipeline.build(
                    recipe,
                    out=out,
                    overrides=settings or (),
                    offline=offline,
                    allow_phi=allow_phi,
                    cache_folder=cache,
                    progress=progress,
                )
            else:
                from medcompile.relower import relower

                assert source is not None
                wanted = (targets or "").replace(",", " ").split()
                built = relower(
                    source, wanted, out=out, data=data, allow_phi=allow_phi, cache_folder=cache, progress=progress
                )
    except OverBudgetError as error:
        failure = error
        built = bundle.read(error.bundle, check=False)
    except MedcompileError:
        if verbose:
            traceback.print_exc()
        raise
    if as_json:
        typer.echo(json.dumps(_summary(built), indent=1))
    else:
        table = terminal.evidence_table(built.artifacts, f"{built.name}: {built.root}", judged_only=True)
        terminal.console(stderr=True).print(table)
        typer.echo(built.root)
    if failure is not None:
        raise failure


@app.command()
def inspect(
    bundle_path: BundlePath,
    engine: Annotated[
        bool,
        typer.Option("--engine", help="Show its engines instead: profiles, tensors, every layer with its formats."),
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show a bundle: graphs, variants, sizes, and which operators run in which precision."""
    from medcompile import bundle, terminal
    from medcompile.verify import DID_NOT_RUN

    found = bundle.read(bundle_path)
    if engine:
        _tell_engines(found, as_json)
        return
    layers = json.loads((found.root / "layers.json").read_bytes()) if "layers.json" in found.files else {}
    if as_json:
        typer.echo(json.dumps(_summary(found) | {"layers": layers}, indent=1))
        return
    console = terminal.console()
    source = found.provenance.get("source", "")
    console.print(
        terminal.facts(
            [
                ("bundle", f"{found.name} ({found.root})"),
                ("digest", found.digest),
                ("family", f"{found.family}: {', '.join(found.tasks)}"),
                ("source", f"{source} {found.provenance.get('revision', '')}"),
                *((f"graph {g.name}", _face(found, g.name)) for g in found.graphs.values()),
            ]
        )
    )
    console.print(terminal.size_table(found))
    console.print(terminal.layer_table(layers))
    console.print(terminal.evidence_table(found.artifacts, "evidence", judged_only=not verbose))
    for artifact in found.artifacts:
        if not artifact.ran:
            what = f"{artifact.variant} for {artifact.target.name}, {artifact.graph}: {artifact.verified_on}"
            reason = next((n for n in artifact.notes if n.startswith(DID_NOT_RUN)), "it was not judged")
            console.print(f"note: {what}; {reason}", markup=False, soft_wrap=True)
    for note in found.provenance.get("notes", ()):
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for artifact in found.artifacts if verbose else ():
        built = f"{artifact.variant} for {artifact.target.name}, {artifact.graph}: {'; '.join(artifact.notes)}"
        console.print(built, markup=False, soft_wrap=True)


@app.command()
def verify(
    bundle_path: BundlePath,
    data: Annotated[
        Path | None, typer.Option(help="Manifest of the evaluation data; default: calibration/NAME.yaml here.")
    ] = None,
    digests_only: Annotated[bool, typer.Option(help="Check the files alone, and run nothing.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Instead, say where the graphs of a variant leave those of fp32.")
    ] = False,
    variant: Annotated[str | None, typer.Option(help="With --layers: which variant; default: each.")] = None,
    allow_phi: Annotated[bool, typer.Option(help="Read data whose manifest says phi: present, in this run.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Check every digest, then make the accuracy evidence again on this machine.

    An engine that was built without its device and runs here for the first time gets its own evidence into the bundle.
    """
    from medcompile import bundle, terminal

    found = bundle.read(bundle_path)
    told = terminal.console(stderr=True)
    told.print(f"{len(found.files)} files have the digests of the manifest")
    if digests_only:
        if as_json:
            typer.echo(json.dumps({"digest": found.digest, "files": len(found.files)}))
        return
    from medcompile import verify as verification

    if variant is not None and not layers:
        raise UsageError("--variant goes with --layers", fix="leave it out: every variant is verified")
    judged_on = verification.evaluation(found, data, allow_phi=allow_phi)
    if layers:
        _tell_layers(found, judged_on, variant, as_json)
        return
    repeated = verification.repeat(found, judged_on, threads)
    made = [r.artifact for r in repeated if r.made]
    if not as_json:
        told.print(terminal.evidence_table(made, f"{found.name}, on this machine"))
    for r in repeated:
        what = f"{r.artifact.variant} for {r.artifact.target.name}, {r.artifact.graph}"
        if r.reason:
            told.print(f"{what}: did not run here: {r.reason}", markup=False, soft_wrap=True)
        if r.renewed:
            told.print(f"{what}: {r.artifact.verified_on}, for the first time", markup=False, soft_wrap=True)
    if any(r.renewed for r in repeated):
        verification.renew(found, repeated)
        told.print(f"{found.root} now holds that evidence", markup=False, soft_wrap=True)
    if as_json:
        rows = ({"reason": r.reason, "made": r.made, "renewed": r.renewed} | _artifact(r.artifact) for r in repeated)
        typer.echo(json.dumps(list(rows), indent=1))
    worse = [r.artifact for r in repeated if r.made and r.recorded not in (None, r.artifact.verdict)]
    if not made or worse:
        names = ", ".join(f"{a.variant} on {a.target.name}: {a.verdict}" for a in worse) or "nothing could be run"
        raise MedcompileError(
            f"the evidence of {found.name} does not hold on this machine ({names})",
            fix="rebuild the bundle on this machine, or use an artifact whose verdict holds",
        )


@app.command()
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


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can build and run, and the exact fix for what it can't."""
    from rich.text import Text

    from medcompile import terminal
    from medcompile.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in findings], indent=1))
        return
    marks = {True: ("yes ", "green"), False: ("no  ", "yellow")}
    terminal.console().print(
        terminal.facts((f.what, Text.assemble(marks[f.good], f.told())) for f in findings), soft_wrap=False
    )


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for completion in editors."""
    from medcompile.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def _tell_engines(found: Bundle, as_json: bool) -> None:
    """Print what backends left beside their engines. Raises UsageError if none did."""
    from medcompile import terminal

    told = [(a, f"{found.folder_of(a)}/layers.json") for a in found.artifacts]
    engines = [(a, json.loads((found.root / path).read_bytes())) for a, path in told if path in found.files]
    if not engines:
        there = ", ".join(sorted({a.target.name for a in found.artifacts}))
        raise UsageError(
            f"{found.name} holds no engine with a layer table; it is built for {there}",
            fix=f"medcompile build --from {found.root} --targets tensorrt-rtx",
        )
    if as_json:
        rows = ({"variant": a.variant, "target": a.target.name, "graph": a.graph} | engine for a, engine in engines)
        typer.echo(json.dumps(list(rows), indent=1))
        return
    for a, engine in engines:
        title = f"{a.variant} for {a.target.name}, {a.graph}: runs on {a.target.device} {a.target.arch}"
        for table in terminal.engine_tables(engine, title):
            terminal.console().print(table)


def _tell_layers(found: Bundle, judged_on: Dataset, variant: str | None, as_json: bool) -> None:
    """Print the layer errors of one variant, or each, and the first layer that jumps."""
    from medcompile import terminal
    from medcompile.layer_errors import fp32_of, layer_errors

    exact = fp32_of(found).name
    rows: list[dict[str, Any]] = []
    for name in [variant] if variant else [v for v in found.variants if v != exact]:
        for graph in found.graphs:
            errors = layer_errors(found, name, graph, judged_on)
            first = next((e.node for e in errors if e.jumped), None)
            rows.append(
                {"variant": name, "graph": graph, "first_jump": first, "layers": [asdict(error) for error in errors]}
            )
            if not as_json:
                terminal.console().print(terminal.layer_error_table(errors, f"{name} beside {exact}: {graph}"))
                told = f"{name}, {graph}: the error first jumps at {first}" if first else f"{name}, {graph}: no jump"
                typer.echo(told)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))


def _check_origin(
    recipe: Path | None, source: Path | None, recipe_only: dict[str, object], source_only: dict[str, object]
) -> None:
    """Raise UsageError unless there is a recipe or --from, one of them, and only options that go with it."""
    if (recipe is None) == (source is None):
        raise UsageError(
            "give a RECIPE, or --from BUNDLE" + ("" if recipe is None else ": not both"),
            fix="medcompile build recipes/NAME.yaml, or medcompile build --from engines/NAME --targets TARGET",
        )
    foreign = source_only if recipe is not None else recipe_only
    if wrong := [name for name, value in foreign.items() if value]:
        raise UsageError(
            f"{', '.join(wrong)} {'needs --from BUNDLE' if recipe is not None else 'needs a recipe'}",
            fix="targets and data of a recipe stand in it; change one with --set, for example --set targets=[...]"
            if recipe is not None
            else "the bundle's variants stay as they are; to change them, build the recipe again",
        )


# ---- what the commands print


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


def _face(found: Bundle, graph: str) -> str:
    spec = found.graphs[graph]
    sides = [", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in side) for side in (spec.inputs, spec.outputs)]
    ranges = ", ".join(f"{a.name} {a.min}..{a.max} (opt {a.opt})" for p in spec.profiles for a in p.axes)
    return f"{sides[0]} -> {sides[1]}; {ranges}".replace("'", "")


def _summary(found: Bundle) -> dict[str, Any]:
    return {
        "name": found.name,
        "root": str(found.root),
        "digest": found.digest,
        "family": found.family,
        "tasks": list(found.tasks),
        "graphs": {name: asdict(spec) for name, spec in found.graphs.items()},
        "variants": {name: asdict(variant) for name, variant in found.variants.items()},
        "artifacts": [_artifact(a) for a in found.artifacts],
        "provenance": dict(found.provenance),
    }


def _artifact(artifact: Any) -> dict[str, Any]:
    return asdict(artifact) | {"verdict": artifact.verdict}
