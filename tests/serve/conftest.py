"""What the tests of the server share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import decoders, tiny
from tests.serve.servers import Server
from tests.tiny import Workshop

WINDOW = 4096
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ON_CPU = ("--backend", "onnxruntime", "--variant", "fp32", "--threads", "1")


@pytest.fixture
def anyio_backend() -> str:
    """Coroutines marked anyio run on asyncio, as the server does."""
    return "asyncio"


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a tiny decoder that knows a chat template and has a long window."""
    root = tmp_path_factory.mktemp("decoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decoders.KINDS, "long", {"model_type": "llama", "max_position_embeddings": WINDOW})
        folder = decoders.write_checkpoint("long", root / "model")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"chat_template": TEMPLATE}))
    tiny.write_data(root / "calibration", "notes", tiny.records(48, 1), role="calibration")
    tiny.write_data(root / "calibration", "held-out", tiny.records(40, 2))
    recipe = tiny.write_recipe(
        root,
        tiny.recipe(
            model={"family": "llama", "tasks": ["generate"], "source": "path:../model"},
            shapes={"batch": [1, 4, 32], "sequence": [1, 32, WINDOW]},
            budget={"perplexity": {"max_drop": 0.5}, "top1_agreement": {"max_drop": 0.9}},
            variants={"fp32": {}},
        ),
    )
    made = Workshop(root, recipe, root / "cache", root / "engines" / "tiny-llm")
    made.build()
    return made.bundle


@pytest.fixture(scope="session")
def server(decoder: Path, workshop: Workshop, pair: Workshop) -> Iterator[Server]:
    """One server with three models: llm generates, text has all tasks of encoders, pair knows images."""
    bundles = (f"llm={decoder}", f"text={workshop.bundle}", f"pair={pair.bundle}")
    with Server(*bundles, *ON_CPU) as running:
        yield running
