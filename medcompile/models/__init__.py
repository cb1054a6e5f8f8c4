"""The registry of model families, and the face each shows to the compiler.

One file per family; the file name is the registry key, and the module's FAMILY is the instance. A family knows its
architecture: which tasks it has, how to trace one without weights, what its checkpoints call their parameters, and
what a runtime needs beside the graph. It imports torch and transformers inside functions. It never sees a backend.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medcompile.errors import UsageError
from medcompile.spec import GraphSpec, Profile

if TYPE_CHECKING:
    from medcompile.backends import Executor
    from medcompile.sources import Checkpoint


@dataclass(frozen=True)
class ModelOptions:
    """What a recipe says of the model beside its source.

    max_length None: the model's own limit, in tokens. labels, templates empty: those of the checkpoint.
    block_size: of decoders, tokens in a block of keys and values.
    """

    tasks: tuple[str, ...]
    profiles: tuple[Profile, ...]
    pooling: str = "mean"
    normalize: bool = True
    max_length: int | None = None
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    block_size: int = 32


@dataclass(frozen=True)
class Traced:
    """A task's graph, traced without weights.

    exported: torch.export.ExportedProgram over fake tensors. parameters: its parameter or buffer name -> the
    checkpoint's tensor name, for every one that the graph may hold. prefixes: module paths that names in the graph
    leave out, the longest first, so that a layer is called the same in every task's graph. constants: parameter or
    buffer name -> array, of those that no checkpoint holds.
    """

    exported: Any
    parameters: Mapping[str, str]
    prefixes: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)


class Family(Protocol):
    """One architecture family: everything about it that is not numerics."""

    @property
    def name(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...

    def graph_spec(self, checkpoint: Checkpoint, task: str, options: ModelOptions) -> GraphSpec:
        """The graph's face. Raises ProfileError if a profile asks for more than the model can do."""
        ...

    def trace(self, checkpoint: Checkpoint, tensors: Mapping[str, Any], task: str, options: ModelOptions) -> Traced:
        """Trace one task with dynamic axes as in graph_spec. Raises SourceError if the checkpoint lacks its weights."""
        ...

    def adapt(self, model: Any, checkpoint: Checkpoint, task: str, options: ModelOptions) -> None:
        """Edit an imported ONNX model (onnx_ir) in place so that it has graph_spec's face. Raises SourceError."""
        ...

    def assets(self, checkpoint: Checkpoint, options: ModelOptions, out: Path) -> tuple[str, ...]:
        """Write what the runtime needs (tokenizer, labels, settings) into out. Returns notes worth telling the user."""
        ...

    def reference(self, checkpoint: Checkpoint, task: str, options: ModelOptions) -> Executor:
        """The original torch model in fp32, behind an Executor's face. The yardstick of all evidence."""
        ...


def names() -> tuple[str, ...]:
    """Every family file there is, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> Family:
    """The family of that file name. Raises UsageError naming those there are."""
    if name not in names():
        raise UsageError(f"no model family {name!r}", fix=f"choose from: {', '.join(names())}")
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family
