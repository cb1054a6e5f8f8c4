"""Tracing a transformers decoder, without weights, into the ragged face of our graphs: what models/llama.py builds on.

Attention becomes one node `medcompile::PagedAttention` a layer (kernels/reference.py says what it computes), through
transformers' own attention interface, so that every model that has it traces alike. Rotary angles become tables over
positions: computed in the graph, a position times a frequency would lose its last bits wherever floats have 16.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medcompile.errors import SourceError
from medcompile.spec import GraphSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

OPERATOR = "medcompile::PagedAttention"
_NAME = "medcompile_paged"
# What models hand to their attention beside the tensors and that changes nothing here: positions are rotated in
# already, and dropout is for training.
_IGNORED = frozenset({"dropout", "position_ids", "cache_position", "use_cache", "is_causal"})
# Sizes of 0 and 1 are specialized by torch.export, so the example has others.
_SIZES = {"tokens": 12, "bounds": 4, "sequences": 3, "table": 2, "rows": 5, "blocks": 7, "block_size": 16}
_OWN_INPUTS = 6


@dataclass(frozen=True)
class TracedDecoder:
    """exported: torch.export.ExportedProgram. parameters: of the model, fake, by its own names, tied ones under each.
    tables: the rotary tables by the name that exported has for them."""

    exported: Any
    parameters: Mapping[str, Any]
    tables: Mapping[str, Array]


def build(config: Mapping[str, Any], source: str, attention: str) -> Any:
    """The untrained transformers model of config in fp32, in eval mode. Raises SourceError if there is no such one."""
    import torch
    import transformers
    from transformers.models.auto import CONFIG_MAPPING

    kind = str(config.get("model_type", ""))
    try:
        made = CONFIG_MAPPING[kind].from_dict(dict(config))
        made.dtype = torch.float32
        factory: Any = transformers.AutoModelForCausalLM
        return factory.from_config(made, attn_implementation=attention).eval()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{source}: transformers makes no decoder of its config ({kind or 'no model_type'}): {error}",
            fix="name a causal language model that transformers knows without code from the checkpoint",
        ) from error


def trace(config: Mapping[str, Any], spec: GraphSpec, layers: int, context: int, source: str) -> TracedDecoder:
    """Trace the decoder of config with the face of spec, for positions below context.

    Raises SourceError if its attention is more than the operator does, or if layers have none.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    paging = _Paging()
    with _attention(paging), FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        model = build(config, source, _NAME)
        tables = _tabulate_angles(model, context, source, fakes)
        dims = {name: torch.export.Dim(name, min=1, max=2**30) for name in _SIZES}
        example = tuple(
            torch.zeros([_SIZES[d] if isinstance(d, str) else d for d in t.shape], dtype=getattr(torch, t.dtype))
            for t in spec.inputs
        )
        shapes = [{i: dims[d] for i, d in enumerate(t.shape) if isinstance(d, str)} for t in spec.inputs]
        exported = torch.export.export(
            _wrapper(model, paging),
            example,
            dynamic_shapes=(*shapes[:_OWN_INPUTS], tuple(shapes[_OWN_INPUTS:])),
        )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        own = {f"model.{name}" for name, _ in model.named_buffers()} - tables.keys()
    paging.refused |= {f"a buffer {name} beside its weights" for name in own}
    if sorted(paging.layers) != list(range(layers)):
        paging.refused.add(f"{len(set(paging.layers))} attention layers where config says {layers}")
    if paging.refused:
        raise SourceError(
            f"{source}: this {config.get('model_type')} has {', '.join(sorted(paging.refused))}",
            fix="the family llama takes decoders whose every layer has plain causal attention, over a window or not",
        )
    return TracedDecoder(exported, parameters, tables)


@dataclass
class _Paging:
    """The inputs that attention layers find here, past transformers, and what they leave."""

    query_starts: Any = None
    past_lens: Any = None
    block_table: Any = None
    logit_rows: Any = None
    pools: tuple[Any, ...] = ()
    layers: list[int] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)


@contextlib.contextmanager
def _attention(paging: _Paging) -> Iterator[None]:
    """Within, a model of attention _NAME is traced into OPERATOR, one node a layer."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **told: Any) -> Any:
        window = told.pop("sliding_window", None)
        paging.refused |= {f"attention with {k}" for k, v in told.items() if v is not None and k not in _IGNORED}
        if mask is not None:
            paging.refused.add("an attention mask of its own")
        if told.get("is_causal") is False or not getattr(module, "is_causal", True):
            paging.refused.add("attention to later tokens")
        _, heads, tokens, head_dim = query.shape
        if value.shape != key.shape or key.shape[-1] != head_dim:
            paging.refused.add("values of another size than its keys")
            return query.transpose(1, 2), None
        rows = [x.transpose(1, 2).reshape(tokens, -1) for x in (query, key, value)]
        layer = int(module.layer_idx)
        pools = paging.pools[2 * layer : 2 * layer + 2]
        if len(pools) != 2 or (pools[0].shape[1], pools[0].shape[3]) != (key.shape[1], head_dim):
            paging.refused.add(
                f"{key.shape[1]} heads of {head_dim} keys in layer {layer}, which its config does not say"
            )
            return query.transpose(1, 2), None
        paging.layers.append(layer)
        out = torch.onnx.ops.symbolic(
            OPERATOR,
            [*rows, *pools, paging.query_starts, paging.past_lens, paging.block_table],
            {
                "heads": heads,
                "kv_heads": key.shape[1],
                "head_dim": head_dim,
                "scale": float(head_dim**-0.5 if scaling is None else scaling),
                "sliding_window": int(window or 0),
                "layer": layer,
            },
            dtype=query.dtype,
            shape=rows[0].shape,
            version=1,
        )
        return out.view(1, tokens, heads, head_dim), None

    interface: Any = ALL_ATTENTION_FUNCTIONS
    interface[_NAME] = attend
    try:
        yield
    finally:
        del interface[_NAME]


def _wrapper(model: Any, paging: _Paging) -> Any:
    import torch

    def some_rows(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].index_select(1, paging.logit_rows),)

    model.get_output_embeddings().register_forward_pre_hook(some_rows)

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: Any,
            positions: Any,
            query_starts: Any,
            past_lens: Any,
            block_table: Any,
            logit_rows: Any,
            *pools: Any,
        ) -> Any:
            paging.query_starts, paging.past_lens, paging.block_table = query_starts, past_lens, block_table
            paging.pools = pools
            paging.logit_rows = logit_rows
            # The tokens of all sequences are one row to transformers; only attention knows where each begins.
            result = self.model(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
            return result.logits.squeeze(0)

    return Wrapper().eval()


def _tabulate_angles(model: Any, context: int, source: str, fakes: Any) -> dict[str, Array]:
    """Replace every rotary module of model by a look-up in tables that the module itself, a real one, gave.

    Returns the tables, [context, angles] float32, by their names in the wrapped model.
    """
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    class Angles(torch.nn.Module):
        def __init__(self, cos: Any, sin: Any, twice: bool) -> None:
            super().__init__()
            self.cos, self.sin = (torch.nn.Buffer(fakes.from_tensor(t), persistent=False) for t in (cos, sin))
            self.twice = twice

        def forward(self, x: Any, position_ids: Any) -> Any:
            found = (torch.nn.functional.embedding(position_ids, t) for t in (self.cos, self.sin))
            return tuple(torch.cat((t, t), dim=-1) if self.twice else t for t in found)

    tables: dict[str, Array] = {}
    for path, module in [(n, m) for n, m in model.named_modules() if hasattr(m, "inv_freq")]:
        kind = getattr(module, "rope_type", "default")
        if kind == "longrope" or set(inspect.signature(module.forward).parameters) != {"x", "position_ids"}:
            raise SourceError(
                f"{source}: its rotary positions ({kind}) are more than one table",
                fix="use a checkpoint of rope type default, linear, dynamic, yarn or llama3",
            )
        with unset_fake_temporarily(), torch.no_grad():
            both = type(module)(module.config)(torch.zeros(1), torch.arange(context)[None])
            half = both[0].shape[-1] // 2
            twice = all(torch.equal(t[..., :half], t[..., half:]) for t in both)
            cos, sin = (t[0, :, :half].contiguous() if twice else t[0] for t in both)
            tables |= {f"model.{path}.cos": cos.numpy(), f"model.{path}.sin": sin.numpy()}
        model.set_submodule(path, Angles(cos, sin, twice))
    return tables
