"""hf: sources against a local server that speaks the hub's protocol: what is asked, resumed, refused and said."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub._tree_cache
import huggingface_hub.constants
import pytest

from medcompile.errors import SourceError
from medcompile.sources import resolve, tensors
from tests.hub_server import COMMIT, Hub, folder_files, serve

REPO = "acme/tiny-bert"
SOURCE = f"hf:{REPO}"


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny BERT with random weights, as save_pretrained writes it, and what hub repositories also hold."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pain"]))
    (folder / "README.md").write_text("# tiny")
    (folder / "tf_model.h5").write_bytes(b"\x89HDF" * 9000)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder_files(folder)


@pytest.fixture
def hub(model_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve({REPO: dict(model_files)}) as running:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is kept of a cut file, in whole pieces
        monkeypatch.setenv("MEDCOMPILE_CACHE", str(tmp_path / "cache"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("time.sleep", lambda _seconds: None)  # the client waits between its retries
        yield running


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fault(source: str, revision: str | None = COMMIT, **how: bool) -> SourceError:
    with pytest.raises(SourceError) as caught:
        resolve(source, revision, **how)
    assert caught.value.fix
    return caught.value


def test_a_pinned_repository_is_fetched_with_only_the_files_that_a_build_uses(
    hub: Hub, model_files: dict[str, bytes]
) -> None:
    found = resolve(SOURCE, COMMIT)
    assert (found.kind, found.weights, found.revision) == ("safetensors", ("model.safetensors",), COMMIT)
    assert found.files == {n: sha256(model_files[n]) for n in ("config.json", "vocab.txt", "model.safetensors")}
    assert found.config["hidden_size"] == 64
    assert not hub.asked("tf_model.h5") and not hub.asked("README") and not hub.asked("onnx/")
    assert len(hub.asked("GET /acme/tiny-bert/resolve")) == 3
    table = tensors(found)
    ref = table["embeddings.word_embeddings.weight"]
    assert (ref.dtype, ref.shape) == ("float32", (200, 64))
    assert not ref.file.is_symlink()


def test_a_whole_cached_checkpoint_needs_no_request_and_no_network(hub: Hub) -> None:
    first = resolve(SOURCE, COMMIT)
    hub.seen.clear()
    assert resolve(SOURCE, COMMIT) == first
    assert hub.seen == []
    hub.down = 503
    assert resolve(SOURCE, COMMIT, offline=True) == first


def test_progress_hears_of_every_byte(hub: Hub, model_files: dict[str, bytes]) -> None:
    steps: list[tuple[str, int, int]] = []

    class Ear:
        def step(self, message: str, done: int = 0, total: int = 0) -> None:
            steps.append((message, done, total))

    resolve(SOURCE, COMMIT, progress=Ear())
    size = len(model_files["model.safetensors"])
    assert (f"fetch {SOURCE}", size, size) in steps


def test_a_connection_cut_half_way_is_resumed_within_one_call(hub: Hub, model_files: dict[str, bytes]) -> None:
    hub.cut["model.safetensors"] = [30_000]
    found = resolve(SOURCE, COMMIT)
    assert found.files["model.safetensors"] == sha256(model_files["model.safetensors"])
    assert hub.asked("bytes=30000-")


def test_a_second_run_goes_on_where_a_failed_one_stopped(hub: Hub, model_files: dict[str, bytes]) -> None:
    hub.cut["model.safetensors"] = [30_000, *[0] * 5]
    assert "can't be reached" in str(fault(SOURCE))
    hub.seen.clear()
    found = resolve(SOURCE, COMMIT)
    assert found.files["model.safetensors"] == sha256(model_files["model.safetensors"])
    assert [line for line in hub.asked("model.safetensors") if line.startswith("GET")] == [
        f"GET /{REPO}/resolve/{COMMIT}/model.safetensors bytes=30000-"
    ]
    assert not hub.asked("vocab.txt")


def test_a_partial_file_with_wrong_bytes_is_caught_by_its_digest(hub: Hub, tmp_path: Path) -> None:
    hub.cut["model.safetensors"] = [30_000, *[0] * 5]
    fault(SOURCE)
    (partial,) = (tmp_path / "hub").rglob("*.resumable")
    with partial.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff" * 8)
    error = fault(SOURCE)
    assert "model.safetensors is damaged" in error.message and "delete" in error.fix
    Path(error.fix.split()[1]).unlink()
    assert resolve(SOURCE, COMMIT).kind == "safetensors"


def test_a_partial_file_longer_than_the_whole_is_begun_anew(hub: Hub, tmp_path: Path) -> None:
    hub.cut["model.safetensors"] = [30_000, *[0] * 5]
    fault(SOURCE)
    (partial,) = (tmp_path / "hub").rglob("*.resumable")
    partial.write_bytes(b"x" * 10_000_000)
    assert resolve(SOURCE, COMMIT).kind == "safetensors"


def test_two_runs_at_once_fetch_the_weights_once(hub: Hub) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: resolve(SOURCE, COMMIT), range(2))
    assert one == other
    assert len([line for line in hub.asked("model.safetensors") if line.startswith("GET")]) == 1


def test_a_cache_filled_by_an_older_client_is_used_offline(hub: Hub, tmp_path: Path) -> None:
    first = resolve(SOURCE, COMMIT)
    (trees,) = (tmp_path / "hub").rglob("trees")
    shutil.rmtree(trees)
    huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    assert resolve(SOURCE, COMMIT, offline=True) == first


@pytest.mark.parametrize("revision", ["main", None])
def test_a_revision_that_can_move_is_refused_and_the_fix_names_the_commit(hub: Hub, revision: str | None) -> None:
    error = fault(SOURCE, revision)
    assert f"revision: {COMMIT}" in error.fix
    assert not hub.asked("/resolve/")


def test_a_moving_revision_offline_still_says_what_to_write(hub: Hub) -> None:
    assert "40 hex digits" in fault(SOURCE, "main", offline=True).fix


def test_sharded_safetensors_are_found_through_their_index(hub: Hub, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    files = hub.repos[REPO]
    del files["model.safetensors"]
    shards = {f"model-{i}-of-2.safetensors": save({f"layer.{i}": torch.full((5000,), float(i))}) for i in (1, 2)}
    weight_map = {"layer.1": "model-1-of-2.safetensors", "layer.2": "model-2-of-2.safetensors"}
    files |= shards | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    found = resolve(SOURCE, COMMIT)
    assert found.weights == tuple(shards)
    assert set(tensors(found)) == {"layer.1", "layer.2"}
    assert "model.safetensors.index.json" in found.files
    assert resolve(SOURCE, COMMIT, offline=True) == found


def test_a_bin_is_fetched_only_where_there_are_no_safetensors(hub: Hub) -> None:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({"embeddings.LayerNorm.gamma": torch.ones(6000)}, buffer)
    hub.repos[REPO]["pytorch_model.bin"] = buffer.getvalue()
    assert resolve(SOURCE, COMMIT).kind == "safetensors"
    assert not hub.asked("pytorch_model.bin")
    hub.repos["acme/old"] = {n: c for n, c in hub.repos[REPO].items() if not n.endswith(".safetensors")}
    found = resolve("hf:acme/old", COMMIT)
    assert found.weights == ("pytorch_model.bin",)
    assert list(tensors(found)) == ["embeddings.LayerNorm.weight"]


def test_a_gated_repository_says_how_to_get_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(REPO)
    for token, status in ((None, "401"), ("hf_wrong", "403")):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        error = fault(SOURCE)
        assert f"refuses access ({status})" in error.message
        assert f"{hub.url}/{REPO}" in error.fix and "HF_TOKEN" in error.fix
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert resolve(SOURCE, COMMIT).kind == "safetensors"


def test_an_unknown_repository_an_unknown_commit_and_a_bad_name_are_told_apart(hub: Hub) -> None:
    assert "no such repository" in fault("hf:acme/nothing").message
    assert "no revision 'ffff" in fault(SOURCE, "f" * 40).message
    assert "no revision 'mian'" in fault(SOURCE, "mian").message
    for name in ("hf:tiny-bert", "hf:a/b/c", "hf:../etc", "hf:a--b/c..d", "hf:"):
        assert "not a repository name" in fault(name).message


def test_a_hub_that_is_down_or_gone_is_named_with_what_to_check(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = 503
    assert "the hub answered 503" in fault(SOURCE).message
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    error = fault(SOURCE)
    assert "http://127.0.0.1:9 can't be reached" in error.message and "HF_ENDPOINT" in error.fix


def test_a_proxys_login_page_in_place_of_the_hub_is_recognised(hub: Hub) -> None:
    hub.portal = b"<html>Please sign in</html>"
    assert "does not answer as a hub does" in fault(SOURCE).message
    hub.portal, hub.down = b"", 404
    assert "does not answer as a hub does" in fault(SOURCE).message


def test_offline_without_a_cached_checkpoint_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "this run is offline" in fault(SOURCE, offline=True).message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "this run is offline" in fault(SOURCE).message
    assert hub.seen == []


def test_offline_with_half_a_checkpoint_in_the_cache_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut["model.safetensors"] = [30_000, *[0] * 5]
    fault(SOURCE)
    assert "this run is offline" in fault(SOURCE, offline=True).message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "this run is offline" in fault(SOURCE).message


def test_a_listed_file_that_the_hub_lost_is_named(hub: Hub) -> None:
    hub.missing.add("vocab.txt")
    error = fault(SOURCE)
    assert "lists a file that it doesn't have" in error.message and "vocab.txt" in error.message


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (("config.json",), "no config.json"),
        (("vocab.txt",), "no tokenizer"),
        (("model.safetensors",), "no weights that can be read"),
    ],
)
def test_a_repository_without_an_essential_file_is_refused(hub: Hub, gone: tuple[str, ...], message: str) -> None:
    for name in gone:
        del hub.repos[REPO][name]
    error = fault(SOURCE)
    assert message in error.message
    if "weights" in message:
        assert "tf_model.h5" in error.message


def test_a_full_disk_says_which_cache_to_move(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    error = fault(SOURCE)
    assert "no space left" in error.message and "HF_HOME" in error.fix


def test_a_token_is_not_sent_to_another_host(
    hub: Hub, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve({REPO: dict(model_files)}) as cdn:
        hub.redirect = f"{cdn.url}/{REPO}/resolve/{COMMIT}/"
        found = resolve(SOURCE, COMMIT)
        assert found.files["model.safetensors"] == sha256(model_files["model.safetensors"])
        assert cdn.asked("GET") and set(cdn.tokens) == {None}
        assert "Bearer hf_secret" in hub.tokens


def test_the_clients_own_environment_variables_are_honoured_and_telemetry_is_off(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys; from medcompile.sources import resolve; c = resolve(sys.argv[1], sys.argv[2]);"
        "print(c.folder); from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code, SOURCE, COMMIT], env=env, capture_output=True, text=True, check=True
    )
    folder, telemetry, heavy = ran.stdout.split("\n")[:3]
    assert Path(folder).is_relative_to(tmp_path / "home") and (telemetry, heavy) == ("True", "[]")
    assert ran.stderr == ""
    assert all("torch/" not in agent for agent in hub.agents) and not hub.asked("agent")
