"""Layer by layer: calibration data carried through a graph while its linear layers are being quantized.

A method that looks at whole activations sees each layer's input as the layers before it, quantized already, give it.
Between two layers every batch waits in files as the few tensors that the rest of the graph needs, so each node runs
once over the data, however many layers there are, and memory holds one batch and one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import CalibrationError
from medcompile.passes.calibrate import needs_data, portion, real_rows
from medcompile.rewrites.fresh_attention import feeds_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from medcompile.passes.linear import LinearGroup
    from medcompile.program import Context
    from medcompile.quantizers import Quantizer
    from medcompile.statistics import Statistics

    Array = np.ndarray[Any, Any]


class Carried:
    """The calibration batches of a graph, at one place of it. A context manager: its files go with it.

    model: edited by the caller as it goes; what lies behind the last statistics() must not change any more, but by
    rescale().
    """

    def __init__(self, model: ir.Model, graph: str, ctx: Context) -> None:
        self._model, self._graph, self._ctx = model, graph, ctx
        self._stack = ExitStack()
        self._batches: list[dict[str, Path]] = []
        self._factors: dict[str, Array] = {}
        self._written = 0

    def __enter__(self) -> Carried:
        needs_data(self._graph, self._ctx)
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(dir=self._ctx.scratch)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def statistics(self, group: LinearGroup, quantizer: Quantizer) -> Statistics:
        """Go on to the group's input, and give what quantizer observed of it. Groups come in graph order."""
        from medcompile.statistics import Observer

        observer = Observer()
        try:
            for mask, activation in self._advanced(group):
                quantizer.observe(observer, real_rows(activation, mask))
            return observer.statistics()
        except ValueError as error:
            raise CalibrationError(
                f"{self._graph}: activation {group.tensor} holds {error} on the calibration data",
                fix="check the checkpoint in fp32 on this data; a model that overflows here can't be quantized",
            ) from error

    def rescale(self, tensor: str, factor: Array) -> None:
        """The node that makes tensor has been changed to give it times factor [channels]."""
        self._factors[tensor] = factor

    def _advanced(self, group: LinearGroup) -> Iterator[tuple[Array | None, Array]]:
        """(attention mask if there is one, the group's input) of each batch; afterwards all batches lie here."""
        held = set(self._batches[0]) if self._batches else set()
        needed = _crossing(self._model, group)
        made = tuple(name for name in needed if name not in held)
        batches = self._batches or [{} for _ in self._feeds()]
        self._batches = []
        results: Iterator[dict[str, Array]] = iter({} for _ in batches)
        if made:
            part = portion(self._model, made, tuple(held))
            fed = (feeds_of(part, dict(f) | self._loaded(b)) for f, b in zip(self._feeds(), batches, strict=True))
            results = self._ctx.run_onnx(part, fed, made)  # type: ignore[misc]
        for batch, feeds, outputs in zip(batches, self._feeds(), results, strict=True):
            before = {name: batch[name] for name in needed if name in batch}
            for name in batch.keys() - before.keys():
                batch[name].unlink()
            self._batches.append(before | {name: self._store(array) for name, array in outputs.items()})
            waiting = self._loaded({group.tensor: self._batches[-1][group.tensor]})
            yield feeds.get("attention_mask"), waiting[group.tensor]
        self._factors = {name: factor for name, factor in self._factors.items() if name in needed}

    def _feeds(self) -> Iterator[Mapping[str, Array]]:
        return self._ctx.batches(self._graph)  # type: ignore[misc]

    def _store(self, array: Array) -> Path:
        path = self._folder / f"{self._written}.npy"
        self._written += 1
        np.save(path, array)
        return path

    def _loaded(self, batch: Mapping[str, Path]) -> dict[str, Array]:
        arrays = {name: np.load(path) for name, path in batch.items()}
        return {n: array * self._factors[n] if n in self._factors else array for n, array in arrays.items()}


def _crossing(model: ir.Model, group: LinearGroup) -> tuple[str, ...]:
    """Names of the values made before the group's first node and read from there on, its input among them.

    What no linear layer stands before (embeddings, positions, masks) is made again from the inputs instead.
    """
    earlier: dict[ir.Value, bool] = {}
    crossing = {group.tensor}
    nodes = iter(model.graph)
    for node in nodes:
        if node is group.nodes[0]:
            break
        behind = node.op_type in ("MatMul", "MatMulInteger") or any(
            value is not None and earlier.get(value, False) for value in node.inputs
        )
        earlier |= dict.fromkeys(node.outputs, behind)
    for later in (group.nodes[0], *nodes):
        crossing |= {str(v.name) for v in later.inputs if v is not None and earlier.get(v, False)}
    crossing |= {str(v.name) for v in model.graph.outputs if earlier.get(v, False)}
    return tuple(sorted(crossing))
