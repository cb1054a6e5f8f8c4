"""The BERT family: BioBERT, ClinicalBERT, PubMedBERT, MiniLM and every other BertModel checkpoint.

Four tasks, one graph each. Tracing runs over fake tensors, so that the weights of the checkpoint are never in
memory; passes/export.py binds them. Tokenizers of every age end up as one tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.errors import ProfileError, SourceError, UsageError
from medcompile.models import ModelOptions, Traced
from medcompile.models._files import write_json
from medcompile.models._tokenizers import tokenizer
from medcompile.models._torch import TorchExecutor
from medcompile.spec import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from medcompile.backends import Executor
    from medcompile.sources import Checkpoint

_CLASSES = {
    "embed": "BertModel",
    "token-classification": "BertForTokenClassification",
    "sequence-classification": "BertForSequenceClassification",
    "fill-mask": "BertForMaskedLM",
}
# Adding this to a score before softmax makes its weight exactly 0 in fp32 and stays finite in fp16.
_MASKED = -10000.0


@dataclass(frozen=True)
class Bert:
    name: str = "bert"
    tasks: tuple[str, ...] = tuple(_CLASSES)

    def graph_spec(self, checkpoint: Checkpoint, task: str, options: ModelOptions) -> GraphSpec:
        _check_architecture(checkpoint)
        limit = int(checkpoint.config["max_position_embeddings"])
        for profile in options.profiles:
            if profile.axis("sequence").max > limit:
                raise ProfileError(
                    f"profile {profile.name}: sequence up to {profile.axis('sequence').max} tokens, "
                    f"but the model has {limit} positions",
                    fix=f"set shapes.sequence's max to {limit} or less; longer texts go through overlapping windows",
                )
            profile.axis("batch")
        ids = [TensorSpec(n, "int64", ("batch", "sequence")) for n in ("input_ids", "attention_mask", "token_type_ids")]
        if task == "fill-mask":
            ids.append(TensorSpec("mask_position", "int64", ("batch",)))
        outputs = {
            "embed": TensorSpec("embedding", "float32", ("batch", int(checkpoint.config["hidden_size"]))),
            "token-classification": TensorSpec(
                "logits", "float32", ("batch", "sequence", len(_labels(checkpoint, options)))
            ),
            "sequence-classification": TensorSpec("logits", "float32", ("batch", len(_labels(checkpoint, options)))),
            "fill-mask": TensorSpec("logits", "float32", ("batch", int(checkpoint.config["vocab_size"]))),
        }
        return GraphSpec(task, tuple(ids), (outputs[task],), options.profiles)

    def trace(self, checkpoint: Checkpoint, tensors: Mapping[str, Any], task: str, options: ModelOptions) -> Traced:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        spec = self.graph_spec(checkpoint, task, options)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = _build(checkpoint, task)
            wrapped = _wrapper(model, task, options.pooling)
            parameters = _match(dict(model.named_parameters(remove_duplicate=False)), tensors, task)
            batch, sequence = torch.export.Dim("batch", min=1, max=65536), torch.export.Dim("sequence", min=2)
            dims = {"batch": batch, "sequence": sequence}
            # Sizes of 0 and 1 are specialized by torch.export, so the example has others.
            sizes = {"batch": 2, "sequence": 16}
            example = tuple(torch.zeros([sizes[str(d)] for d in t.shape], dtype=torch.int64) for t in spec.inputs)
            shapes = tuple({i: dims[str(d)] for i, d in enumerate(t.shape)} for t in spec.inputs)
            exported = torch.export.export(wrapped, example, dynamic_shapes=shapes)
        prefixes = ("model.bert.", "model.")
        return Traced(exported, {f"model.{name}": stored for name, stored in parameters.items()}, prefixes)

    def adapt(self, model: Any, checkpoint: Checkpoint, task: str, options: ModelOptions) -> None:
        from medcompile.models._imported import adapt_encoder

        adapt_encoder(model, self.graph_spec(checkpoint, task, options), options.pooling)

    def assets(self, checkpoint: Checkpoint, options: ModelOptions, out: Path) -> tuple[str, ...]:
        made, notes = tokenizer(checkpoint.folder)
        made.save(str(out / "tokenizer.json"))
        mask = next((t for t in ("[MASK]", "<mask>") if made.token_to_id(t) is not None), None)
        positions = int(checkpoint.config["max_position_embeddings"])
        limit = min(positions, max(p.axis("sequence").max for p in options.profiles))
        text = {
            "max_length": min(limit, options.max_length or limit),
            "pooling": options.pooling,
            "normalize": options.normalize,
            "pad_id": int(checkpoint.config.get("pad_token_id") or 0),
            "mask_token": mask,
            "has_token_types": int(checkpoint.config.get("type_vocab_size", 2)) > 1,
            "multi_label": checkpoint.config.get("problem_type") == "multi_label_classification",
        }
        write_json(out / "text.json", text)
        if {"token-classification", "sequence-classification"} & set(options.tasks):
            write_json(out / "labels.json", _labels(checkpoint, options))
        return notes

    def reference(self, checkpoint: Checkpoint, task: str, options: ModelOptions) -> Executor:
        spec = self.graph_spec(checkpoint, task, options)
        if checkpoint.kind == "onnx":
            from medcompile.models._imported import ImportedExecutor

            return ImportedExecutor(checkpoint.folder / checkpoint.weights[0], spec, options.pooling)
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        cls = getattr(transformers, _CLASSES[task])
        extra = {"add_pooling_layer": False} if task == "embed" else {}
        model = cls.from_pretrained(
            checkpoint.folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **extra
        ).eval()
        return TorchExecutor(spec, _wrapper(model, task, options.pooling))


def _check_architecture(checkpoint: Checkpoint) -> None:
    """A config of 2019 says no model_type; one that says another would be read as BERT and give other answers."""
    said = checkpoint.config.get("model_type", "bert")
    positions = checkpoint.config.get("position_embedding_type", "absolute")
    if said != "bert" or positions != "absolute":
        what = f"a {said} model" if said != "bert" else f"a BERT with {positions} positions"
        raise SourceError(
            f"{checkpoint.source}: this is {what}", fix="the family bert takes BertModel checkpoints alone"
        )
    missing = [k for k in ("max_position_embeddings", "hidden_size", "vocab_size") if k not in checkpoint.config]
    if missing:
        raise SourceError(
            f"{checkpoint.source}: config.json does not say {', '.join(missing)}", fix="fetch config.json again"
        )


def _labels(checkpoint: Checkpoint, options: ModelOptions) -> list[str]:
    """Label strings by id. transformers writes no table for two default labels; they count as LABEL_0 and LABEL_1."""
    table = checkpoint.config.get("id2label")
    own = [f"LABEL_{i}" for i in range(int(checkpoint.config.get("num_labels", 2)))]
    if table:
        own = [str(table[k]) for k in sorted(table, key=int)]
    if options.labels and len(options.labels) != len(own):
        raise UsageError(
            f"model.labels names {len(options.labels)} labels, the checkpoint has {len(own)}: {', '.join(own)}",
            fix="give one name per label of the checkpoint, in the order of their ids",
        )
    return list(options.labels) or own


def _build(checkpoint: Checkpoint, task: str) -> Any:
    """The untrained transformers model of the checkpoint's architecture, fp32, eager attention, in eval mode."""
    import torch
    import transformers

    config = transformers.BertConfig.from_dict(dict(checkpoint.config))
    config._attn_implementation = "eager"
    config.dtype = torch.float32
    extra = {"add_pooling_layer": False} if task == "embed" else {}
    return getattr(transformers, _CLASSES[task])(config, **extra).eval()


def _wrapper(model: Any, task: str, pooling: str) -> Any:
    """A module with the graph's face around a transformers BERT, for tracing and for reference alike."""
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any, mask_position: Any = None) -> Any:
            # A ready-made additive mask [batch, 1, 1, sequence] passes through transformers untouched and keeps the
            # graph free of its mask builder.
            mask = (1.0 - attention_mask.to(torch.float32))[:, None, None, :] * _MASKED
            position = torch.arange(input_ids.shape[1])[None]
            bert = self.model if task == "embed" else self.model.bert
            result = bert(
                input_ids=input_ids, attention_mask=mask, token_type_ids=token_type_ids, position_ids=position
            )
            hidden = result.last_hidden_state  # [batch, sequence, hidden]
            if task == "embed":
                if pooling == "cls":
                    return hidden[:, 0]
                real = attention_mask.to(torch.float32)[:, :, None]
                return (hidden * real).sum(1) / real.sum(1).clamp(min=1.0)
            if task == "token-classification":
                return self.model.classifier(hidden)
            if task == "sequence-classification":
                return self.model.classifier(result.pooler_output)
            index = mask_position[:, None, None].expand(-1, 1, hidden.shape[-1])
            return self.model.cls(torch.gather(hidden, 1, index).squeeze(1))

    return Wrapper().eval()


def _match(parameters: Mapping[str, Any], tensors: Mapping[str, Any], task: str) -> dict[str, str]:
    """The checkpoint's name for each parameter; bare BertModel checkpoints lack the `bert.` that task models have."""
    found: dict[str, str] = {}
    missing: list[str] = []
    for name, parameter in parameters.items():
        stored = next((n for n in _aliases(name) if n in tensors), None)
        if stored is None:
            missing.append(name)
        elif tuple(tensors[stored].shape) != tuple(parameter.shape):
            raise SourceError(
                f"weight {stored} has shape {list(tensors[stored].shape)}, the config asks for {list(parameter.shape)}",
                fix="config.json and the weights are not of one model; fetch both again",
            )
        else:
            found[name] = stored
    if missing:
        raise SourceError(
            f"the checkpoint has no weights for {task}: {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
            fix=f"name a checkpoint that was trained for {task}, or choose a task that this one has",
        )
    return found


def _aliases(name: str) -> Iterator[str]:
    yield name
    yield f"bert.{name}"
    yield name.removeprefix("bert.")
    if name == "cls.predictions.decoder.weight":  # tied to the embeddings, and then stored once
        yield "bert.embeddings.word_embeddings.weight"
        yield "embeddings.word_embeddings.weight"
    if name == "cls.predictions.decoder.bias":
        yield "cls.predictions.bias"
    if name == "cls.predictions.bias":
        yield "cls.predictions.decoder.bias"


FAMILY = Bert()
