"""The llama family: TinyLlama, Mistral, SmolLM2, Qwen and every other decoder of plain causal attention.

One task, `generate`: one graph that computes a step of many sequences at once, prefill and decode alike. Batches are
ragged: the tokens of all sequences lie end to end. Keys and values live in pools of blocks that the graph updates in
place; which block belongs to which sequence is the runtime's business, as are sampling and scheduling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.errors import ProfileError, SourceError
from medcompile.models import ModelOptions, Traced
from medcompile.models._files import write_json
from medcompile.spec import Axis, GraphSpec, Profile, TensorSpec

if TYPE_CHECKING:
    from medcompile.backends import Executor
    from medcompile.sources import Checkpoint

_CHECKED = 8  # tokens of a sequence in a step of the profile decode, guessed ones included
# A checkpoint that says any of these, and not 0, has layers of another kind than this family's.
_FOREIGN = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "is_encoder_decoder": "an encoder beside its decoder",
    "add_cross_attention": "cross attention",
    "alibi": "positions by ALiBi",
    "vision_config": "a vision tower",
}


@dataclass(frozen=True)
class Shape:
    """The sizes that a runtime must know of a decoder. context: most tokens of a sequence."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Llama:
    name: str = "llama"
    tasks: tuple[str, ...] = ("generate",)

    def graph_spec(self, checkpoint: Checkpoint, task: str, options: ModelOptions) -> GraphSpec:
        """Inputs: input_ids, positions, query_starts, past_lens, block_table, logit_rows, then each layer's pools."""
        sizes = shape(checkpoint, options)
        inputs = [
            TensorSpec("input_ids", "int64", ("tokens",)),
            TensorSpec("positions", "int64", ("tokens",)),
            TensorSpec("query_starts", "int32", ("bounds",)),
            TensorSpec("past_lens", "int32", ("sequences",)),
            TensorSpec("block_table", "int32", ("sequences", "table")),
            TensorSpec("logit_rows", "int64", ("rows",)),
        ]
        pool = ("blocks", sizes.kv_heads, "block_size", sizes.head_dim)
        for layer in range(sizes.layers):
            inputs += [TensorSpec(f"{name}.{layer}", "float32", pool) for name in ("k_pool", "v_pool")]
        outputs = (TensorSpec("logits", "float32", ("rows", sizes.vocabulary)),)
        profiles = tuple(p for given in options.profiles for p in _steps(given, options.block_size))
        return GraphSpec(task, tuple(inputs), outputs, profiles)

    def trace(self, checkpoint: Checkpoint, tensors: Mapping[str, Any], task: str, options: ModelOptions) -> Traced:
        from medcompile.models import _decoder

        spec, sizes = self.graph_spec(checkpoint, task, options), shape(checkpoint, options)
        traced = _decoder.trace(checkpoint.config, spec, sizes.layers, sizes.context, checkpoint.source)
        parameters = _match(traced.parameters, tensors)
        prefixes = ("model.model.", "model.")
        return Traced(
            traced.exported, {f"model.{name}": stored for name, stored in parameters.items()}, prefixes, traced.tables
        )

    def adapt(self, model: Any, checkpoint: Checkpoint, task: str, options: ModelOptions) -> None:
        raise SourceError(
            f"{checkpoint.source}: decoders that other exporters wrote have no paged attention",
            fix="name the checkpoint that model.onnx was made from",
        )

    def assets(self, checkpoint: Checkpoint, options: ModelOptions, out: Path) -> tuple[str, ...]:
        """tokenizer.json, decoder.json, generation.json, and chat_template.jinja where the checkpoint has one."""
        from medcompile import sources
        from medcompile.models import _text

        write_json(out / "decoder.json", asdict(shape(checkpoint, options)) | {"block_size": options.block_size})
        tokenizer, notes = _text.tokenizer(checkpoint)
        tokenizer.save(str(out / "tokenizer.json"))
        template = _text.chat_template(checkpoint.folder)
        if template is None:
            notes += ("the checkpoint has no chat template: prompts are taken as they are",)
        else:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_json(out / "generation.json", _text.generation(checkpoint))
        return notes + sources.notes(checkpoint)

    def reference(self, checkpoint: Checkpoint, task: str, options: ModelOptions) -> Executor:
        """The original model over one sequence: input_ids [tokens] -> logits [tokens, vocabulary], of every token."""
        import torch
        import transformers

        from medcompile.models._torch import TorchExecutor

        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        sizes = shape(checkpoint, options)
        spec = GraphSpec(
            task,
            (TensorSpec("input_ids", "int64", ("tokens",)),),
            (TensorSpec("logits", "float32", ("tokens", sizes.vocabulary)),),
            options.profiles,
        )
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        model.eval()

        class Sequence(torch.nn.Module):
            def forward(self, input_ids: Any) -> Any:
                return model(input_ids=input_ids[None], use_cache=False).logits[0]

        return TorchExecutor(spec, Sequence())


def shape(checkpoint: Checkpoint, options: ModelOptions) -> Shape:
    """Raises SourceError if config.json is not of this family, ProfileError if options ask for more than it can do."""
    config = checkpoint.config
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")
    if missing := [k for k in needed if not isinstance(config.get(k), int)]:
        raise SourceError(
            f"{checkpoint.source}: config.json does not say {', '.join(missing)}",
            fix="the family llama takes decoders of plain causal attention; fetch config.json again if this is one",
        )
    if foreign := next((what for key, what in _FOREIGN.items() if config.get(key)), None):
        raise SourceError(
            f"{checkpoint.source}: this {config.get('model_type')} has {foreign}",
            fix="the family llama takes dense decoders of text alone",
        )
    heads = int(config["num_attention_heads"])
    limit = int(config["max_position_embeddings"])
    if options.max_length is not None and options.max_length > limit:
        raise ProfileError(
            f"max_length is {options.max_length}, but the model has {limit} positions",
            fix=f"set model.max_length to {limit} or less",
        )
    longest = max((p.axis("sequence").max for p in options.profiles), default=limit)
    if longest > limit:
        raise ProfileError(
            f"shapes.sequence goes up to {longest} tokens, but the model has {limit} positions",
            fix=f"set shapes.sequence's max to {limit} or less",
        )
    return Shape(
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        context=min(options.max_length or limit, longest),
    )


def _steps(given: Profile, block_size: int) -> tuple[Profile, Profile]:
    """A recipe's batch of sequences and their length, as the two kinds of step that a graph sees.

    decode: a token of every sequence, or some where guesses are checked. prefill: a prompt or a part of one, beside
    others. Any of a step's tokens may be asked for its logits.
    """
    batch, length = given.axis("batch"), given.axis("sequence")
    table = [-(-n // block_size) for n in (length.min, length.opt, length.max)]

    def profile(name: str, tokens: tuple[int, int, int], rows: int) -> Profile:
        axes = (
            Axis("tokens", *tokens),
            Axis("sequences", 1, batch.opt, batch.max),
            Axis("bounds", 2, batch.opt + 1, batch.max + 1),
            Axis("table", 1, table[1], table[2]),
            Axis("rows", 1, rows, tokens[2]),
            Axis("blocks", 1, batch.opt * table[1], batch.max * table[2]),
            Axis("block_size", block_size, block_size, block_size),
        )
        return Profile(name if given.name == "default" else f"{given.name}-{name}", axes)

    return (
        profile("decode", (1, batch.opt, batch.max * _CHECKED), batch.opt),
        profile("prefill", (1, max(length.opt, batch.opt), max(length.max, batch.max)), batch.opt),
    )


def _match(parameters: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, str]:
    """The checkpoint's name for each parameter; tied ones, one and the same, are stored under any of theirs."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    missing: list[str] = []
    for tied in names.values():
        stored = next((n for n in tied if n in tensors), None)
        if stored is None:
            missing.append(tied[0])
        elif tuple(tensors[stored].shape) != tuple(parameters[tied[0]].shape):
            raise SourceError(
                f"weight {stored} has shape {list(tensors[stored].shape)}, "
                f"the config asks for {list(parameters[tied[0]].shape)}",
                fix="config.json and the weights are not of one model; fetch both again",
            )
        else:
            found |= dict.fromkeys(tied, stored)
    if missing:
        raise SourceError(
            f"the checkpoint has no weights for {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
            fix="name a checkpoint of a whole causal language model, saved in float",
        )
    return found


FAMILY = Llama()
