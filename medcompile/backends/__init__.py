"""The registry of backends, and the two faces each shows: build() for the compiler, load() for the runtime.

One file per backend; the file name is the registry key, and the module's BACKEND is the instance. A backend
imports its own library inside functions, so that listing them costs nothing and a missing one is an error only
when it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from medcompile.errors import BackendError, BackendUnavailable, InputError, ProfileError, UsageError
from medcompile.spec import GraphSpec, Profile, Target, TensorSpec, Variant

if TYPE_CHECKING:
    import numpy as np

    from medcompile.runtime.decoder import StepModel

    Array = np.ndarray[Any, Any]


class Executor(ABC):
    """A loaded artifact, ready to run. Thread-safe: several threads may call run() at once. A context manager."""

    streams: int = 1
    """How many batches run_each() has under way at once."""
    step: int = 1
    """Sequences had better be padded to a multiple of this: the library keeps what it makes for each shape it meets."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.spec.outputs

    @abstractmethod
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. feeds: every input by name, of its dtype. Returns every output by name; the caller owns them."""

    def run_each(self, batches: Iterable[Mapping[str, Array]]) -> Iterator[dict[str, Array]]:
        """run() of every batch, in order. An error is raised when its batch's turn comes."""
        for feeds in batches:
            yield self.run(feeds)

    @abstractmethod
    def close(self) -> None:
        """Give back what the artifact holds. Running it afterwards raises BackendError."""

    def closed(self) -> BackendError:
        """The error of a run after close()."""
        return BackendError(f"{self.spec.name}: this executor is closed", fix="load the bundle again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class Built:
    """What a backend's build() left in its folder: the file to load, relative to that folder, and its target."""

    file: str
    target: Target
    notes: tuple[str, ...] = ()


class Backend(Protocol):
    """One library that can run a typed ONNX graph, for one or more target names."""

    @property
    def name(self) -> str: ...
    @property
    def targets(self) -> tuple[str, ...]: ...

    def probe(self, target: str) -> Target:
        """This machine as a target. Raises BackendUnavailable with a fix if the library or device is missing."""
        ...

    def build(self, onnx_path: Path, spec: GraphSpec, variant: Variant, target: Target, out: Path) -> Built:
        """Lower the typed graph at onnx_path into files under out (an existing, empty folder). Deterministic.

        Rewrites into the backend's own dialect happen here and never in load(). Raises BackendError.
        """
        ...

    def load(self, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None) -> Executor:
        """Load the file that build() made. threads None: every core the process may use. Imports no onnx, no torch."""
        ...


@runtime_checkable
class DecoderBackend(Backend, Protocol):
    """A backend that runs decoders, too."""

    def load_decoder(self, path: Path, variant: Variant, threads: int | None, blocks: int) -> StepModel:
        """Load what build() made of a paged graph, with pools of so many blocks."""
        ...


@runtime_checkable
class FloatsBackend(Backend, Protocol):
    """A backend that computes floats in more than one format, by a variant's compute.float."""

    def floats(self) -> tuple[str, ...]:
        """The formats that this machine has for it, the fastest first."""
        ...


@runtime_checkable
class StreamsBackend(Backend, Protocol):
    """A backend that can run one artifact several times at once, a core for each."""

    def load_streams(self, path: Path, spec: GraphSpec, variant: Variant, target: Target, streams: int) -> Executor:
        """As load(), but so many run() at once take one core each."""
        ...


def floats(target: Target) -> tuple[str, ...]:
    """What the target can compute floats in by compute.float, the fastest first: float32 alone for most backends."""
    backend = get(target.backend)
    return backend.floats() if isinstance(backend, FloatsBackend) else ("float32",)


def load_decoder(backend: Backend, path: Path, variant: Variant, threads: int | None, blocks: int) -> StepModel:
    """The decoder at path. Raises BackendUnavailable if the backend runs none."""
    if not isinstance(backend, DecoderBackend):
        raise BackendUnavailable(
            f"{backend.name} runs no decoders yet",
            fix="load it on onnxruntime-cpu or openvino-cpu, or build it for these",
        )
    return backend.load_decoder(path, variant, threads, blocks)


def is_paged(spec: GraphSpec) -> bool:
    """True of a graph with the face of a decoder's step."""
    return any(tensor.name == "block_table" for tensor in spec.inputs)


def names() -> tuple[str, ...]:
    """Every backend file there is, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> Backend:
    """The backend of that file name. Raises UsageError with the nearest names if there is none."""
    if name not in names():
        raise UsageError(f"no backend {name!r}; there are: {', '.join(names())}", fix="check the spelling")
    backend: Backend = importlib.import_module(f"{__name__}.{name}").BACKEND
    return backend


def for_target(target: str) -> Backend:
    """The backend that builds for a recipe's target name. Raises UsageError if none does."""
    known: list[str] = []
    for name in names():
        backend = get(name)
        if target in backend.targets:
            return backend
        known += backend.targets
    raise UsageError(f"no backend builds for target {target!r}", fix=f"choose from: {', '.join(known)}")


def check_feeds(spec: GraphSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """The size of every dynamic axis of feeds, once they fit the graph: what each executor asks before it runs.

    Raises InputError for a missing, unknown or mistyped input, and ProfileError for a shape outside every profile.
    """
    wanted = {tensor.name for tensor in spec.inputs}
    if wrong := sorted(wanted ^ set(feeds)):
        what = "; ".join(f"{name!r} is {'missing' if name in wanted else 'unknown'}" for name in wrong)
        raise InputError(f"{spec.name}: {what}", fix=f"feed exactly: {', '.join(t.name for t in spec.inputs)}")
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        array = feeds[tensor.name]
        if array.dtype.name != tensor.dtype:
            raise InputError(
                f"{spec.name}: {tensor.name} is {array.dtype.name}, and the graph takes {tensor.dtype}",
                fix=f"convert it: {tensor.name}.astype({tensor.dtype!r})",
            )
        if array.ndim != len(tensor.shape) or any(
            size != sizes.setdefault(dim, size) if isinstance(dim, str) else size != dim
            for dim, size in zip(tensor.shape, array.shape, strict=True)
        ):
            raise ProfileError(
                f"{spec.name}: {tensor.name} has shape {list(array.shape)}, the graph takes {_shape(tensor, sizes)}",
                fix="give every input the same batch and sequence, padded where needed",
            )
    if spec.profiles and all(_misfit(profile, sizes) for profile in spec.profiles):
        raise ProfileError(
            f"{spec.name}: " + "; ".join(_misfit(profile, sizes) for profile in spec.profiles),
            fix="split or pad the input to fit, or widen shapes in the recipe and rebuild",
        )
    return sizes


def _shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> str:
    dims = [f"{dim}={sizes[dim]}" if dim in sizes else str(dim) for dim in map(str, tensor.shape)]
    return f"[{', '.join(dims)}]"


def _misfit(profile: Profile, sizes: Mapping[str, int]) -> str:
    """Why sizes lie outside profile: its first axis that does not hold, in words. Empty if all hold."""
    for axis in profile.axes:
        size = sizes.get(axis.name, axis.opt)
        if size > axis.max:
            return f"{axis.name}={size} is above profile {profile.name}'s max {axis.max}"
        if size < axis.min:
            return f"{axis.name}={size} is below profile {profile.name}'s min {axis.min}"
    return ""
