"""`medcompile::PagedAttention` as a plugin of TensorRT and TensorRT-RTX, around the compiled kernels.

The parser makes one of every node of that name; the kernels go into the plan with it, so that a process which loads
the plan needs this file, numpy and cuda-python, and neither Triton nor torch. The node has two outputs beside the
attention (rewrites/tensorrt.py gives them to it): the pools, aliased to the inputs, so that they change in place.

Built, never run: TensorRT-RTX builds engines with it on a machine that has no GPU; no line of enqueue has run on one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import BackendError
from medcompile.kernels import launches
from medcompile.kernels.compiled import Kernels
from medcompile.kernels.launcher import Launcher

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

NAME, VERSION, NAMESPACE = "PagedAttention", "1", ""
INPUTS = ("q", "k", "v", "k_pool", "v_pool", "query_starts", "past_lens", "block_table")
_POOLS = {1: INPUTS.index("k_pool"), 2: INPUTS.index("v_pool")}
"""Outputs that are inputs, by index."""
_ALIGN_BYTES = 256
_POINTER_ALIGN_BYTES = 16
"""What the kernels were compiled to rely on."""
_ATTRIBUTES = {
    **dict.fromkeys(("heads", "kv_heads", "head_dim", "sliding_window", "layer"), "int32"),
    "scale": "float32",
}
_DTYPES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT"}
_creators: dict[str, Any] = {}


def register(library: Any, kernels: Kernels | None = None) -> None:
    """Let a library (tensorrt or tensorrt_rtx) know the operator, before it parses a graph or loads a plan.

    kernels: what the plugins of a build carry. A plan that is loaded brings its own.
    Raises BackendError if the library does not take it.
    """
    creator = _creators.get(library.__name__)
    if creator is None:
        creator = creator_of(library)
        if not library.get_plugin_registry().register_creator(creator, NAMESPACE):
            raise BackendError(
                f"{library.__name__} {library.__version__} does not take the plugin {NAME}",
                fix="load no other plugin of that name in this process",
            )
        _creators[library.__name__] = creator  # the registry does not keep it alive
    creator.kernels = kernels


def configure(library: Any, config: Any) -> None:
    """Let a builder take plugins that write into their inputs."""
    config.set_preview_feature(library.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)


def values(
    inputs: Sequence[int], out: int, workspace: int, step: launches.Step, shapes: Sequence[Sequence[int]]
) -> dict[str, int | float]:
    """The kernels' arguments for one step, but for scale and window. shapes: of the inputs."""
    given: dict[str, int | float] = dict(zip(INPUTS, inputs, strict=True))
    stats = workspace + -(-step.partial_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return given | {
        "out": out,
        "partial": workspace,
        "stats": stats,
        "sequences": shapes[INPUTS.index("past_lens")][0],
        "table_width": shapes[INPUTS.index("block_table")][1],
        "splits": step.splits,
    }


def creator_of(library: Any) -> Any:
    """The creator that a library's registry takes: its classes are the library's own, so they are made here."""
    field, fields, kinds = library.PluginField, library.PluginFieldCollection, library.PluginFieldType

    whole, core, build, run = (
        library.IPluginV3,
        library.IPluginV3OneCore,
        library.IPluginV3OneBuildV2,
        library.IPluginV3OneRuntime,
    )

    class PagedAttention(whole, core, build, run):  # type: ignore[misc,valid-type]
        """One layer's attention. attributes: the node's. packed: the kernels, as they go into the plan."""

        def __init__(
            self, attributes: Mapping[str, Array], kernels: Kernels, packed: Array, launcher: Launcher
        ) -> None:
            for part in (whole, core, build, run):
                part.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.num_outputs = 1 + len(_POOLS)
            self.attributes = attributes
            self.kernels = kernels
            self.packed = packed
            self.launcher = launcher
            self.scale = float(attributes["scale"].item())
            self.window = launches.window(int(attributes["sliding_window"].item()))

        def get_capability_interface(self, _kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return PagedAttention(self.attributes, self.kernels, self.packed, self.launcher)

        # ---- building

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            return [types[0], *(types[source] for source in _POOLS.values())]

        def get_output_shapes(self, inputs: Sequence[Any], _values: Sequence[Any], _builder: Any) -> list[Any]:
            return [library.DimsExprs(inputs[source]) for source in (0, *_POOLS.values())]

        def get_aliased_input(self, output: int) -> int:
            return _POOLS.get(output, -1)

        def supports_format_combination(self, at: int, tensors: Sequence[Any], _inputs: int) -> bool:
            name = (*INPUTS, "out", *(INPUTS[source] for source in _POOLS.values()))[at]
            face = self.kernels.face
            if name in ("query_starts", "past_lens", "block_table"):
                wanted = library.DataType.INT32
            else:
                dtype = face.pool_dtype if name.endswith("_pool") else face.dtype
                wanted = getattr(library.DataType, _DTYPES[dtype])
            found = tensors[at].desc
            return bool(found.format == library.TensorFormat.LINEAR and found.type == wanted)

        def configure_plugin(self, _inputs: Sequence[Any], _outputs: Sequence[Any]) -> None: ...

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, _tactic: int) -> None: ...

        def get_workspace_size(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
            tokens, sequences = inputs[0].max[0], inputs[INPUTS.index("past_lens")].max[0]
            return launches.workspace_bytes(self.kernels.face, tokens, sequences) + _ALIGN_BYTES

        def get_fields_to_serialize(self) -> Any:
            return fields([*_attribute_fields(self.attributes), field("kernels", self.packed, kinds.UNKNOWN)])

        # ---- running

        def on_shape_change(self, _inputs: Sequence[Any], _outputs: Sequence[Any]) -> None: ...

        def attach_to_context(self, _context: Any) -> Any:
            return self.clone()

        def enqueue(
            self,
            input_descs: Sequence[Any],
            _output_descs: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            _check_addresses(inputs, outputs)
            shapes = [tuple(desc.dims) for desc in input_descs]
            face = self.kernels.face
            step = launches.plan(
                face,
                tokens=shapes[0][0],
                sequences=shapes[INPUTS.index("past_lens")][0],
                table=shapes[INPUTS.index("block_table")][1],
            )
            given = values(inputs, outputs[0], workspace, step, shapes)
            self.launcher.run(step, given | {"scale": self.scale, "window": self.window}, stream)

    def _attribute_fields(attributes: Mapping[str, Array]) -> list[Any]:
        """A field points to its array and does not keep it alive: whoever holds the field must hold the array."""
        return [
            field(name, array, kinds.FLOAT32 if name == "scale" else kinds.INT32) for name, array in attributes.items()
        ]

    class Creator(library.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes plugins of nodes, with the kernels at hand, and of what a plan holds."""

        def __init__(self) -> None:
            library.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self._expected = {name: np.zeros(1, dtype) for name, dtype in _ATTRIBUTES.items()}
            self.field_names = fields(_attribute_fields(self._expected))
            self.kernels: Kernels | None = None
            self._known: dict[bytes, tuple[Kernels, Array, Launcher]] = {}

        def create_plugin(self, name: str, given: Sequence[Any], _phase: Any) -> Any:
            found = {one.name: np.array(one.data) for one in given}
            attributes = {n: found[n].astype(dtype).reshape(1) for n, dtype in _ATTRIBUTES.items()}
            kernels, packed, launcher = self._shared(found["kernels"].tobytes() if "kernels" in found else b"", name)
            face = kernels.face
            if any(attributes[n].item() != getattr(face, n) for n in ("heads", "kv_heads", "head_dim")):
                raise BackendError(
                    f"{name} has other heads than its kernels, {face}", fix="compile kernels for each kind of layer"
                )
            return PagedAttention(attributes, kernels, packed, launcher)

        def _shared(self, carried: bytes, name: str) -> tuple[Kernels, Array, Launcher]:
            """What all layers with these kernels hold in common. carried: by the plan; empty in a build."""
            if not carried and self.kernels is None:
                raise BackendError(f"no kernels are at hand for {name}", fix="register() with kernels before a build")
            packed = carried or (self.kernels.pack() if self.kernels else b"")
            if packed not in self._known:
                kernels = Kernels.unpack(packed)
                self._known[packed] = kernels, np.frombuffer(packed, np.uint8), Launcher(kernels)
            return self._known[packed]

    return Creator()


def _check_addresses(inputs: Sequence[int], outputs: Sequence[int]) -> None:
    """A copied pool would be updated in vain, and a kernel faults at an address that it does not expect."""
    for output, source in _POOLS.items():
        if outputs[output] != inputs[source]:
            raise BackendError(
                f"TensorRT gives {INPUTS[source]} to write into at another address than to read from: it copied it",
                fix="build with a version of the library that this medcompile was tested with",
            )
    for name, address in (*zip(INPUTS[:5], inputs[:5], strict=True), ("out", outputs[0])):
        if address % _POINTER_ALIGN_BYTES:
            raise BackendError(
                f"{name} lies at {address:#x}, which is no multiple of {_POINTER_ALIGN_BYTES}",
                fix="bind the engine's tensors to aligned memory",
            )
