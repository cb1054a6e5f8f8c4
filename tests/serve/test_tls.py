"""TLS: the server's certificate, and clients that must show theirs."""

from __future__ import annotations

import datetime
import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.command_line import call, spawn
from tests.serve.conftest import ON_CPU
from tests.serve.servers import Server
from tests.tiny import Workshop


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def test_a_server_with_tls_takes_those_alone_whose_certificate_is_known_to_it(small: Workshop, tmp_path: Path) -> None:
    own, key = certificate(tmp_path, "server")
    client, client_key = certificate(tmp_path, "client")
    context = ssl.create_default_context(cafile=str(own))
    context.load_cert_chain(client, client_key)
    tls = ("--tls-cert", own, "--tls-key", key, "--tls-client-ca", client)
    with Server(small.bundle, "--host", "localhost", *ON_CPU, *tls, verify=context) as server:
        assert server.url.startswith("https://localhost:")
        answer = server.post("/v1/embeddings", {"model": "tiny", "input": "x"})
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"]
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health/live", verify=ssl.create_default_context(cafile=str(own)))
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url.replace("https", "http") + "/health/live")


def test_half_of_what_tls_needs_is_told(small: Workshop, tmp_path: Path) -> None:
    own, _ = certificate(tmp_path, "server")
    for options, words in (
        (("--tls-cert", own), "give both --tls-cert and --tls-key"),
        (("--tls-cert", own, "--tls-key", tmp_path / "none"), "no such file"),
    ):
        done = call("serve", small.bundle, *options)
        assert done.exit_code == 2
        assert words in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--port", 70_000), "outside of 0 to 65535"),
        (("--log-level", "loud"), "choose from: DEBUG"),
        (("--audit-key", "k"), "without --audit-log"),
        (("--cache", "sqlite://x", "--cache-ttl", 5), "a cache is memory, or the URL of a Redis"),
        (("--host", "0.0.0.0"), "this server has no keys"),
        (("--api-key-file", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_options_that_can_not_be_say_what_to_give_instead(
    small: Workshop, options: tuple[object, ...], words: str
) -> None:
    done = spawn("serve", small.bundle, *options)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


def test_a_connection_whose_handshake_never_comes_is_closed(small: Workshop, tmp_path: Path) -> None:
    own, key = certificate(tmp_path, "server")
    context = ssl.create_default_context(cafile=str(own))
    arguments = ("--host", "localhost", *ON_CPU, "--tls-cert", own, "--tls-key", key)
    with Server(small.bundle, *arguments, verify=context) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("localhost", port)) as silent:
            silent.settimeout(50)
            began_s = time.monotonic()
            assert silent.recv(1) == b""
            assert time.monotonic() - began_s < 40  # asyncio would wait for a minute
        assert server.http.get("/health/live").status_code == 200
