"""What a checkpoint folder holds: which of its files are used, whether they can be, and their digests.

The names are those that transformers, sentence-transformers, open_clip and Optimum write. Fetching a folder lives in
hub.py, reading what is inside a weight file in tensors.py and pickled.py.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medcompile.errors import SourceError

Kind = Literal["safetensors", "bin", "onnx"]

CONFIG_FILES = ("config.json", "open_clip_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SETTINGS_FILES = (
    "1_Pooling/config.json",
    "text_config/config.json",
    "modules.json",
    "sentence_bert_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
# By kind, best first: one file, then the index of a sharded one.
WEIGHT_FILES: tuple[tuple[Kind, tuple[str, ...], str], ...] = (
    ("safetensors", ("model.safetensors", "open_clip_model.safetensors"), "model.safetensors.index.json"),
    ("bin", ("pytorch_model.bin", "open_clip_pytorch_model.bin"), "pytorch_model.bin.index.json"),
    ("onnx", ("model.onnx",), ""),
)
ONNX_DATA_FILES = ("model.onnx_data", "model.onnx.data")
INDEX_FILES = tuple(index for _, _, index in WEIGHT_FILES if index)
SMALL_FILES = (*CONFIG_FILES, *TOKENIZER_FILES, *SETTINGS_FILES, *INDEX_FILES)
_TOKENIZERS = ({"tokenizer.json"}, {"vocab.txt"}, {"vocab.json", "merges.txt"})
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".onnx", ".h5", ".msgpack", ".gguf", ".ckpt", ".pt", ".pth", ".npz")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Checkpoint:
    """A model's files on this machine, found complete and digested.

    source: as the recipe wrote it. revision: the commit for hf:, else None. config: config.json as it stands, or
    open_clip_config.json where there is only that. files: name in folder -> sha256, of the files that are used.
    weights: names in folder, in shard order. cache: where tensors() keeps what it converts.
    """

    source: str
    revision: str | None
    folder: Path
    files: Mapping[str, str]
    kind: Kind
    weights: tuple[str, ...]
    config: Mapping[str, Any]
    cache: Path = field(compare=False)


def read_checkpoint(source: str, revision: str | None, folder: Path, names: Collection[str], cache: Path) -> Checkpoint:
    """Check and digest the used ones among names (relative to folder). Raises SourceError."""
    config_name = next((n for n in CONFIG_FILES if n in names), None)
    if config_name is None:
        raise SourceError(
            f"{source}: no config.json in {folder}",
            fix="point the source at the folder that holds config.json beside the weights (save_pretrained writes it)",
        )
    if not any(wanted <= set(names) for wanted in _TOKENIZERS):
        raise SourceError(
            f"{source}: no tokenizer in {folder} (looked for tokenizer.json, vocab.txt, or vocab.json with merges.txt)",
            fix="copy the base model's tokenizer.json or vocab.txt beside config.json, and use that folder as path:",
        )
    kind, weights, beside = choose_weights(source, names, folder)
    used = [n for n in (*CONFIG_FILES, *TOKENIZER_FILES, *SETTINGS_FILES) if n in names] + [*beside, *weights]
    files = {name: digest(source, folder, name) for name in used}
    return Checkpoint(source, revision, folder, files, kind, weights, read_json(source, folder / config_name), cache)


def present(folder: Path) -> set[str]:
    """The names this room knows, as far as they are in folder; a link to nothing counts, so that it is reported."""
    singles = [name for _, files, _ in WEIGHT_FILES for name in files]
    return {n for n in (*SMALL_FILES, *singles, *ONNX_DATA_FILES) if os.path.lexists(folder / n)}


def choose_weights(source: str, names: Collection[str], folder: Path) -> tuple[Kind, tuple[str, ...], tuple[str, ...]]:
    """The kind, the weight files in order, and the files that go beside them, from the names that a folder has.

    Safetensors win over .bin, and both over an exported model.onnx; one file wins over shards. Reads the index of a
    sharded checkpoint from folder. Raises SourceError.
    """
    for kind, singles, index in WEIGHT_FILES:
        for single in singles:
            if single in names:
                data = tuple(n for n in ONNX_DATA_FILES if n in names) if kind == "onnx" else ()
                return kind, (single,), data
        if index in names:
            return kind, _shards(source, folder / index), (index,)
    seen = sorted(n for n in {*names, *_listing(folder)} if n.endswith(_WEIGHT_SUFFIXES))
    wanted = ", ".join(name for _, files, _ in WEIGHT_FILES for name in files)
    raise SourceError(
        f"{source}: no weights that can be read (looked for {wanted}); "
        + (f"there is {', '.join(seen)}" if seen else "no weight file is there at all"),
        fix="save the model with save_pretrained(), which writes model.safetensors, and use that folder as path:",
    )


def read_json(source: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises SourceError if there is none."""
    check_content(source, path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{source}: {path.name} is not JSON: {error}", fix="fetch the file again") from error
    if not isinstance(value, dict):
        raise SourceError(
            f"{source}: {path.name} holds a {type(value).__name__} where a JSON object belongs",
            fix="fetch the file again",
        )
    return value


def check_content(source: str, path: Path) -> None:
    """Raise SourceError if the file is missing, a link to nothing, empty, or a git-lfs pointer in its place."""
    if not path.is_file():
        link = f" (a link to {path.readlink()}, which is gone)" if path.is_symlink() else ""
        raise SourceError(
            f"{source}: {path.name} is missing{link} in {path.parent}",
            fix="fetch the checkpoint again; for a hub cache, delete the snapshot folder first",
        )
    with os_errors(f"{source}: reading {path.name}", fix=f"check the permissions of {path}"), path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if not head:
        raise SourceError(f"{source}: {path.name} is empty (0 bytes)", fix="fetch the file again")
    if head == _LFS_POINTER:
        raise SourceError(
            f"{source}: {path.name} is a git-lfs pointer, not the file itself",
            fix=f"run 'git lfs install && git lfs pull' in {path.parent}, or use the model's hf: source",
        )


def require(source: str, library: str) -> None:
    """Raise SourceError with the install line if a library of the build extra is missing."""
    if importlib.util.find_spec(library) is None:
        raise SourceError(f"{source}: reading it needs {library}", fix="pip install 'medcompile[build]'")


@contextmanager
def os_errors(doing: str, *, fix: str) -> Iterator[None]:
    """Turn an OSError inside the block into a SourceError; a full disk gets its own words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(
                f"{doing}: no space left on the disk",
                fix="free some space, or move the caches: HF_HOME for downloads, MEDCOMPILE_CACHE for conversions",
            ) from error
        raise SourceError(f"{doing}: {error.strerror or error}", fix=fix) from error


def _shards(source: str, index: Path) -> tuple[str, ...]:
    weight_map = read_json(source, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(f"{source}: {index.name} has no weight_map of tensor to file", fix="fetch the file again")
    shards = tuple(sorted(set(weight_map.values())))
    for shard in shards:
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise SourceError(
                f"{source}: {index.name} names the shard {shard!r}, which lies outside the folder",
                fix="don't use this checkpoint: shards lie beside their index",
            )
    return shards


def _listing(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def digest(source: str, folder: Path, name: str) -> str:
    """sha256 hex of a file, read in pieces. A hub cache names its large blobs by that digest: then it must agree."""
    path = folder / name
    check_content(source, path)
    with os_errors(f"{source}: reading {name}", fix=f"check the permissions of {path}"), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    blob = path.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == len(digest) and blob.name != digest:
        raise SourceError(
            f"{source}: {name} is damaged: the hub recorded sha256 {blob.name}, the file has {digest}",
            fix=f"delete {blob} and run again",
        )
    return digest
