"""What a fresh process pays: imports, the command line's help, and the first MiniLM embedding from text.

    python benchmarks/startup.py BUNDLE --model CHECKPOINT [--runs 9] [--out benchmarks/results/startup.md]

Every figure is the wall time and peak memory of a whole process, contenders in turn, medians over the runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

TEXT = "Metformin was stopped for acute kidney injury."
LOAD = (
    "import medcompile; s = medcompile.load({bundle!r}, backend={backend!r}, variant={variant!r}); s.embed([{text!r}])"
)
PIPELINE = """
import transformers
pipe = transformers.pipeline("feature-extraction", model={model!r})
pipe({text!r})
"""


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and megabytes of peak memory of one process. Raises if it failed."""
    start = time.perf_counter()
    pid = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(pid, 0)
    elapsed = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{command[-1]} ended with {os.waitstatus_to_exitcode(status)}")
    return elapsed, usage.ru_maxrss / 1000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundle")
    arguments.add_argument("--model", required=True, help="the checkpoint's folder, for transformers")
    arguments.add_argument("--runs", type=int, default=9)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    python = sys.executable

    def load(backend: str, variant: str) -> list[str]:
        code = LOAD.format(bundle=given.bundle, backend=backend, variant=variant, text=TEXT)
        return [python, "-c", code]

    contenders = {
        "python, nothing imported": [python, "-c", ""],
        "import medcompile": [python, "-c", "import medcompile"],
        "medcompile --help": [str(Path(python).parent / "medcompile"), "--help"],
        "first embedding, ONNX Runtime int8": load("onnxruntime-cpu", "int8"),
        "first embedding, ONNX Runtime fp32": load("onnxruntime-cpu", "fp32"),
        "first embedding, OpenVINO int8": load("openvino-cpu", "int8"),
        "first embedding, OpenVINO fp32": load("openvino-cpu", "fp32"),
        "first embedding, transformers pipeline fp32": [
            python,
            "-c",
            PIPELINE.format(model=given.model, text=TEXT),
        ],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_ in range(given.runs + 1):
        for name, command in contenders.items():
            result = run(command)
            if round_:  # the first warms the page cache
                times[name].append(result)
    lines = [
        "# Start-up",
        "",
        f"Whole processes, {given.runs} runs each in turn after one that is not counted, medians. all-MiniLM-L6-v2,",
        "tokenizer and digests included. Made by `benchmarks/startup.py`.",
        "",
        "| what | seconds | best | peak memory, MB |",
        "|---|---|---|---|",
    ]
    for name, results in times.items():
        seconds = [s for s, _ in results]
        memory = statistics.median(m for _, m in results)
        lines.append(f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {memory:.0f} |")
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
