"""The guard and the entrance: who is let in to what, and what every answer carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcompile.errors import UsageError
from medcompile.serve.asgi import App, Receive, Scope, Send
from medcompile.serve.entrance import Entrance
from medcompile.serve.guard import PURPOSES, Guard, Rules, check_binding, role_of
from medcompile.serve.keys import ADMIN, INFERENCE, METRICS, Key, Keyring, digest, edited, new_key
from medcompile.serve.rates import Rate, Rates

pytestmark = pytest.mark.anyio

PLANTED = "Ann-Planted-61"
Keys = dict[str, str]


async def told(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that says who it was asked by."""
    state = scope["state"]
    body = f"{state['caller'].name} {state['purpose']} {state['request_id']}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """The file's keys, by name."""
    fresh = {name: new_key() for name in ("ward", "prometheus", "boss", "slow", "over")}
    with edited(tmp_path / "keys") as held:
        held += [
            Key("ward", (INFERENCE,), digest(fresh["ward"]), 0),
            Key("prometheus", (METRICS,), digest(fresh["prometheus"]), 0),
            Key("boss", (ADMIN,), digest(fresh["boss"]), 0),
            Key("slow", (INFERENCE,), digest(fresh["slow"]), 0, rate=Rate(60, 2)),
            Key("over", (ADMIN,), digest(fresh["over"]), 0, expires=1),
        ]
    return fresh


def client(app: App, base_url: str = "http://localhost:8000") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base_url)


def guarded(tmp_path: Path, rules: Rules | None = None) -> httpx.AsyncClient:
    return client(Entrance(Guard(told, Keyring(tmp_path / "keys"), rules)))


def nameless(rules: Rules | None = None, base_url: str = "http://localhost:8000") -> httpx.AsyncClient:
    return client(Entrance(Guard(told, None, rules)), base_url)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("ward", "/v1/embeddings", 200),
        ("ward", "/metrics", 403),
        ("ward", "/admin", 403),
        ("prometheus", "/metrics", 200),
        ("prometheus", "/v1/models", 403),
        ("boss", "/metrics", 200),
        ("boss", "/v1/models", 200),
        ("boss", "/anything", 200),
        ("over", "/v1/models", 401),
        ("ward", "/health/ready", 200),
    ],
)
async def test_a_key_opens_the_routes_of_its_roles(
    tmp_path: Path, keys: Keys, name: str, path: str, status: int
) -> None:
    async with guarded(tmp_path) as asked:
        assert (await asked.get(path, headers=bearer(keys[name]))).status_code == status


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic KEY",
        "KEY",
        "bearer wrong",
        "Bearer KEYx",
        "Bearer \xff",
        "Bearer KEY KEY",
    ],
)
async def test_without_a_valid_key_all_but_health_and_the_document_is_refused(
    tmp_path: Path, keys: Keys, header: str
) -> None:
    headers = {"Authorization": header.replace("KEY", keys["ward"]).encode("latin-1")}
    async with guarded(tmp_path) as asked:
        for path in ("/v1/embeddings", "/v1/models", "/metrics", "/admin", "/", "/health", "/health/live/"):
            answer = await asked.get(path, headers=headers)  # type: ignore[arg-type]
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key" and keys["ward"] not in answer.text
        for path in ("/health/live", "/health/ready", "/openapi.json", "/docs"):
            assert (await asked.get(path, headers=headers)).status_code == 200  # type: ignore[arg-type]
    async with guarded(tmp_path, Rules(pages=False)) as asked:
        assert (await asked.get("/openapi.json")).status_code == (await asked.get("/docs")).status_code == 401


async def test_the_scheme_of_a_key_is_taken_in_any_case(tmp_path: Path, keys: Keys) -> None:
    async with guarded(tmp_path) as asked:
        assert (await asked.get("/v1/models", headers={"authorization": f"bEaReR  {keys['ward']}"})).text[:4] == "ward"


async def test_a_rate_holds_for_its_key_alone_and_says_when_to_come_again(tmp_path: Path, keys: Keys) -> None:
    now_s = [0.0]
    async with guarded(tmp_path, Rules(rates=Rates(lambda: now_s[0]))) as asked:
        first = await asked.get("/v1/models", headers=bearer(keys["slow"]))
        second = await asked.get("/v1/models", headers=bearer(keys["slow"]))
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert second.headers["x-ratelimit-remaining-requests"] == "0"
        third = await asked.get("/v1/models", headers=bearer(keys["slow"]))
        assert third.status_code == 429 and third.headers["retry-after"] == "1"
        assert third.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await asked.get("/v1/models", headers=bearer(keys["ward"]))).status_code == 200
        assert (await asked.get("/health/live", headers=bearer(keys["slow"]))).status_code == 200
        now_s[0] = 1.0
        assert (await asked.get("/v1/models", headers=bearer(keys["slow"]))).status_code == 200


# ---- a server without keys


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "LOCALHOST"])
async def test_without_keys_this_machine_may_ask_and_is_no_admin(host: str) -> None:
    async with nameless() as asked:
        answer = await asked.get("/v1/models", headers={"host": host})
        assert answer.status_code == 200 and answer.text.startswith("anonymous ")
        assert (await asked.get("/metrics")).status_code == 200
        assert (await asked.get("/admin")).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.7", "", "[::2]"]
)
async def test_a_name_that_was_bound_anew_to_this_machine_is_refused(host: str) -> None:
    async with nameless() as asked:
        answer = await asked.get("/v1/models", headers={"host": host})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_known"
    async with nameless(Rules(hosts=("evil.example",))) as asked:
        assert (await asked.get("/v1/models", headers={"host": "evil.example:1"})).status_code == 200


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"])
async def test_a_proxy_in_front_of_a_server_without_keys_is_refused(name: str, tmp_path: Path, keys: Keys) -> None:
    async with nameless() as asked:
        assert (await asked.get("/v1/models", headers={name: "10.0.0.1"})).json()["error"]["code"] == "keys_needed"
    async with guarded(tmp_path) as asked:  # with keys it is as good as any client
        assert (await asked.get("/v1/models", headers=bearer(keys["ward"]) | {name: "10.0.0.1"})).status_code == 200


async def test_a_web_page_of_another_origin_may_not_ask_and_cors_is_closed(tmp_path: Path, keys: Keys) -> None:
    evil = {"origin": "https://evil.example"}
    async with nameless() as asked, guarded(tmp_path) as keyed:
        for sent, headers in ((asked, evil), (keyed, evil | bearer(keys["ward"]))):
            answer = await sent.post("/v1/embeddings", headers=headers, content=b"{}")
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "cross_origin"
            assert not any(name.startswith("access-control") for name in answer.headers)
            assert (await sent.options("/v1/embeddings", headers=headers)).status_code == 403
        assert (await asked.get("/v1/models", headers={"origin": "http://localhost:8000"})).status_code == 200
        for odd in ("null", "http://[", "://", "localhost:8000"):
            assert (await asked.get("/v1/models", headers={"origin": odd})).status_code == 403
    async with nameless(Rules(origins=("https://good.example",))) as asked:
        assert (await asked.get("/v1/models", headers={"origin": "https://good.example"})).status_code == 200


async def test_a_websocket_is_closed_at_once() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    await Guard(told, None)({"type": "websocket", "headers": [], "path": "/v1/x"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---- purposes, ids, headers


async def test_a_purpose_is_one_of_the_codes_and_may_be_required(tmp_path: Path, keys: Keys) -> None:
    headers = bearer(keys["ward"])
    async with guarded(tmp_path) as asked:
        assert (await asked.get("/v1/models", headers=headers | {"X-Purpose-Of-Use": "treat"})).text.split()[
            1
        ] == "TREAT"
        wrong = await asked.get("/v1/models", headers=headers | {"X-Purpose-Of-Use": PLANTED})
        assert wrong.json()["error"]["code"] == "purpose_not_known" and PLANTED not in wrong.text
    async with guarded(tmp_path, Rules(purpose_required=True)) as asked:
        assert (await asked.get("/v1/models", headers=headers)).json()["error"]["code"] == "purpose_missing"
        assert (await asked.get("/metrics", headers=bearer(keys["prometheus"]))).status_code == 200
    assert all(code.isalpha() and code.isupper() for code in PURPOSES)


async def test_a_request_id_is_a_uuid_and_a_clients_own_only_where_it_is_one() -> None:
    own = "8B0C9A36-9B1E-4B4C-9A70-0E3D8C1C5F6A"
    async with nameless() as asked:
        mine = await asked.get("/v1/models", headers={"X-Request-ID": own})
        assert mine.headers["x-request-id"] == own.lower() == mine.text.split()[-1]
        for wrong in (PLANTED, own + "0", "", own[:-1] + "é"):
            other = (await asked.get("/v1/models", headers={"X-Request-ID": wrong.encode()})).headers["x-request-id"]  # type: ignore[arg-type]
            assert len(other) == 36 and PLANTED not in other


@pytest.mark.parametrize("path", ["/v1/models", "/admin", "/health/live"])
async def test_every_answer_refusals_too_carries_the_headers_that_browsers_heed(path: str) -> None:
    async with nameless() as asked:
        headers = (await asked.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert "default-src 'none'" in headers["content-security-policy"] and headers["x-frame-options"] == "DENY"
    assert "strict-transport-security" not in headers
    async with nameless(base_url="https://localhost") as asked:
        assert "max-age" in (await asked.get(path)).headers["strict-transport-security"]


@given(
    path=st.text(max_size=30), key=st.binary(max_size=40), host=st.binary(max_size=40), origin=st.binary(max_size=40)
)
def test_no_request_makes_the_guard_fall_over(path: str, key: bytes, host: bytes, origin: bytes) -> None:
    import asyncio

    statuses: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        return {"type": "http.request"}

    headers = [(b"authorization", b"Bearer " + key), (b"host", host), (b"origin", origin)]
    scope = {"type": "http", "method": "GET", "path": "/" + path, "headers": headers}
    asyncio.run(Entrance(Guard(told, None))(scope, receive, send))
    assert statuses and statuses[0] in (200, 403)


# ---- the address


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"])
def test_this_machines_own_address_needs_no_keys(host: str) -> None:
    assert check_binding(host, keys=False, tls=False) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.7", "192.168.1.1", "8.8.8.8", "0"])
def test_an_address_that_others_reach_needs_keys_and_is_warned_of_without_tls(host: str) -> None:
    with pytest.raises(UsageError, match="no keys") as raised:
        check_binding(host, keys=False, tls=True)
    assert "keys add" in raised.value.fix
    assert "without TLS" in check_binding(host, keys=True, tls=False)
    assert check_binding(host, keys=True, tls=True) == ""


@pytest.mark.parametrize("host", ["no such host", "x" * 300, "999.1.1.1"])
def test_an_address_that_is_none_is_told(host: str) -> None:
    with pytest.raises(UsageError, match="no such address"):
        check_binding(host, keys=False, tls=False)


def test_a_path_that_is_not_known_needs_the_highest_role() -> None:
    assert role_of("/metrics") == METRICS and role_of("/v1/models") == INFERENCE
    for path in ("/", "/metrics/", "/v1", "//v1/x", "/V1/models", "/v2/x", "/admin", "/%2e/metrics"):
        assert role_of(path) == ADMIN
