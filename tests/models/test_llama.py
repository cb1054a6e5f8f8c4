"""The llama family: what a traced decoder holds, what it refuses, and what a runtime gets beside it.

That its numbers are those of transformers is held by tests/backends/test_openvino_paged.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer

from medcompile import sources
from medcompile.errors import ProfileError, SourceError
from medcompile.models import llama
from medcompile.passes.linear import linear_groups
from medcompile.program import Program
from medcompile.sources import Checkpoint
from tests import decoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.write_checkpoint("mixed", tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return decoders.simplified(folder)


def described(**changes: Any) -> Checkpoint:
    """A checkpoint that is a config alone."""
    return Checkpoint("path:x", None, Path(), {}, "safetensors", (), decoders.config("llama") | changes, Path())


def test_every_layer_is_one_paged_attention_with_its_own_window(program: Program) -> None:
    nodes = [n for n in program.graphs["generate"].model.graph if n.domain == "medcompile"]
    assert [n.name for n in nodes] == [f"layers.{i}.self_attn/PagedAttention" for i in (0, 1)]
    told = [{k: v.value for k, v in n.attributes.items()} for n in nodes]
    shared = {"heads": 4, "kv_heads": 2, "head_dim": 32, "scale": pytest.approx(32**-0.5)}
    assert told == [{**shared, "sliding_window": 0, "layer": 0}, {**shared, "sliding_window": 7, "layer": 1}]
    assert [v.name for v in nodes[1].inputs[3:]] == ["k_pool.1", "v_pool.1", "query_starts", "past_lens", "block_table"]


def test_the_graph_has_the_face_that_its_spec_tells(program: Program) -> None:
    graph = program.graphs["generate"]
    for value, face in zip(
        [*graph.model.graph.inputs, *graph.model.graph.outputs], [*graph.spec.inputs, *graph.spec.outputs], strict=True
    ):
        assert (value.name, value.dtype.numpy().name) == (face.name, face.dtype)
        assert [d if isinstance(d, int) else d.value for d in value.shape] == list(face.shape)


def test_linear_layers_are_those_of_the_model_by_their_own_names(program: Program) -> None:
    groups = [[n.name for n in g.nodes] for g in linear_groups(program.graphs["generate"].model)]
    layer = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    layer += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    expected = [[f"layers.{i}.{n}/MatMul" for n in names] for i in (0, 1) for names in layer]
    assert groups == [*expected, ["lm_head/MatMul"]]


def test_only_wanted_rows_reach_the_head(program: Program) -> None:
    (head,) = [n for n in program.graphs["generate"].model.graph if n.name == "lm_head/MatMul"]
    shape = head.inputs[0].shape
    assert [d if isinstance(d, int) else d.value for d in shape] == [1, "rows", 96]


def test_weights_are_bound_to_every_shard_and_none_is_read(tmp_path: Path) -> None:
    from medcompile.passes.export import export

    folder = decoders.write_checkpoint("llama", tmp_path / "shards", shard="200KB")
    model = export(llama.FAMILY, sources.resolve(f"path:{folder}"), decoders.OPTIONS).graphs["generate"].model
    tensors = [v.const_value for v in model.graph.initializers.values()]
    files = Counter(t.location for t in tensors if isinstance(t, ir.ExternalTensor))
    assert len(files) > 1
    assert set(files) == {p.name for p in folder.glob("*.safetensors")}
    own = [t.name for t in tensors if not isinstance(t, ir.ExternalTensor) and t.nbytes > 100]
    assert own == ["rotary_emb.cos", "rotary_emb.sin"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral", "num_local_experts": 4}, "mixture of experts"),
        ({"model_type": "unheard-of"}, "makes no decoder of its config"),
        ({"vocab_size": None}, "does not say vocab_size"),
        ({"vision_config": {"hidden_size": 8}}, "vision tower"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 16,
                    "long_factor": [2.0] * 16,
                    "factor": 2.0,
                    "original_max_position_embeddings": 48,
                }
            },
            "more than one table",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 32}, "attention with softcap"),
        ({"model_type": "bloom", "n_layer": 2, "n_head": 4}, "2"),
    ],
)
def test_another_architecture_is_refused_by_what_it_has(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SourceError, match=words) as caught:
        llama.FAMILY.trace(described(**changes), {}, "generate", decoders.OPTIONS)
    assert caught.value.fix


def test_a_missing_weight_is_named(folder: Path) -> None:
    checkpoint = sources.resolve(f"path:{folder}")
    tensors = dict(sources.tensors(checkpoint))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        llama.FAMILY.trace(checkpoint, tensors, "generate", decoders.OPTIONS)


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    options = dataclasses.replace(decoders.OPTIONS, max_length=decoders.POSITIONS + 1)
    with pytest.raises(ProfileError, match="96 positions"):
        llama.FAMILY.graph_spec(described(), "generate", options)


def test_the_reference_scores_every_token_as_transformers_does(folder: Path) -> None:
    ids = np.random.default_rng(0).integers(3, decoders.VOCABULARY, 20)
    with llama.FAMILY.reference(sources.resolve(f"path:{folder}"), "generate", decoders.OPTIONS) as reference:
        (logits,) = reference.run({"input_ids": ids}).values()
    np.testing.assert_allclose(logits, decoders.logits_of(decoders.reference(folder), ids), atol=1e-5)


def test_assets_hold_tokenizer_sizes_ends_and_template(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.6}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    llama.FAMILY.assets(sources.resolve(f"path:{folder}"), decoders.OPTIONS, tmp_path)
    decoder = json.loads((tmp_path / "decoder.json").read_text())
    assert decoder == {
        "block_size": 32,
        "context": 96,
        "head_dim": 32,
        "heads": 4,
        "kv_heads": 2,
        "layers": 2,
        "vocabulary": 128,
    }
    generation = json.loads((tmp_path / "generation.json").read_text())
    assert (generation["eos_ids"], generation["bos_id"]) == ([2, 5], 1)
    assert (generation["sampling"], generation["eos_token"]) == ({"temperature": 0.6}, "</s>")
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert made.encode("ab c").ids == decoders.tokenizer().encode("ab c").ids
