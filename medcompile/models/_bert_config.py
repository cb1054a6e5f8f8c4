"""The config of an open_clip checkpoint's BERT text tower, which lies beside it, or nowhere but on a hub.

No hub is asked: where the folder has no text_config/config.json, the tensors show the sizes, and the rest is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from medcompile import sources
from medcompile.errors import SourceError
from medcompile.sources import Checkpoint, TensorRef
from medcompile.sources.folder import read_json

TEXT_CONFIG = "text_config/config.json"
# Hub ids that are known to be BERT with heads of 64 channels, exact GELU and an epsilon of 1e-12: what the tensors of
# a checkpoint do not show.
_BERTS = re.compile(
    r"microsoft/BiomedNLP-(BiomedBERT|PubMedBERT)-(base|large)-uncased-abstract(-fulltext)?"
    r"|(google-bert/)?bert-(base|large)-(un)?cased"
    r"|emilyalsentzer/Bio_ClinicalBERT"
    r"|dmis-lab/biobert-.*v1\.[12]"
)


def text_config(checkpoint: Checkpoint, name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A BertConfig as a dict, and notes on what was assumed. name: open_clip's hf_model_name. Raises SourceError."""
    source, path = checkpoint.source, checkpoint.folder / TEXT_CONFIG
    if path.is_file():
        config = read_json(source, path)
        kind, positions = config.get("model_type"), config.get("position_embedding_type", "absolute")
        if kind != "bert" or positions != "absolute":
            raise SourceError(
                f"{source}: its text tower is a {kind} with {positions} positions",
                fix="name a checkpoint whose text tower is BERT with absolute positions",
            )
        return config, ()
    if not _BERTS.fullmatch(name):
        raise SourceError(
            f"{source}: the config of its text tower {name} is not in the folder",
            fix=f"copy the config.json of {name} to {TEXT_CONFIG} in {checkpoint.folder}, and use that folder as path:",
        )
    config = _of_tensors(sources.tensors(checkpoint), source)
    note = (
        f"text tower: no {TEXT_CONFIG}; sizes come from the weights, and as {name} is BERT, "
        f"{config['num_attention_heads']} heads, exact GELU, epsilon 1e-12 and padding id 0 are assumed"
    )
    return config, (note,)


def _of_tensors(tensors: Mapping[str, TensorRef], source: str) -> dict[str, Any]:
    """A BertConfig from the shapes of a text tower's tensors, the rest as in BERT-base. Raises SourceError."""
    base = "text.transformer."
    needed = [
        base + name
        for name in (
            "embeddings.word_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "embeddings.token_type_embeddings.weight",
            "encoder.layer.0.intermediate.dense.weight",
        )
    ]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise SourceError(
            f"{source}: the checkpoint has no weights for text: {', '.join(missing)}",
            fix="name a checkpoint with both towers, or leave text out of model.tasks",
        )
    (words, hidden), (positions, _), (types, _), (inner, _) = (tensors[name].shape for name in needed)
    layers = {name.split(".")[4] for name in tensors if name.startswith(f"{base}encoder.layer.")}
    return {
        "model_type": "bert",
        "vocab_size": words,
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
