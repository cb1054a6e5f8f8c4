"""What flows between passes: a Program of Graphs at a Stage, with the record of what was done to it.

Passes live in passes/, the order in pipeline.py. onnx_ir models are mutable, so a pass clones before it edits;
weights stay memory-mapped and are shared between clones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medcompile.spec import GraphSpec, Stage, Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.stored import StoredLinear

    Feeds = Mapping[str, "np.ndarray[Any, Any]"]
    RunOnnx = Callable[["ir.Model", Iterator[Feeds], tuple[str, ...]], Iterator[dict[str, "np.ndarray[Any, Any]"]]]


@dataclass(frozen=True)
class Graph:
    """A typed ONNX graph and its face."""

    spec: GraphSpec
    model: ir.Model

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran, or was found in the cache: its key, seconds, and peak resident memory of the process."""

    name: str
    key: str
    seconds: float
    peak_rss_bytes: int
    cached: bool


@dataclass(frozen=True)
class Program:
    """The thing being compiled. graphs by name; statistics by graph and tensor name once calibrated.

    stored: by graph and name of the weight, how a checkpoint that came quantized stores its linear layers.
    """

    family: str
    graphs: Mapping[str, Graph]
    stage: Stage
    statistics: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Mapping[str, StoredLinear]] = field(default_factory=dict)

    def with_graphs(self, graphs: Mapping[str, Graph], stage: Stage) -> Program:
        return dataclasses.replace(self, graphs=dict(graphs), stage=stage)


class Progress(Protocol):
    """Where a build says how far it is: begin, any number of steps, end. cli.py shows it as live or as JSON lines."""

    def begin(self, name: str) -> None: ...
    def step(self, message: str, done: int = 0, total: int = 0) -> None: ...
    def end(self, record: PassRecord) -> None: ...
    def note(self, message: str) -> None: ...


class Silent:
    """A Progress that says nothing."""

    def begin(self, name: str) -> None: ...
    def step(self, message: str, done: int = 0, total: int = 0) -> None: ...
    def end(self, record: PassRecord) -> None: ...
    def note(self, message: str) -> None: ...


@dataclass(frozen=True)
class Context:
    """What a pass may use, handed in so that there are no globals.

    batches(graph name) gives fresh calibration feeds, a batch at a time, each a dict of input name to array.
    run_onnx(model, feeds, output names) runs a model over the feeds lazily, one result per feed, on the CPU in fp32.
    """

    scratch: Path
    progress: Progress
    variant: Variant | None = None
    batches: Callable[[str], Iterator[Feeds]] | None = None
    run_onnx: RunOnnx | None = None


class Pass(Protocol):
    """Program -> Program. A frozen dataclass whose fields, with name and version, make its cache key."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def needs(self) -> Stage: ...
    @property
    def gives(self) -> Stage: ...

    def __call__(self, program: Program, ctx: Context) -> Program: ...
