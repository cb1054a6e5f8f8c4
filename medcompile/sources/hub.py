"""The hf: scheme: the files of one commit on the hub, fetched into the hub client's own cache.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are the client's to read. What is added here: only the files that a
build uses, large files that go on where a killed run stopped, and errors that say what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medcompile.errors import SourceError
from medcompile.program import Progress
from medcompile.sources.folder import ONNX_DATA_FILES, SMALL_FILES, choose_weights, os_errors, present, require

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fetch(source: str, revision: str | None, *, offline: bool, progress: Progress | None) -> tuple[Path, set[str], str]:
    """Bring the files of hf:owner/name at a commit here. Returns folder, names of files in it, commit.

    What the cache holds is not asked for again; a whole checkpoint needs no network. Raises SourceError.
    """
    repository = source.removeprefix("hf:")
    if not _REPOSITORY.fullmatch(repository):
        raise SourceError(f"{source}: not a repository name", fix="write it as hf:owner/name")
    require(source, "huggingface_hub")
    _silence_telemetry()
    with _hub_errors(source, revision):
        commit = _commit(source, repository, revision, offline)
        return *_fetch(source, repository, commit, offline, progress), commit


def _silence_telemetry() -> None:
    """Off unless the user has a say in it. The client reads the variable at import, which may lie behind us."""
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from huggingface_hub import constants

        constants.HF_HUB_DISABLE_TELEMETRY = True


def _commit(source: str, repository: str, revision: str | None, offline: bool) -> str:
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    named = f"{revision!r} is a branch or tag, which can move" if revision else "no revision is given"
    fix = "set model.revision to the commit's 40 hex digits"
    with contextlib.suppress(RevisionResolutionError):  # offline and never seen: the fix stays general
        resolved = HfApi().resolve_revision(repository, revision=revision, local_files_only=offline).resolved
        fix = f"pin the commit it is now: revision: {resolved}"
    raise SourceError(f"{source}: {named}, and a build must be repeatable", fix=fix)


def _fetch(
    source: str, repository: str, commit: str, offline: bool, progress: Progress | None
) -> tuple[Path, set[str]]:
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    bars = _bars(source, progress)

    def snapshot(names: list[str]) -> Path:
        return Path(
            snapshot_download(
                repository, revision=commit, allow_patterns=names, local_files_only=offline, tqdm_class=bars
            )
        )

    folder = snapshot([*SMALL_FILES])
    try:
        listed = {file.path for file in get_cached_repo_tree(repository, revision=commit)}
    except CachedRepoTreeNotFoundError:  # fetched by an older client: what lies there is all that is known
        listed = present(folder)
    _, weights, beside = choose_weights(source, listed, folder)
    wanted = [*weights, *beside]
    if not offline:
        for name in wanted:
            if name in listed and not (folder / name).exists():
                _resume(repository, commit, name, bars)
    snapshot(wanted)
    return folder, {n for n in listed if n in (*SMALL_FILES, *ONNX_DATA_FILES)} | set(wanted)


def _resume(repository: str, commit: str, name: str, bars: Any) -> None:
    """Download a file into the cache's blobs, going on from what a run that was cut off left behind.

    The client itself resumes within one call only and throws the part away when that fails. Files in Xet storage are
    left to it: they come in deduplicated chunks.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]
    from huggingface_hub.utils._runtime import is_xet_available

    url = hf_hub_url(repository, name, revision=commit)
    found = get_hf_file_metadata(url)
    if found.etag is None or (found.xet_file_data is not None and is_xet_available()):
        return
    cache = Path(constants.HF_HUB_CACHE)
    stored = repo_folder_name(repo_id=repository, repo_type="model")
    blob = cache / stored / "blobs" / found.etag
    partial = blob.with_name(f"{found.etag}.resumable")
    lock = cache / ".locks" / stored / f"{found.etag}.lock"
    for parent in (blob.parent, lock.parent):
        parent.mkdir(parents=True, exist_ok=True)
    headers = build_hf_headers() if found.location.startswith(f"{constants.ENDPOINT}/") else {}
    with WeakFileLock(lock):
        if blob.exists():
            return
        with partial.open("ab") as out:
            if found.size is not None and out.tell() > found.size:
                out.seek(0)
                out.truncate()
            http_get(
                found.location,
                out,
                resume_size=out.tell(),
                headers=headers,
                expected_size=found.size,
                displayed_filename=name,
                tqdm_class=bars,
            )
        partial.replace(blob)


def _bars(source: str, progress: Progress | None) -> Any:
    """A class in tqdm's shape that draws nothing and tells progress how many bytes have come."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.bytes_of = kwargs.get("desc") if kwargs.get("unit") == "B" else None
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.total = kwargs.get("total")

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if progress is not None and self.bytes_of:
                progress.step(f"fetch {source}", int(self.n), int(self.total or 0))

    return Bar


@contextlib.contextmanager
def _hub_errors(source: str, revision: str | None) -> Iterator[None]:
    """Say what the hub client's errors mean, in our words."""
    import httpx2
    from huggingface_hub import constants, errors

    hub_faults = (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HFValidationError,
        httpx2.HTTPError,
        json.JSONDecodeError,
    )
    with os_errors(f"{source}: fetching into {constants.HF_HUB_CACHE}", fix="run again; what came stays"):
        try:
            yield
        except hub_faults as error:
            raise _explain(source, revision, error) from error


def _explain(source: str, revision: str | None, error: Exception) -> SourceError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{source.removeprefix('hf:')}"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
        what, fix = (
            "not in the hub cache as a whole, and this run is offline",
            "run once without --offline and without HF_HUB_OFFLINE",
        )
    elif isinstance(cause, errors.HFValidationError):
        what, fix = f"not a repository name: {_last_line(cause)}", "write it as hf:owner/name"
    elif isinstance(cause, errors.GatedRepoError) or status == 403:
        what, fix = (
            f"the hub refuses access ({status})",
            f"accept its terms at {page}, and set HF_TOKEN to a token that may read it",
        )
    elif isinstance(cause, errors.RevisionNotFoundError):
        what, fix = f"the repository has no revision {revision!r}", f"copy one from {page}/commits/main"
    elif isinstance(cause, errors.RepositoryNotFoundError) or status == 401:
        what, fix = (
            f"the hub has no such repository, or it is private ({status})",
            "check the spelling; for a private one set HF_TOKEN",
        )
    elif isinstance(cause, errors.EntryNotFoundError):
        what, fix = (
            f"the hub lists a file that it doesn't have: {_last_line(cause)}",
            "run again, or pin another commit",
        )
    elif isinstance(cause, json.JSONDecodeError) or status == 404:
        what = f"{constants.ENDPOINT} does not answer as a hub does"
        fix = "check HF_ENDPOINT; behind a proxy, check that it lets the hub through"
    elif status is not None:
        what, fix = f"the hub answered {status}", "run again later; what came stays"
    else:
        what = f"the hub at {constants.ENDPOINT} can't be reached ({type(cause).__name__}: {_last_line(cause)})"
        fix = "check the network, HTTPS_PROXY and HF_ENDPOINT, and run again: what came stays"
        if "CERTIFICATE" in str(cause).upper():
            fix = "set SSL_CERT_FILE to the certificate bundle of your network's proxy"
    return SourceError(f"{source}: {what}", fix=fix)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[-1]
