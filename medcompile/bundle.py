"""The bundle: one folder that holds graphs, artifacts, assets and evidence, sealed by a manifest that is written last.

Reading checks everything a folder can get wrong before anything in it is deserialized; writing assembles the folder
beside its place and swaps it in. What the files mean is the business of whoever opens them (runtime/, backends/).

bundle.json is canonical JSON (sorted keys, one space of indent, ASCII) that lists every other file with its SHA-256 and
size and ends in a digest over itself, so a flipped byte anywhere is found. It holds no clock time; latencies measured
at build time are in its artifacts, so its digest names one build while the digests of graphs repeat between builds.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from medcompile import manifest
from medcompile.errors import BundleError, UsageError
from medcompile.spec import Artifact, GraphSpec, Margin, Variant

MANIFEST = "bundle.json"
EVIDENCE = "evidence.json"
PARALLEL_BYTES = 16 << 20
"""From this much data on, several files are hashed at once (hashlib releases the interpreter lock)."""


@dataclass(frozen=True)
class File:
    """What the manifest says of one file: hex SHA-256 and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Contents:
    """The part of a manifest that the compiler decides. assets maps a role (tokenizer, labels) to a file's path."""

    name: str
    family: str
    tasks: tuple[str, ...]
    graphs: Mapping[str, GraphSpec]
    variants: Mapping[str, Variant]
    artifacts: tuple[Artifact, ...]
    budget: tuple[Margin, ...]
    assets: Mapping[str, str]
    provenance: Mapping[str, Any]


Told = Callable[[Contents, Path], Mapping[str, str]]
"""Texts by path that tell of a bundle, made from its contents and the folder that holds all of its other files."""


@dataclass(frozen=True)
class _Manifest(Contents):
    files: Mapping[str, File]


@dataclass(frozen=True)
class Bundle(_Manifest):
    """A bundle on disk. files: every file but the manifest, by relative path with forward slashes.

    digest: SHA-256 of the manifest's bytes, which covers every file through its digest.
    """

    root: Path
    digest: str

    def under(self, folder: str) -> tuple[str, ...]:
        """Paths of the files below folder (relative, forward slashes), sorted."""
        return tuple(sorted(f for f in self.files if f.startswith(folder.rstrip("/") + "/")))

    def folder_of(self, artifact: Artifact) -> str:
        """The relative folder that holds everything the artifact needs to be loaded."""
        return artifact.path.rpartition("/")[0]

    def check(self, paths: Iterable[str]) -> None:
        """Compare the digests of these files with the manifest. Raises BundleError naming those that differ."""
        wanted = list(paths)
        hashed = _hash_files(self.root, wanted)
        altered = [p for p in wanted if hashed[p] != self.files[p]]
        if altered:
            raise BundleError(
                f"{self.root}: {_list(altered)} differ from what {MANIFEST} recorded",
                fix="copy the bundle again from where it was built, or rebuild it",
            )


def read(path: str | os.PathLike[str], *, check: bool = True) -> Bundle:
    """Read a bundle's manifest and hold the folder against it: every file listed, present, plain, of its size.

    check=True also compares every file's digest; with False the caller checks what it opens (Bundle.check).
    Raises BundleError; nothing in the folder but the manifest is parsed.
    """
    root = Path(path).resolve()
    if not root.is_dir():
        raise BundleError(f"{path}: no such folder", fix="give the folder that `medcompile build` wrote")
    sealed = root / MANIFEST
    if sealed.is_symlink() or not sealed.is_file():
        raise BundleError(
            f"{path}: no {MANIFEST}: not a bundle, or an unfinished build", fix="run `medcompile build` to its end"
        )
    try:
        raw = sealed.read_bytes()
        data = manifest.decode(_Manifest, manifest.parse(raw, str(sealed)), "")
        bundle = Bundle(**vars(data), root=root, digest=hashlib.sha256(raw).hexdigest())
        _check_references(bundle)
        _check_folder(bundle)
        if check:
            bundle.check(bundle.files)
    except manifest.Malformed as error:
        raise BundleError(f"{sealed}: {error}", fix="rebuild the bundle with this version of medcompile") from None
    except OSError as error:
        raise BundleError(f"{error.filename}: {error.strerror}", fix="make the whole folder readable") from error
    return bundle


class Writer:
    """Assembles a bundle beside its place and swaps it in on commit(). A context manager; POSIX only.

    Leaving without commit() removes what was written. The temporary folder is locked while its writer lives, so a
    later writer for the same place can tell a dead build's leftovers from a running build.
    Raises UsageError if place holds something that is not a bundle.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = Path(place).resolve()
        self.root = Path()
        self._lock = -1

    def __enter__(self) -> Writer:
        self._refuse_foreign_folder()
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        while self._lock < 0:
            self.root = self._sibling("building")
            self.root.mkdir()
            self._lock = lock_folder(self.root)
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)

    def path(self, relative: str) -> Path:
        """Where to write the file of that relative path; its folders are made."""
        _check_path(relative)
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, contents: Contents, told: Told | None = None) -> Bundle:
        """Hash every file written so far, write the manifest, and put the bundle in its place, replacing an older one.

        Artifacts may leave sha256 "" and size_bytes 0: both are filled in. told is asked then, and what it says is
        written before the manifest. Returns the bundle at its final place.
        """
        files = _hash_files(self.root, _walk(self.root))
        artifacts = []
        for artifact in contents.artifacts:
            file = files.get(artifact.path)
            if file is None or artifact.sha256 not in ("", file.sha256):
                raise BundleError(f"artifact {artifact.path} is not the file that was written")
            artifacts.append(dataclasses.replace(artifact, sha256=file.sha256, size_bytes=file.size))
        contents = dataclasses.replace(contents, artifacts=tuple(artifacts))
        texts = told(contents, self.root) if told else {}
        for path, text in texts.items():
            self.path(path).unlink(missing_ok=True)  # it may be a link to the older bundle's
            self.path(path).write_text(text, encoding="utf-8")
        files |= _hash_files(self.root, texts)
        with (self.root / MANIFEST).open("xb") as out:
            out.write(manifest.seal(manifest.encode(_Manifest(**vars(contents), files=files))))
            out.flush()
            os.fsync(out.fileno())
        bundle = read(self.root, check=False)
        self._swap_in()
        return dataclasses.replace(bundle, root=self.place)

    def add(self, source: Path, relative: str) -> None:
        """Put a file into the bundle: one of the bundle that it replaces is only linked, where the disk can, so that
        nothing is copied; the older name goes with the older bundle. (ONNX readers refuse weights of two names.)"""
        try:
            if source.is_relative_to(self.place):
                os.link(source, self.path(relative))
                return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP):
                raise
        shutil.copyfile(source, self.path(relative))

    def _sibling(self, state: str) -> Path:
        return self.place.with_name(f".{self.place.name}.{state}-{os.getpid()}-{secrets.token_hex(4)}")

    def _refuse_foreign_folder(self) -> None:
        """An older bundle may be replaced; anything else at this place belongs to somebody."""
        try:
            there = [p.name for p in self.place.iterdir()]
        except FileNotFoundError:
            return
        except NotADirectoryError:
            if not self.place.exists():  # it is its parent that is no folder
                raise
            there = [self.place.name]
        if there and MANIFEST not in there:
            raise UsageError(
                f"{self.place} exists and is not a bundle", fix="choose another output folder, or move this one away"
            )

    def _remove_leftovers(self) -> None:
        for state in ("building", "replaced"):
            for folder in self.place.parent.glob(f".{glob.escape(self.place.name)}.{state}-*"):
                lock = lock_folder(folder)
                if lock >= 0:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)

    def _swap_in(self) -> None:
        """Rename the old bundle away and the new one in. Whoever renames last wins; neither is ever mixed."""
        replaced = self._sibling("replaced")
        while True:
            try:
                self.root.rename(self.place)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            self._refuse_foreign_folder()
            try:
                self.place.rename(replaced)
            except FileNotFoundError:
                continue  # another build renamed it away first
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        parent = os.open(self.place.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)


def rewrite(
    found: Bundle,
    place: Path,
    artifacts: Iterable[Artifact],
    files: Mapping[str, Path] | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    told: Told,
) -> Bundle:
    """Write found anew at place (its own root, too) with these artifacts, and what told says of the result.

    files: what new artifacts bring along, by relative path, in place of what lay in their folders. provenance None:
    as it was. Whoever calls has checked the digests of found.
    """
    kept = tuple(artifacts)
    added = files or {}
    replaced = tuple(f"{found.folder_of(a)}/" for a in kept if a.path in added)
    with Writer(place) as writer:
        for path in found.files:
            if path not in added and not path.startswith(replaced):
                writer.add(found.root / path, path)
        for path, source in added.items():
            shutil.copyfile(source, writer.path(path))
        contents = {field.name: getattr(found, field.name) for field in dataclasses.fields(Contents)}
        contents |= {"artifacts": kept, "provenance": found.provenance if provenance is None else provenance}
        return writer.commit(Contents(**contents), told)


def lock_folder(folder: Path, *, wait: bool = False) -> int:
    """A descriptor that holds the folder's lock until closed, or -1 if another process has it or removed the folder.

    wait: rather wait until the other process lets go.
    """
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if folder.exists():
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return -1


# ---- the folder against its manifest


def _check_path(path: str) -> None:
    """Refuse a relative path that could leave the folder on any system."""
    parts = path.split("/")
    foreign = "\\" in path or "\0" in path or PureWindowsPath(path).drive
    if foreign or any(p in ("", ".", "..") for p in parts):
        raise BundleError(f"{path!r} is not a plain path inside the bundle", fix="don't load this bundle; rebuild it")


def _check_references(bundle: Bundle) -> None:
    """The manifest must agree with itself: every path it names is listed, every graph and variant defined."""
    for path in bundle.files:
        _check_path(path)
    wrong = [f"asset {role}" for role, path in bundle.assets.items() if path not in bundle.files]
    wrong += [f"graph {key}" for key, graph in bundle.graphs.items() if graph.name != key]
    wrong += [f"variant {key}" for key, variant in bundle.variants.items() if variant.name != key]
    for artifact in bundle.artifacts:
        known = artifact.graph in bundle.graphs and artifact.variant in bundle.variants and "/" in artifact.path
        if not known or bundle.files.get(artifact.path) != File(artifact.sha256, artifact.size_bytes):
            wrong.append(f"artifact {artifact.path}")
    if wrong:
        raise BundleError(f"{bundle.root}: {MANIFEST} contradicts itself: {_list(wrong)}", fix="rebuild the bundle")


def _check_folder(bundle: Bundle) -> None:
    """Every file listed, present, plain and of its size, and no other file there."""
    present = set(_walk(bundle.root)) - {MANIFEST}
    listed = set(bundle.files)
    wrong_size = [p for p in present & listed if (bundle.root / p).stat().st_size != bundle.files[p].size]
    for paths, what in (
        (present - listed, f"not listed in {MANIFEST}"),
        (listed - present, "missing"),
        (set(wrong_size), "of another size than recorded"),
    ):
        if paths:
            raise BundleError(
                f"{bundle.root}: {_list(sorted(paths))}: {what}",
                fix="copy the bundle again from where it was built, or rebuild it; keep your own files out of it",
            )


def _walk(root: Path) -> list[str]:
    """Relative paths of all files below root, sorted. Raises BundleError on a symlink or anything but plain files."""
    found = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        for name in folders + names:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise BundleError(
                    f"{path}: a link or a special file, which no bundle holds", fix="don't load this bundle; rebuild it"
                )
            if stat.S_ISREG(mode):
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _hash_files(root: Path, paths: Iterable[str]) -> dict[str, File]:
    sizes = {p: (root / p).stat().st_size for p in paths}
    largest_first = sorted(sizes, key=sizes.__getitem__, reverse=True)
    if len(sizes) > 1 and sum(sizes.values()) >= PARALLEL_BYTES:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(lambda p: _sha256(root / p), largest_first))
    else:
        digests = [_sha256(root / p) for p in largest_first]
    return {p: File(d, sizes[p]) for p, d in zip(largest_first, digests, strict=True)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list(paths: Iterable[str], shown: int = 3) -> str:
    names = list(paths)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
