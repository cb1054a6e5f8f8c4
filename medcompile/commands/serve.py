"""medcompile serve: bundles behind OpenAI's interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medcompile.commands.options import Threads
from medcompile.errors import BackendUnavailable

if TYPE_CHECKING:
    from medcompile.serve.engines import Engines
    from medcompile.serve.settings import Model


def serve(
    bundles: Annotated[
        list[str], typer.Argument(metavar="BUNDLE...", help="Folders of bundles, or name=folder to serve it under.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    backend: Annotated[str, typer.Option(help="auto, a target or a backend.")] = "auto",
    variant: Annotated[str, typer.Option(help="auto, or a variant's name.")] = "auto",
    threads: Threads = None,
    kv_blocks: Annotated[
        int | None, typer.Option(help="Blocks of keys and values of a decoder; default: 8 full sequences.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that wait or run at each model; beyond it, status 429.")] = 256,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds for a whole answer.")] = 600.0,
    drain_s: Annotated[float, typer.Option("--drain", help="Seconds that a stop waits for answers under way.")] = 30.0,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
    log_format: Annotated[str, typer.Option(help="json or plain.")] = "json",
) -> None:
    """Serve bundles over HTTP, as OpenAI's clients expect it: chat, completions, embeddings, rerank, and entities,
    classes and matches of images beside."""
    try:
        from medcompile.serve import server
        from medcompile.serve.settings import Limits, Logging, Settings
    except ImportError as error:
        raise BackendUnavailable(f"serving needs {error.name}", fix='pip install "medcompile[serve]"') from None

    settings = Settings(
        host=host,
        port=port,
        drain_s=drain_s,
        logging=Logging(log_level.upper(), log_format == "json"),
        limits=Limits(queue=queue, timeout_s=timeout_s),
    )
    models = [_model(told, backend, variant, threads, kv_blocks) for told in bundles]
    server.run(settings, models, _listening)


def _model(told: str, backend: str, variant: str, threads: int | None, kv_blocks: int | None) -> Model:
    from medcompile.serve.settings import Model

    name, equals, path = told.partition("=")
    if not equals or "/" in name:
        name, path = "", told
    return Model(Path(path), name, backend, variant, threads, kv_blocks)


def _listening(url: str, engines: Engines) -> None:
    for engine in engines:
        facts = engine.facts
        typer.echo(f"{engine.name}: {', '.join(engine.tasks)} · {facts['variant']} on {facts['target']}", err=True)
    typer.echo(f"{url}/v1 takes requests; {url}/openapi.json tells which", err=True)
