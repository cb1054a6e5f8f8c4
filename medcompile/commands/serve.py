"""medcompile serve: bundles behind OpenAI's interface."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medcompile.commands.options import Threads, named_bundle
from medcompile.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from medcompile.serve.engines import Engines
    from medcompile.serve.settings import Audit, Cache, Scrub, Tls

_SAFETY, _LIMITS, _ANSWERS, _WATCH = "Who may ask", "Limits", "Answers kept", "Watching"
_SCRUB = "Patients' identifiers"


def serve(
    bundles: Annotated[
        list[str], typer.Argument(metavar="BUNDLE...", help="Folders of bundles, or name=folder to serve it under.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; one that others reach needs keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    backend: Annotated[str, typer.Option(help="auto, a target or a backend.")] = "auto",
    variant: Annotated[str, typer.Option(help="auto, or a variant's name.")] = "auto",
    threads: Threads = None,
    kv_blocks: Annotated[
        int | None, typer.Option(help="Blocks of keys and values of a decoder; default: 8 full sequences.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys that may ask; medcompile keys add makes them.", rich_help_panel=_SAFETY)
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.", rich_help_panel=_SAFETY)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.", rich_help_panel=_SAFETY)] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Clients must show a certificate signed by it.", rich_help_panel=_SAFETY)
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="Web pages that may ask (CORS); none else.", rich_help_panel=_SAFETY)
    ] = None,
    purpose_required: Annotated[
        bool, typer.Option("--purpose-required", help="Demand X-Purpose-Of-Use.", rich_help_panel=_SAFETY)
    ] = False,
    audit_log: Annotated[Path | None, typer.Option(help="A folder for the audit log.", rich_help_panel=_SAFETY)] = None,
    audit_key: Annotated[
        Path | None, typer.Option(help="A file with the audit log's key.", rich_help_panel=_SAFETY)
    ] = None,
    audit_fsync: Annotated[
        str, typer.Option(help="always, interval (a second) or never.", rich_help_panel=_SAFETY)
    ] = "interval",
    queue: Annotated[
        int, typer.Option(help="Requests at each model; beyond it, status 429.", rich_help_panel=_LIMITS)
    ] = 256,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds for a whole answer.", rich_help_panel=_LIMITS)
    ] = 600.0,
    drain_s: Annotated[
        float, typer.Option("--drain", help="Seconds that a stop waits for answers.", rich_help_panel=_LIMITS)
    ] = 30.0,
    body_mb: Annotated[int, typer.Option(help="MiB of one request's body.", rich_help_panel=_LIMITS)] = 32,
    connections: Annotated[
        int | None, typer.Option(help="At once; default: what the system allows.", rich_help_panel=_LIMITS)
    ] = None,
    cache: Annotated[str, typer.Option(help="off, memory, or redis://host:port/n.", rich_help_panel=_ANSWERS)] = "off",
    cache_ttl_s: Annotated[
        float, typer.Option("--cache-ttl", help="Seconds that an answer is kept.", rich_help_panel=_ANSWERS)
    ] = 3600.0,
    cache_generations: Annotated[
        bool, typer.Option("--cache-generations", help="Keep generated answers, too.", rich_help_panel=_ANSWERS)
    ] = False,
    cache_shared: Annotated[
        bool, typer.Option("--cache-shared", help="Between keys: timing then tells.", rich_help_panel=_ANSWERS)
    ] = False,
    cache_secret: Annotated[
        Path | None, typer.Option(help="A file with the secret of a shared Redis.", rich_help_panel=_ANSWERS)
    ] = None,
    scrub: Annotated[
        bool,
        typer.Option("--scrub", help="Take identifiers out of texts, and of what is written.", rich_help_panel=_SCRUB),
    ] = False,
    scrub_names: Annotated[
        Path | None, typer.Option(help="People to find in texts, one a line.", rich_help_panel=_SCRUB)
    ] = None,
    scrub_model: Annotated[
        str, typer.Option(help="A spaCy model that finds names: its package or folder.", rich_help_panel=_SCRUB)
    ] = "",
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.", rich_help_panel=_WATCH)] = "INFO",
    log_format: Annotated[
        str, typer.Option(help="auto (plain in a terminal), json or plain.", rich_help_panel=_WATCH)
    ] = "auto",
) -> None:
    """Serve bundles over HTTP, as OpenAI's clients expect it: chat, completions, embeddings, rerank; and entities,
    classes, and matches of images and texts."""
    try:
        from medcompile.serve import server
        from medcompile.serve.bodies import BodyLimits
        from medcompile.serve.connections import ConnectionLimits
        from medcompile.serve.guard import Rules
        from medcompile.serve.settings import Limits, Logging, Model, Settings
    except ImportError as error:
        raise BackendUnavailable(f"serving needs {error.name}", fix='pip install "medcompile[serve]"') from None

    _check("--log-level", log_level.upper(), ("DEBUG", "INFO", "WARNING", "ERROR"))
    _check("--log-format", log_format, ("auto", "json", "plain"))
    _check_range("--port", port, 0, 65_535)
    _check_range("--queue", queue, 1, 1_000_000)
    _check_range("--timeout", timeout_s, 0.001, 1e7)
    _check_range("--drain", drain_s, 0, 1e6)
    _check_range("--body-mb", body_mb, 1, 1023)
    settings = Settings(
        host=host,
        port=port,
        drain_s=drain_s,
        key_file=api_key_file,
        tls=_tls(tls_cert, tls_key, tls_client_ca),
        audit=_audit(audit_log, audit_key, audit_fsync),
        cache=_cache(cache, cache_ttl_s, cache_generations, cache_shared, cache_secret),
        scrub=_scrub(scrub, scrub_names, scrub_model),
        rules=Rules(origins=tuple(origin or ()), purpose_required=purpose_required),
        body=BodyLimits(bytes=body_mb << 20),
        connections=ConnectionLimits(most=connections),
        logging=Logging(log_level.upper(), log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())),
        limits=Limits(queue=queue, timeout_s=timeout_s),
    )
    models = [Model(path, name, backend, variant, threads, kv_blocks) for name, path in map(named_bundle, bundles)]
    server.run(settings, models, _listening, _status if sys.stderr.isatty() else None)


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    from medcompile.serve.settings import Tls

    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise UsageError("TLS needs a certificate and its key", fix="give both --tls-cert and --tls-key")
    for path in (certificate, key, client_ca):
        if path is not None and not path.is_file():
            raise UsageError(
                f"{path}: no such file", fix="check the paths after --tls-cert, --tls-key, --tls-client-ca"
            )
    return Tls(certificate, key, client_ca)


def _audit(folder: Path | None, key: Path | None, fsync: str) -> Audit | None:
    from medcompile.serve.settings import Audit

    _check("--audit-fsync", fsync, ("always", "interval", "never"))
    if folder is None:
        if key is not None:
            raise UsageError("--audit-key without --audit-log", fix="give the folder of the log as well")
        return None
    return Audit(folder, key, fsync)  # type: ignore[arg-type]  # checked above


def _cache(url: str, ttl_s: float, generations: bool, shared: bool, secret: Path | None) -> Cache | None:
    from medcompile.serve.settings import Cache

    return None if url == "off" else Cache(url, ttl_s, generations, shared, secret)


def _scrub(wanted: bool, names: Path | None, model: str) -> Scrub | None:
    from medcompile.serve.settings import Scrub

    if not wanted and (names is not None or model):
        raise UsageError("--scrub-names and --scrub-model go with --scrub", fix="give --scrub as well")
    return Scrub(names, model) if wanted else None


def _check(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{option} {value}: no such choice", fix=f"choose from: {', '.join(allowed)}")


def _check_range(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{option} {value:g}: outside of {low:g} to {high:g}", fix="give a value in between")


def _listening(url: str, engines: Engines) -> None:
    for engine in engines:
        facts = engine.facts
        typer.echo(f"{engine.name}: {', '.join(engine.tasks)} · {facts['variant']} on {facts['target']}", err=True)
    typer.echo(f"{url}/v1 takes requests; {url}/docs tells which", err=True)


def _status(line: str) -> None:
    typer.echo(line, err=True)
