"""medcompile bench: every way to run a model on this machine, side by side; or a comparison with an earlier one."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medcompile.commands.options import AllowPhi, AsJson, Threads
from medcompile.errors import MedcompileError, UsageError

if TYPE_CHECKING:
    from medcompile.bench.judgement import Change

ALL = "all"


def bench(
    model: Annotated[Path, typer.Argument(metavar="BUNDLE|RECIPE", help="Such as engines/quickstart.")],
    task: Annotated[str | None, typer.Option(help="Which of its tasks; default: its first.")] = None,
    contenders: Annotated[
        str,
        typer.Option(
            "--backends",
            help="Contenders with commas between them: torch_fp32, medcompile:int8@openvino-cpu,"
            " or the path of a contender's file; or all.",
        ),
    ] = ALL,
    shapes: Annotated[
        str, typer.Option(help="BATCHxTOKENS with commas between them; BATCHxPROMPT+NEW of decoders; BATCH of images.")
    ] = "",
    clock: Annotated[str, typer.Option(help="model: arrays in and out; text: tokenization inside.")] = "model",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="6 at least for intervals.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the order within the rounds.")] = 0,
    reference: Annotated[str, typer.Option(help="The contender that ratios are told against.")] = "",
    python: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Run a contender in another Python interpreter.")
    ] = None,
    source: Annotated[Path | None, typer.Option(help="The checkpoint's folder, if it is not where it was.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Manifest of the texts or images; default: the evaluation data.")
    ] = None,
    allow_phi: AllowPhi = False,
    compare: Annotated[
        Path | None, typer.Option(metavar="BENCH.JSON", help="Exit 1 where it has become slower beyond noise.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="With --compare: the change that is let pass.")] = 0.02,
    limits: Annotated[bool, typer.Option(help="First measure what the machine can do at most.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for bench.json and bench.html; default bench/NAME.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time every way to run a model on this machine, ours and others, in turns, with the accuracy of what they answer.

    What can't run is listed with the reason and what would change it.
    """
    from medcompile import terminal
    from medcompile.bench import harness, judgement, machine, page, results, subject, table
    from medcompile.bench.peer import MODEL, TEXT
    from medcompile.sources import default_cache

    if clock not in (MODEL, TEXT):
        raise UsageError(f"--clock {clock}", fix=f"choose {MODEL} or {TEXT}")
    cores = machine.cpus()
    if threads is not None and not 1 <= threads <= len(cores):
        raise UsageError(f"--threads {threads}; this process may use {len(cores)} cores", fix="give fewer")
    earlier = results.read(compare) if compare else None
    progress = terminal.console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="medcompile-bench-") as scratch:
        folder = Path(scratch)
        found = subject.of(model, folder, str(source.resolve()) if source else "", data)
        chosen = task or found.tasks[0]
        if chosen not in found.tasks:
            raise UsageError(f"{found.name} has no task {chosen!r}", fix=f"choose from: {', '.join(found.tasks)}")
        work = default_cache() / "bench"
        work.mkdir(parents=True, exist_ok=True)
        used = cores[: threads or len(cores)]
        job = replace(found.job, task=chosen, clock=clock, threads=len(used), cpus=used, work=str(work))
        job = replace(job, cells=subject.cells(shapes, chosen, clock, job.max_length))
        job, inputs, digest = subject.with_inputs(found, job, folder, allow_phi=allow_phi)
        plan = harness.Plan(
            found.name,
            job,
            folder,
            asked=() if contenders == ALL else tuple(name.strip() for name in contenders.split(",")),
            pythons=_pythons(python or []),
            reference=reference,
            rounds=rounds,
            seed=seed,
            inputs=inputs,
            digests=found.digests | {"inputs": digest},
            limits=limits,
        )
        with progress.status("") as status, _ended_politely():
            tell = status.update if progress.is_terminal else lambda line: progress.print(line, markup=False)
            made = harness.run(plan, tell)
    place = out or Path("bench") / found.name
    place.mkdir(parents=True, exist_ok=True)
    results.write(made, place / "bench.json")
    (place / "bench.html").write_text(page.html(made), encoding="utf-8")
    if as_json:
        typer.echo((place / "bench.json").read_text(encoding="utf-8"), nl=False)
    else:
        for note in found.notes:
            progress.print(f"note: {note}", markup=False, soft_wrap=True)
        for part in table.told(made):
            terminal.console().print(part, soft_wrap=False)
    progress.print(f"{place}/bench.json, {place}/bench.html", markup=False)
    if earlier is not None:
        _tell_changes(judgement.compare(made, earlier, tolerance))


@contextmanager
def _ended_politely() -> Iterator[None]:
    """A request to terminate ends what was started, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pythons(said: list[str]) -> dict[str, str]:
    found = {}
    for pair in said:
        name, equals, path = pair.partition("=")
        if not equals or not Path(path).is_file():
            raise UsageError(f"--python {pair}: no such interpreter", fix="write NAME=/path/to/bin/python")
        found[name] = str(Path(path).absolute())
    return found


def _tell_changes(changes: list[Change]) -> None:
    """Raises MedcompileError, which is exit code 1, where something of ours is slower, or answers wrong."""
    from medcompile import terminal
    from medcompile.bench import judgement, table

    terminal.console(stderr=True).print(table.changes(changes))
    if worse := judgement.regressions(changes):
        named = ", ".join(f"{c.entry} at {c.cell}" for c in worse)
        raise MedcompileError(
            f"slower than before beyond noise, or wrong where it was right: {named}",
            fix="look at what changed between the two runs",
        )
