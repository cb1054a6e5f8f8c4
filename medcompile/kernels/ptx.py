"""Compile the Triton kernels to PTX, ahead of time and with no GPU, for a bundle to carry.

PTX for compute capability 8.0 is enough: a driver compiles it for every later GPU. Beside it stands 9.0's, whose
products on Hopper take an instruction that neither 8.0 nor any later GPU has. Compiling for 8.9 and 12.0 gives the
same products as 8.0 does. The text holds no path and no line of source: equal faces give equal bytes.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from medcompile.errors import BackendError, BackendUnavailable
from medcompile.kernels.compiled import Entry, Kernels, Module
from medcompile.kernels.launches import Face, Kernel

CAPABILITIES = (80, 90)
_PTX_VERSION = 87
"""PTX ISA 8.7: what drivers from CUDA 12.8 on take."""
_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_INTEGERS = ("query_starts", "past_lens", "block_table")
_FLOATS = ("partial", "stats")
_COUNTS = ("sequences", "table_width", "window", "splits")
_ALIGNED = [["tt.divisibility", 16]]
_SHARED = ".extern .shared .align 16 .b8 global_smem[];"
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(.*?^\}\n", re.MULTILINE | re.DOTALL)


def compile_kernels(face: Face, capabilities: tuple[int, ...] = CAPABILITIES) -> Kernels:
    """The kernels for one model's attention. capabilities: 80 for 8.0; 8.0, 8.9, 9.0 and 12.0 are tested.

    Raises BackendUnavailable without Triton (torch's CUDA build brings it along).
    """
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable(f"triton cannot be imported: {error}", fix="pip install triton") from error
    modules = dict(_module(face, capability) for capability in capabilities)
    return Kernels(face, f"triton {triton.__version__}", modules)


def _module(face: Face, capability: int) -> tuple[str, Module]:
    """Architecture and PTX of all kernels as one module."""
    entries, bodies, target = {}, [], ""
    for kernel in get_args(Kernel):
        compiled, arguments = _compiled(face, kernel, capability)
        text = re.sub(r"[ \t]*//.*$", "", compiled.asm["ptx"], flags=re.MULTILINE)
        text = re.sub(r"^[ \t]*\.(loc|file)\b.*\n", "", text, flags=re.MULTILINE)
        found = _ENTRY.search(text)
        assert found is not None, "one kernel per compilation"
        name = f"medcompile_{kernel}"
        bodies.append(re.sub(rf"\b{found[1]}(?=\(|_param_)", name, re.sub(r"\n\n+", "\n", found[0])))
        target = text[text.index(".version") : text.index(".address_size")]
        parameters = bodies[-1].count(".param .")
        metadata = compiled.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise BackendError(
                f"kernel {kernel} compiled by triton wants scratch memory, which no launch here gives",
                fix="use the version of triton that this medcompile was tested with",
            )
        scratch = parameters - len(arguments)
        entries[kernel] = Entry(name, metadata.num_warps, metadata.shared, arguments, scratch)
    ptx = f"{target}.address_size 64\n\n{_SHARED}\n\n" + "\n".join(bodies)
    return re.search(r"\.target (\w+)", target)[1], Module(ptx, entries)  # type: ignore[index]


def _compiled(face: Face, kernel: Kernel, capability: int) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """Triton's result, and the kernel's arguments by name and kind."""
    import triton
    from triton.backends.compiler import GPUTarget

    from medcompile.kernels.triton_attention import variant

    made = variant(face, kernel)
    names = made.function.arg_names
    types = {name: "constexpr" if name in made.constants else _type(face, name) for name in names}
    source = triton.compiler.ASTSource(
        made.function,
        types,
        made.constants,
        {(index,): _ALIGNED for index, name in enumerate(names) if types[name].startswith("*")},
    )
    options = {
        "num_warps": made.warps,
        "num_stages": made.stages,
        "ptx_version": _PTX_VERSION,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    kinds = {"i32": "int32", "fp32": "float32"}
    return compiled, tuple((name, kinds.get(types[name], "pointer")) for name in names if name not in made.constants)


def _type(face: Face, name: str) -> str:
    if name in _COUNTS:
        return "i32"
    if name == "scale":
        return "fp32"
    if name in _INTEGERS:
        return "*i32"
    if name in _FLOATS:
        return "*fp32"
    return "*" + _TYPES[face.pool_dtype if name.endswith("_pool") else face.dtype]
