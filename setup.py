"""The compiled kernels (medcompile/kernels/native): optional, so that an installation without a compiler goes on.

All else is in pyproject.toml.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("medcompile/kernels/native")

setup(
    ext_modules=[
        # Not a Python module but a plain library, which ONNX Runtime opens.
        Extension(
            "medcompile.kernels.native._library",
            [str(path) for path in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            extra_compile_args=[
                *("-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
                *("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # of the compiler's own headers
            ],
            language="c++",
            optional=True,
        )
    ]
)
