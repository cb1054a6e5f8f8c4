"""Does TensorRT-RTX take this GPU? A tiny engine is built, offered to the library, deserialized and run.

    python benchmarks/gpu_accepts.py

Its documentation names compute capabilities 7.5, 8.x and 12.x; what it says to others is asked here.
Exit status 0 if the engine ran and gave what the CPU gives, 1 otherwise. Every answer is printed as it was given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    import numpy as np

    from medcompile.backends import _cuda, _tensorrt_executor, tensorrt
    from medcompile.errors import MedcompileError
    from medcompile.run_onnx import session
    from tests import graphs

    variant = graphs.VARIANTS["fp32"]
    try:
        device = _cuda.open_cuda().device()
        print(f"device: {device.name}, compute capability {'.'.join(map(str, device.compute_capability))}")
        print(f"memory: {device.memory_bytes / 1e9:.0f} GB; its driver knows CUDA {'.'.join(map(str, device.driver))}")
        target = tensorrt.BACKEND.probe("tensorrt-rtx")
        print(f"TensorRT-RTX {target.version}")
        with TemporaryDirectory() as scratch:
            source, out = graphs.write(variant, Path(scratch) / "typed"), Path(scratch) / "out"
            out.mkdir()
            built = tensorrt.BACKEND.build(source, graphs.SPEC, variant, target, out)
            print(f"built for {built.target.arch}: {(out / built.file).stat().st_size} bytes")
            _ask(out / built.file)
            import tensorrt_rtx

            with _tensorrt_executor.load_engine(out / built.file, graphs.SPEC, tensorrt_rtx) as executor:
                print("deserialized: yes")
                given = executor.run(graphs.feeds())["embedding"]
            wanted = session(source).run(["embedding"], graphs.feeds())[0]
        error = float(np.abs(given - wanted).max())
        print(f"ran: largest difference to the CPU {error:.1e}, of values up to {np.abs(wanted).max():.1f}")
    except MedcompileError as error:
        print(f"no: {error}")
        return 1
    return 0 if error < 0.05 * float(np.abs(wanted).max()) else 1


def _ask(plan: Path) -> None:
    """The library's own words about the plan, which say whether it takes the device."""
    import tensorrt_rtx

    from medcompile.backends._tensorrt_executor import logger_of

    validity, flags = tensorrt_rtx.Runtime(logger_of(tensorrt_rtx)).get_engine_validity(plan.read_bytes())
    kinds = tensorrt_rtx.EngineInvalidityDiagnostics.__members__
    reasons = [name for name, kind in kinds.items() if int(kind) & int(flags)]
    print(f"get_engine_validity: {validity.name} {' '.join(reasons)}".rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
