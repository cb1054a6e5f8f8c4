"""Errors: OpenAI's shape, the right status, the way between processes, and no word of what was sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcompile import errors
from medcompile.errors import BackendError, CacheFull, InputError, MedcompileError, ProfileError, UsageError
from medcompile.serve import failures
from medcompile.serve.calls import CALLS
from medcompile.serve.failures import BadRequest, Fault, QueueFull, WorkerDown
from medcompile.serve.worker_decoder import discreet
from tests.tiny import PLANTED


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("a", fix="b"), 400, "invalid_request_error"),
        (UsageError("a"), 400, "invalid_request_error"),
        (ProfileError("a"), 400, "invalid_request_error"),
        (CacheFull("a"), 400, "invalid_request_error"),
        (QueueFull("a", retry_after_s=3), 429, "rate_limit_error"),
        (WorkerDown("a"), 503, "server_error"),
        (BackendError("a"), 500, "server_error"),
        (KeyError("a"), 500, "server_error"),
    ],
)
def test_every_error_has_a_status_and_openais_shape(error: Exception, status: int, kind: str) -> None:
    told = failures.body_of(error)["error"]
    assert failures.status_of(error) == status
    assert told["type"] == kind
    assert set(told) == {"message", "type", "param", "code"}


def test_the_words_of_a_bug_or_of_a_library_are_not_told() -> None:
    for error in (KeyError(PLANTED), BackendError(PLANTED), MedcompileError(PLANTED)):
        assert PLANTED not in str(failures.body_of(error))
    assert PLANTED not in str(failures.sent(ValueError(PLANTED)))


def test_retry_after_is_whole_seconds_and_one_at_least() -> None:
    assert failures.headers_of(QueueFull("a", retry_after_s=0.2)) == {"Retry-After": "1"}
    assert failures.headers_of(QueueFull("a", retry_after_s=4.4)) == {"Retry-After": "4"}
    assert failures.headers_of(BadRequest("a")) == {}


@pytest.mark.parametrize("kind", [InputError, UsageError, CacheFull, errors.BundleError, errors.OverBudgetError])
def test_an_error_crosses_from_worker_to_server_as_it_is(kind: type[MedcompileError]) -> None:
    there = failures.rebuilt(failures.sent(kind("what", fix="do")))
    assert type(there) is kind
    assert (there.message, there.fix) == ("what", "do")


@pytest.mark.parametrize("name", ["", "Problem", "RecipeError", "__builtins__", "KeyError", "ClassVar"])
def test_a_worker_can_name_no_other_class(name: str) -> None:
    assert isinstance(failures.rebuilt({"type": name, "message": "m", "fix": ""}), Fault)


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.just(PLANTED)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([PLANTED, "model", "input", "messages", "role", "type", "url"]), inner),
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(CALLS)), _JSON)
def test_whatever_is_sent_is_checked_or_refused_without_being_repeated(url: str, body: Any) -> None:
    try:
        CALLS[url].checked(body)
    except BadRequest as error:
        assert PLANTED not in str(failures.body_of(error))


def test_a_misspelled_parameter_is_met_with_the_right_name() -> None:
    with pytest.raises(BadRequest, match=r"did you mean temperature\?"):
        CALLS["/v1/completions"].checked({"model": "m", "prompt": "x", "temprature": 1})


def test_the_parameter_is_named_by_its_path() -> None:
    with pytest.raises(BadRequest) as caught:
        CALLS["/v1/chat/completions"].checked({"model": "m", "messages": [{"role": "user", "content": 5}]})
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages.0.content")


def test_a_format_or_a_template_that_refuses_is_told_without_the_clients_words() -> None:
    schema = InputError(f'response_format can\'t be used: Unimplemented keys: ["uniqueItems"] in {PLANTED}', fix="f")
    told = discreet(schema, "").message
    assert told == "response_format can't be used; look at: uniqueItems"
    own = "Roles must alternate"
    template = f"{{{{ raise_exception('{own}') }}}}"
    begin = "the chat template refuses this conversation"
    assert discreet(InputError(f"{begin}: {own}"), template).message == f"{begin}: {own}"
    assert discreet(InputError(f"{begin}: no {PLANTED}"), template).message == begin
    assert discreet(InputError("the prompt has 3 tokens: too many"), "").message.endswith("too many")
