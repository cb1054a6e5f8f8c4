"""medcompile batch: a file of requests in, a file of answers out."""

from __future__ import annotations

import hashlib
import json
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medcompile.commands.options import AsJson, Threads, named_bundle
from medcompile.errors import BackendUnavailable, MedcompileError, UsageError

if TYPE_CHECKING:
    from medcompile.serve.audit import AuditLog
    from medcompile.serve.batch import Progress
    from medcompile.serve.batch_calls import Calls
    from medcompile.serve.batch_tables import Question
    from medcompile.serve.duplicates import Duplicates
    from medcompile.serve.engines import Engines
    from medcompile.serve.files import Source
    from medcompile.serve.scrubbing import Scrubbing
    from medcompile.serve.spool import Spool


_SAFETY = "Safety"


def batch(
    file: Annotated[
        Path, typer.Argument(metavar="IN", help="A .jsonl of OpenAI's batch lines, a .csv or .parquet, or a folder.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of answers; of a table, one of its own kind.")],
    bundles: Annotated[
        list[str], typer.Option("--bundle", metavar="BUNDLE", help="A bundle's folder, or name=folder. Repeatable.")
    ],
    column: Annotated[str, typer.Option(help="Of a table: the column of texts.")] = "text",
    task: Annotated[
        str, typer.Option(help="Of a table or folder: which of the bundle's tasks; default: its first.")
    ] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of a folder: how well the prompts fit each image. Repeatable.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, a target or a backend.")] = "auto",
    variant: Annotated[str, typer.Option(help="auto, or a variant's name.")] = "auto",
    threads: Threads = None,
    kv_blocks: Annotated[
        int | None, typer.Option(help="Blocks of keys and values of a decoder; default: 8 full sequences.")
    ] = None,
    in_flight: Annotated[int, typer.Option(min=1, help="Texts, images or answers asked for at a time.")] = 512,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever an earlier run left.")] = False,
    scrub: Annotated[
        bool,
        typer.Option("--scrub", help="Take identifiers out of texts, and of what is written.", rich_help_panel=_SAFETY),
    ] = False,
    scrub_names: Annotated[
        Path | None, typer.Option(help="People to find in texts, one a line.", rich_help_panel=_SAFETY)
    ] = None,
    scrub_model: Annotated[
        str, typer.Option(help="A spaCy model that finds names: its package or folder.", rich_help_panel=_SAFETY)
    ] = "",
    audit_log: Annotated[
        Path | None, typer.Option(help="A folder for a record of each request.", rich_help_panel=_SAFETY)
    ] = None,
    audit_key: Annotated[
        Path | None, typer.Option(help="A file with the key that the log is sealed with.", rich_help_panel=_SAFETY)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a file of requests, each line on its own. Run it again after any kind of end: it goes on.

    Exit code 1 if any line failed; these are told in the file of answers.
    """
    try:
        from medcompile.serve import logs, private
        from medcompile.serve.batch_calls import LIMITS, Calls
        from medcompile.serve.engines import Engines
        from medcompile.serve.files import Folder
        from medcompile.serve.settings import Logging, Model
        from medcompile.serve.spool import Spool
    except ImportError as error:
        raise BackendUnavailable(f"batches need {error.name}", fix='pip install "medcompile[serve]"') from None

    private.no_dumps()
    logging = Logging("WARNING", as_json=False)
    logs.configure(logging.level, as_json=logging.as_json)
    models = [Model(path, name, backend, variant, threads, kv_blocks) for name, path in map(named_bundle, bundles)]
    engines = Engines(models, LIMITS, logging)
    source, wanted = _source(file, out, engines, column, task, prompt or [])
    about = {
        "input": source.identity(),
        "bundles": ", ".join(f"{engine.name} {engine.digest}" for engine in engines),
        "variant": f"{backend} {variant}",
        "question": f"{wanted.url} {json.dumps(dict(wanted.body), sort_keys=True)}" if wanted else "",
    }
    if scrub:
        about["scrub"] = f"{_digest(scrub_names)} {scrub_model}"
    with ExitStack() as open_things:
        spool = open_things.enter_context(Spool(out, about, restart=restart))
        if spool.finished:
            spool.clear()
            _tell(source, spool, None, None, as_json)
            return
        scrubbing = _scrubbing(scrub_names, scrub_model) if scrub else None
        audit = open_things.enter_context(_audit(audit_log, audit_key)) if audit_log else None
        calls = Calls(engines, source if isinstance(source, Folder) else None, scrubbing, audit)
        progress = _run(source, wanted, engines, calls, spool, in_flight)
        duplicates = _finish(source, wanted, spool)
    _tell(source, spool, progress, duplicates, as_json)


def _source(
    file: Path, out: Path, engines: Engines, column: str, task: str, prompts: list[str]
) -> tuple[Source, Question | None]:
    """What is read, and what each record is asked where it does not say so itself."""
    from medcompile.serve import batch_tables
    from medcompile.serve.files import CsvRows, Folder, JsonLines, ParquetRows

    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder", fix="make it, or choose another --out")
    kind = file.suffix.lower()
    if not file.is_dir() and kind not in {".csv", ".parquet"}:
        if task or prompts:
            raise UsageError(
                "--task and --prompt are for tables and folders", fix="each line of JSON says what it asks"
            )
        return JsonLines(file), None
    source: Source = (
        Folder(file) if file.is_dir() else CsvRows(file, column) if kind == ".csv" else ParquetRows(file, column)
    )
    engine, *others = engines
    if others:
        raise UsageError("a table or a folder is asked of one bundle", fix="give one --bundle")
    wanted = batch_tables.question(engine.tasks, task, engine.name, images=isinstance(source, Folder), prompts=prompts)
    batch_tables.check_sink(source, out, wanted)
    return source, wanted


def _scrubbing(names: Path | None, model: str) -> Scrubbing:
    from medcompile.serve.scrub import Scrubber, read_names
    from medcompile.serve.scrubbing import Scrubbing

    return Scrubbing(Scrubber(names=read_names(names) if names else (), model=model))


def _audit(folder: Path, key: Path | None) -> AuditLog:
    from medcompile.serve.audit import AuditLog
    from medcompile.serve.chain import read_key

    return AuditLog(folder, key=read_key(key) if key else None)


def _digest(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", fix="check the path after --scrub-names") from None


def _run(
    source: Source, wanted: Question | None, engines: Engines, calls: Calls, spool: Spool, in_flight: int
) -> Progress:
    import asyncio

    from medcompile.serve import batch_lines, batch_tables
    from medcompile.serve.batch import Batch, Job
    from medcompile.serve.batch_progress import Shown
    from medcompile.serve.calls import CALLS

    if spool.begun:
        typer.echo(f"going on after {spool.mark.records:,} {source.unit}s or more of an earlier run", err=True)
    stopped: list[int] = []

    async def work(shown: Shown) -> Progress:
        this = asyncio.current_task()
        assert this is not None

        def stop(number: int) -> None:
            stopped.append(number)
            this.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        async with engines:
            job = Job(
                source,
                (lambda record: batch_tables.asked(record, wanted, source))
                if wanted
                else (lambda record: batch_lines.parsed(record, CALLS)),
                calls.ask,
                calls.ready,
            )
            return await Batch(job, spool, shown, in_flight).run()

    with Shown(source.unit, source.total, spool.mark.position) as shown:
        try:
            return asyncio.run(work(shown))
        except (asyncio.CancelledError, KeyboardInterrupt):
            number = stopped[0] if stopped else signal.SIGINT
    typer.echo(f"stopped after {spool.mark.records:,} {source.unit}s; the same command goes on there", err=True)
    raise typer.Exit(128 + number)


def _finish(source: Source, wanted: Question | None, spool: Spool) -> Duplicates | None:
    """Let the file of answers appear. Returns which lines bear the same custom_id, where lines have their own."""
    from medcompile.serve import batch_tables, duplicates

    spool.flush()
    if wanted is None:
        found = duplicates.find(spool.ids)
        spool.finish()
        return found
    if spool.out.suffix == ".jsonl":
        spool.finish()
        return None
    made = spool.out.with_name(spool.out.name + ".part.table")
    try:
        batch_tables.write(source, spool.part, wanted, made, spool.out.suffix)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise MedcompileError(
            f"{made} can't be written: {error.strerror}",
            fix="make room on the disk and repeat the command; the answers are kept",
        ) from None
    spool.finish(made)
    return None


def _tell(
    source: Source, spool: Spool, progress: Progress | None, duplicates: Duplicates | None, as_json: bool
) -> None:
    """The summary. Raises MedcompileError, which is exit code 1, if any line failed."""
    mark = spool.mark
    told: dict[str, Any] = {"out": str(spool.out), "records": mark.records, "failed": mark.failed}
    told["seconds"] = round(mark.seconds, 3)
    if progress is not None:
        rate = progress.new / progress.seconds if progress.seconds else 0.0
        told |= {"new": progress.new, "per_second": round(rate, 3)}
        told |= {"tokens_in": progress.tokens_in, "tokens_out": progress.tokens_out}
    if duplicates is not None:
        told |= {"duplicates": duplicates.count, "duplicate_pairs": duplicates.pairs}
    if as_json:
        typer.echo(json.dumps(told))
    else:
        rate_told = f", {told['per_second']:,.1f}/s" if told.get("new") else ""
        typer.echo(
            f"{spool.out}: {mark.records:,} {source.unit}s, {mark.failed:,} failed, {mark.seconds:,.1f} s{rate_told}",
            err=True,
        )
    if duplicates is not None and duplicates.count:
        some = ", ".join(f"{first} and {second}" for first, second in duplicates.pairs)
        typer.echo(
            f"note: {duplicates.count:,} requests bear an earlier one's custom_id, such as (counted from 1) {some}",
            err=True,
        )
    if mark.failed:
        raise MedcompileError(
            f"{mark.failed:,} of {mark.records:,} {source.unit}s failed",
            fix=f"their errors are in {spool.out}; the others were answered",
        )
