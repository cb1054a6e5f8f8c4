"""Who may ask for what: the middleware that turns away before a body is read, and the address that may be listened on.

Sizes and times of bodies are bodies.py's, connections are connections.py's, the record of it all is trail.py's.
"""

from __future__ import annotations

import ipaddress
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from medcompile.errors import UsageError
from medcompile.serve.asgi import App, Message, Receive, Refusal, Scope, Send, has_header, header
from medcompile.serve.keys import ADMIN, ANONYMOUS, INFERENCE, METRICS, Caller, Keyring
from medcompile.serve.rates import Rates

NOBODY = Caller("", frozenset())
"""Who asks an open route without a key."""

PURPOSES = frozenset(
    {
        *("TREAT", "ETREAT", "BTG", "ERTREAT", "CLINTRL", "COC", "CAREMGT", "POPHLTH", "PATRQT", "FAMRQT", "PWATRNY"),
        *("HPAYMT", "CLMATTCH", "COVAUTH", "COVERAGE", "ELIGDTRM", "ELIGVER", "ENROLLM", "MILDCRG", "REMITADV"),
        *("HOPERAT", "DONAT", "FRAUD", "GOV", "HACCRED", "HCOMPL", "HDECD", "HDIRECT", "HDM", "HLEGAL", "HMARKT"),
        *("HOUTCOMS", "HPRGRP", "HQUALIMP", "HSYSADMIN", "HTEST", "LABELING", "MEMADMIN", "METAMGT", "MILCDM"),
        *("PATADMIN", "PATSFTY", "PERFMSR", "RECORDMGT", "SUPNWK", "SYSDEV", "TRAIN", "PUBHLTH", "DISASTER", "THREAT"),
        *("HRESCH", "BIORCH", "CLINTRCH", "CLINTRCHNPC", "CLINTRCHPC", "DSRCH", "POARCH", "PRECLINTRCH", "TRANSRCH"),
    }
)
"""What X-Purpose-Of-Use may say: the codes of HL7 v3 PurposeOfUse. A closed list, as the audit log holds no content."""

_OPEN = frozenset({"/health/live", "/health/ready"})
_PAGES = frozenset({"/docs", "/openapi.json"})
_FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via"})


@dataclass(frozen=True)
class Rules:
    """What an operator may set of it. origins: of web pages that may ask (CORS); none by default.

    hosts: names beside this machine's own under which a server without keys may be asked. purpose_required: inference
    needs the header X-Purpose-Of-Use. pages: /docs and /openapi.json are shown without a key.
    """

    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    purpose_required: bool = False
    pages: bool = True
    rates: Rates = field(default_factory=Rates)


class Guard:
    """Lets a request through with `caller` and `purpose` in the scope's state, or answers it with a Refusal.

    keyring: None where the server has no keys; then everyone is ANONYMOUS, which check_binding() allows on this
    machine's own address alone, and what came through a proxy or from a web page is turned away.
    """

    def __init__(self, app: App, keyring: Keyring | None, rules: Rules | None = None) -> None:
        self._app, self._keyring, self._rules = app, keyring, rules or Rules()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: none is served here
            await send({"type": "websocket.close", "code": 1008})
            return
        state = scope.setdefault("state", {})
        state["caller"], state["purpose"] = NOBODY, ""
        refusal = self._local(scope) or self._known(scope) or self._allowed(scope)
        if refusal is not None:
            await refusal.to(send)
            return
        rate = state["caller"].rate
        if rate is None or _open(scope, self._rules):
            await self._app(scope, receive, send)
            return
        told = _told_rate(rate.per_minute, self._rules.rates.left(state["caller"].name, rate))

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *told]}
            await send(message)

        await self._app(scope, receive, sent)

    def _local(self, scope: Scope) -> Refusal | None:
        """Turns away what a web page sent that was not let to, and what only seems to come from this machine."""
        origin, host = header(scope, b"origin"), header(scope, b"host")
        if origin and origin not in self._rules.origins and origin.partition("://")[2].lower() != host.lower():
            return Refusal(403, "cross_origin", "web pages of other origins may not ask this server")
        if self._keyring is not None:
            return None
        if has_header(scope, _FORWARDED):
            return Refusal(
                403,
                "keys_needed",
                "this server has no keys, so it can't be asked through a proxy (start it with --api-key-file)",
            )
        if not (_is_loopback(_hostname(host)) or _hostname(host) in self._rules.hosts):
            return Refusal(
                403,
                "host_not_known",
                "a server without keys is asked as localhost or 127.0.0.1 alone (start it with --api-key-file)",
            )
        return None

    def _known(self, scope: Scope) -> Refusal | None:
        """Finds the caller. An open route needs none."""
        state = scope["state"]
        if self._keyring is None:
            state["caller"] = ANONYMOUS
            return None
        scheme, _, key = header(scope, b"authorization").partition(" ")
        found = self._keyring.caller(key.strip()) if scheme.lower() == "bearer" and key else None
        if found is not None:
            state["caller"] = found
        elif not _open(scope, self._rules):
            return Refusal(
                401,
                "invalid_api_key",
                "no valid key: send one as Authorization: Bearer KEY (medcompile keys add makes one)",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _allowed(self, scope: Scope) -> Refusal | None:
        """Role, purpose and rate, in this order."""
        if _open(scope, self._rules):
            return None
        caller: Caller = scope["state"]["caller"]
        role = role_of(scope["path"])
        if not caller.may(role):
            return Refusal(403, "role_missing", f"this needs a key with the role {role}", "permission_error")
        purpose = header(scope, b"x-purpose-of-use").strip().upper()
        if purpose and purpose not in PURPOSES:
            return Refusal(
                400, "purpose_not_known", "X-Purpose-Of-Use is a code of HL7 v3 PurposeOfUse, such as TREAT or HRESCH"
            )
        if role == INFERENCE and self._rules.purpose_required and not purpose:
            return Refusal(400, "purpose_missing", "this server needs the header X-Purpose-Of-Use, such as TREAT")
        scope["state"]["purpose"] = purpose
        if caller.rate is None:
            return None
        wait_s = self._rules.rates.take(caller.name, caller.rate)
        if not wait_s:
            return None
        headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
        headers |= {name.decode(): value.decode() for name, value in _told_rate(caller.rate.per_minute, 0)}
        return Refusal(
            429,
            "rate_limit_exceeded",
            f"this key is allowed {caller.rate.per_minute:g} requests a minute",
            "rate_limit_error",
            headers,
        )


def role_of(path: str) -> str:
    """The role that a path needs. What is not known here needs the highest."""
    if path == "/metrics":
        return METRICS
    return INFERENCE if path.startswith("/v1/") else ADMIN


def check_binding(host: str, *, keys: bool, tls: bool) -> str:
    """What to warn of before listening on this address; "" for nothing.

    Raises UsageError for an address that others reach, where there are no keys.
    """
    if _only_loopback(host):
        return ""
    if not keys:
        raise UsageError(
            f"--host {host} is reached from other machines, and this server has no keys",
            fix="medcompile keys add NAME --file keys.jsonl, then --api-key-file keys.jsonl; or --host 127.0.0.1",
        )
    if not tls:
        return f"{host} is reached from other machines without TLS: keys and texts cross the network as they are"
    return ""


def _only_loopback(host: str) -> bool:
    if _is_loopback(host.strip("[]")):
        return True
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host}: no such address", fix="give an IP address, such as 127.0.0.1") from None
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _hostname(host: str) -> str:
    """A Host header without its port, in lower case, an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _open(scope: Scope, rules: Rules) -> bool:
    return scope["path"] in _OPEN or (rules.pages and scope["path"] in _PAGES)


def _told_rate(per_minute: float, left: int) -> list[tuple[bytes, bytes]]:
    told: Mapping[bytes, object] = {
        b"x-ratelimit-limit-requests": f"{per_minute:g}",
        b"x-ratelimit-remaining-requests": left,
    }
    return [(name, str(value).encode()) for name, value in told.items()]
