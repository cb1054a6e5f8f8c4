from __future__ import annotations

import json
from typing import Any

import pytest

from medcompile.serve.batch_lines import (
    ITEM_BYTES,
    Answered,
    Refused,
    Request,
    answer_line,
    check,
    digest,
    parsed,
    refused_line,
)
from medcompile.serve.files import Record

PLANTED = "Quokkaville"
GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}
URLS = ["/v1/embeddings", "/v1/classify"]


def read(line: Any) -> Request | Refused:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    return parsed(Record(3, 7, len(data), data), URLS)


def test_a_good_line_is_what_it_asks() -> None:
    assert read(GOOD) == Request("a", "/v1/embeddings", {"input": "x"}, 1)


@pytest.mark.parametrize(
    ("line", "custom_id", "code"),
    [
        (b"{", None, "invalid_json_line"),
        (b'"\xff"', None, "invalid_json_line"),
        (b'{"custom_id": "\\ud800"}', None, "invalid_json_line"),
        (b"[" * 100_000, None, "invalid_json_line"),
        (b'{"a": NaN}', None, "invalid_json_line"),
        ([1], None, "invalid_json_line"),
        ({**GOOD, "custom_id": 4}, None, "missing_required_parameter"),
        ({**GOOD, "custom_id": ""}, None, "missing_required_parameter"),
        ({**GOOD, "custom_id": "x" * 513}, None, "missing_required_parameter"),
        ({**GOOD, "method": "GET"}, "a", "invalid_method"),
        ({**GOOD, "url": f"/v1/{PLANTED}"}, "a", "invalid_url"),
        ({**GOOD, "url": [PLANTED]}, "a", "invalid_url"),
        ({**GOOD, "body": PLANTED}, "a", "missing_required_parameter"),
        ({**GOOD, "body": {"stream": True}}, "a", "invalid_request"),
    ],
)
def test_a_bad_line_is_told_by_its_place_and_never_quoted(line: Any, custom_id: str | None, code: str) -> None:
    found = read(line)
    assert isinstance(found, Refused)
    assert (found.custom_id, found.code) == (custom_id, code)
    assert "line 7" in found.message and PLANTED not in found.message


@pytest.mark.parametrize(
    ("body", "items"),
    [
        ({"input": ["a", "b", "c"]}, 3),
        ({"documents": ["a", "b"], "query": "c"}, 2),
        ({"prompt": "a", "n": 5}, 5),
        ({"input": "x" * (3 * ITEM_BYTES)}, 3),
        ({"input": []}, 1),
        ({"n": -4}, 1),
    ],
)
def test_a_request_counts_for_as_many_items_as_it_holds_or_is_large(body: dict[str, Any], items: int) -> None:
    found = read({**GOOD, "body": body})
    assert isinstance(found, Request) and found.items == items


def test_an_answers_line_has_openais_shape() -> None:
    line = answer_line("batch_req_ab_000000000003", Request('é " \\', "/v1/x", {}), Answered(200, b'{"data":[1.5]}'))
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    told = json.loads(line)
    assert told.pop("id").startswith("batch_req_ab_000000000003_")
    response = {"status_code": 200, "request_id": "req_ab_000000000003", "body": {"data": [1.5]}}
    assert told == {"custom_id": 'é " \\', "response": response, "error": None}


def test_a_refused_line_has_no_response_and_an_error_with_a_code() -> None:
    told = json.loads(refused_line("batch_req_ab_000000000003", Refused(None, "invalid_json_line", "line 7 is not")))
    assert told["custom_id"] is None and told["response"] is None
    assert told["error"] == {"code": "invalid_json_line", "message": "line 7 is not"}


def test_a_line_is_known_again_and_whether_it_failed() -> None:
    its_id = "batch_req_ab_000000000003"
    request = Request("a", "/v1/x", {})
    assert check(answer_line(its_id, request, Answered(200, b"{}")), its_id, "a") is False
    assert check(answer_line(its_id, request, Answered(404, b"{}")), its_id, "a") is True
    assert check(refused_line(its_id, Refused("a", "c", "m")), its_id, "a") is True


def test_no_wrong_bit_of_a_line_goes_unseen() -> None:
    its_id = "batch_req_ab_000000000003"
    line = answer_line(its_id, Request("a", "/v1/x", {}), Answered(200, b'{"data":"chest"}'))
    for bit in range(8 * len(line)):
        broken = bytearray(line)
        broken[bit // 8] ^= 1 << bit % 8
        assert check(bytes(broken), its_id, "a") is None
    for length in range(len(line)):
        assert check(line[:length], its_id, "a") is None


def test_a_line_of_another_place_or_custom_id_is_not_taken() -> None:
    its_id = "batch_req_ab_000000000003"
    line = answer_line(its_id, Request("a", "/v1/x", {}), Answered(200, b"{}"))
    assert check(line, "batch_req_ab_000000000004", "a") is None
    assert check(line, "batch_req_ac_000000000003", "a") is None
    assert check(line, its_id, "b") is None


def test_digests_are_the_same_for_the_same_custom_id_alone() -> None:
    assert digest("a", 1) == digest("a", 2) != digest("b", 1)
    assert len({digest(None, 1), digest(None, 2), digest("1", 1)}) == 3
