"""Scrubbing: what is found, what clinical text keeps, and that every offset leads back to where it came from."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.errors import InputError, UsageError
from medcompile.serve.scrub import KINDS, Scrubbed, Scrubber, read_names, replace, united
from medcompile.serve.scrub_stream import ScrubbedStream

Spans = list[tuple[int, int, str]]


@pytest.fixture(scope="module")
def scrubber() -> Scrubber:
    pytest.importorskip("presidio_analyzer")
    return Scrubber(names=("Zyx Qwerty",))


# ---- offsets


@st.composite
def texts_and_spans(draw: st.DrawFn) -> tuple[str, Spans]:
    text = draw(st.text(min_size=1, max_size=60))
    pairs = draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(0, len(text))), max_size=6))
    return text, [(min(p), max(p), draw(st.sampled_from(KINDS))) for p in pairs]


@given(case=texts_and_spans())
def test_every_character_that_was_kept_leads_back_to_itself(case: tuple[str, Spans]) -> None:
    text, spans = case
    scrubbed = replace(text, united(spans))
    for at in range(len(scrubbed.text)):
        start, end = scrubbed.original(at, at + 1)
        if not scrubbed.touches(at, at + 1):
            assert (end - start, text[start]) == (1, scrubbed.text[at])
        else:
            (one,) = [r for r in scrubbed.replaced if r.new_start <= at < r.new_end]
            assert (start, end) == (one.start, one.end)


@given(case=texts_and_spans(), data=st.data())
def test_a_span_leads_back_to_all_that_it_stands_for_and_order_is_kept(
    case: tuple[str, Spans], data: st.DataObject
) -> None:
    text, spans = case
    scrubbed = replace(text, united(spans))
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(scrubbed.text))] * 2)))
    start, end = scrubbed.original(a, b)
    assert 0 <= start <= end <= len(text)
    rebuilt, at = [], 0
    for one in scrubbed.replaced:  # the original, scrubbed by hand within that span, is the scrubbed span widened
        rebuilt += [text[at : one.start], f"[{one.kind}]"]
        at = one.end
    assert "".join([*rebuilt, text[at:]]) == scrubbed.text
    if a < b and not scrubbed.touches(a, b):
        assert text[start:end] == scrubbed.text[a:b]


@given(case=texts_and_spans())
def test_nothing_that_was_found_is_left_and_nothing_else_is_taken(case: tuple[str, Spans]) -> None:
    text, spans = case
    covered = {at for start, end, _ in spans for at in range(start, end)}
    scrubbed = replace(text, united(spans))
    kept = [at for at in range(len(text)) if not any(r.start <= at < r.end for r in scrubbed.replaced)]
    assert set(range(len(text))) - set(kept) == covered
    joined = "".join(f"[{r.kind}]" for r in scrubbed.replaced)
    assert len(scrubbed.text) == len(kept) + len(joined)


# ---- what is found


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("Ann Planted, 61, was admitted.", ["Ann", "Planted"]),
        ("Patient: PLANTED, ANN  DOB: 1/2/1950", ["PLANTED", "ANN", "1950"]),
        ("Patient Vesna Planted reports pain", ["Vesna", "Planted"]),
        ("seen by Dr. O'Brien and Mrs Smith-Jones", ["O'Brien", "Smith-Jones"]),
        ("Signed by: Joan M. Müller, MD", ["Joan", "Müller"]),
        ("Dear Ms Planted,", ["Planted"]),
        ("referred by: van der Berg", []),
        ("zyx  qwerty called; QWERTY, Zyx and Zyx Qwerty's mother", ["zyx", "qwerty", "QWERTY", "Zyx", "Qwerty"]),
        ("MRN 00123456, account number: AC-99817, NHS number 943 476 5919", ["00123456", "AC-99817", "943 476 5919"]),
        ("phone 999-200-1234, +1 223 456 7890 or 212.555.0187", ["200-1234", "456 7890", "555.0187"]),
        ("SSN 536-22-1234", ["536-22-1234"]),
        ("call (212) 555-0187 or ann@ward.hospital.local", ["555-0187", "ann@ward"]),
        (
            "on 03/04/2024, 2024-03-04, March 3rd, 2024, 3 May and 20240304",
            ["03/04", "2024-03", "March", "3 May", "20240304"],
        ),
        ("lives at 12 Main Street, Apt 4, Boston, MA 02115", ["12 Main", "Boston", "02115"]),
        ("a 93-year-old man, aged 101", ["93", "101"]),
        ("https://ehr.example/p/12 from 10.1.2.3", ["ehr.example", "10.1.2.3"]),
        ("transferred from Mercy General Hospital", ["Mercy General"]),
        ("card 4111 1111 1111 1111, VIN 1HGCM82633A004352", ["4111 1111", "1HGCM82633A004352"]),
    ],
)
def test_what_identifies_a_person_is_taken_out(scrubber: Scrubber, text: str, gone: Sequence[str]) -> None:
    scrubbed = scrubber.scrub(text)
    assert not [piece for piece in gone if piece in scrubbed.text], scrubbed.text
    assert all(one.kind in KINDS for one in scrubbed.replaced)


@pytest.mark.parametrize(
    "text",
    [
        "BP 120/80, HR 72, Hb 11.2 g/dL, SpO2 98%, temp 37.2.",
        "ABG at 0400 7.34/58/71/31; BP 168/112; PT: INR 2.5; VA OU, VA OD; Cont, CT tomorrow. CrCl 168.4.",
        "Motor strength 5/5, reflexes 2+, GCS 15/15.",
        "Started metformin 500 mg b.i.d. for 2 weeks; WBC 12.3 x 10^9/L.",
        "A 61-year-old woman with type 2 diabetes and stage 3 chronic kidney disease.",
        "Patient Health Questionnaire score was 12. Patient Denies chest pain.",
        "Parkinson disease, Crohn's disease, Foley catheter, Doppler ultrasound.",
        "Potassium 4.1 mmol/L, sodium 138 mmol/L, creatinine 1.4 mg/dL; INR 2.5.",
        "HER2 positive, BRCA1 c.68_69delAG, T2N0M0, ICD-10 E11.9, SNOMED 44054006.",
        "",
    ],
)
def test_clinical_text_without_identifiers_stays_as_it_is(scrubber: Scrubber, text: str) -> None:
    assert scrubber.scrub(text).text == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_can_be_scrubbed_and_scrubbing_goes_on_to_find_nothing_new(scrubber: Scrubber, text: str) -> None:
    once = scrubber.scrub(text)
    assert isinstance(once, Scrubbed)
    for one in once.replaced:
        assert once.text[one.new_start : one.new_end] == f"[{one.kind}]"


def test_a_text_that_takes_too_long_is_refused_and_never_let_through(
    scrubber: Scrubber, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in scrubber._analyzer.registry.recognizers:
        monkeypatch.setattr(one, "timeout_s", 1e-9, raising=False)
    with pytest.raises(InputError, match="in time") as raised:
        scrubber.scrub("Ann Planted, 61. " * 2000)
    assert "Planted" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["A" * 100_000, "Aa " * 30_000, "1" * 30_000, "a@" * 30_000, "a." * 30_000, "- " * 50_000]
)
def test_texts_made_to_be_slow_are_not(scrubber: Scrubber, text: str) -> None:
    import time

    began_s = time.process_time()
    scrubber.scrub(text)
    assert time.process_time() - began_s < 10


def test_nothing_is_asked_of_the_network(scrubber: Scrubber, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    fresh = Scrubber()
    assert fresh.scrub("mail ann@planted.example or see planted.example").text.startswith("mail [EMAIL]")


def test_a_finder_of_ones_own_is_heeded() -> None:
    pytest.importorskip("presidio_analyzer")
    mine = Scrubber(finders=[lambda text: [(text.index("Jordan"), text.index("Jordan") + 6, "PERSON")]])
    assert mine.scrub("Jordan improved overnight").text == "[PERSON] improved overnight"


def test_a_model_that_is_not_installed_is_told_and_not_fetched() -> None:
    pytest.importorskip("presidio_analyzer")
    with pytest.raises(UsageError, match="no spaCy model"):
        Scrubber(model="en_core_web_none")


def test_a_list_of_names_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("Zyx Qwerty\n\n  Ann Planted \n")
    assert read_names(tmp_path / "names") == ("Zyx Qwerty", "Ann Planted")
    with pytest.raises(UsageError, match="none"):
        read_names(tmp_path / "none")


# ---- while a text is written

NOTE = (
    "The patient was seen in the morning round and felt better. Mrs Planted-Smith asked about her insulin. "
    "Her son, John Q. Public, 33, lives at 12 Main Street, Boston, MA 02115 and can be reached at (212) 555-0187. "
    "Blood pressure was 120/80. MRN: 00123456. Dictated by: Vesna Planted. Follow up on March 3rd, 2024 in the clinic, "
    "with potassium and creatinine before it, and no change of the other medicines until then."
)
GONE = ("Planted", "Public", "Main Street", "02115", "555-0187", "00123456", "Vesna", "March")


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 40), min_size=30, max_size=400))
def test_a_text_that_comes_in_pieces_is_scrubbed_as_a_whole_one_is(scrubber: Scrubber, cuts: list[int]) -> None:
    stream, out, at = ScrubbedStream(scrubber), "", 0
    for size in cuts:
        out += stream.feed(NOTE[at : at + size])
        at += size
        assert not [piece for piece in GONE if piece in out]
    out += stream.feed(NOTE[at:]) + stream.finish()
    assert out == scrubber.scrub(NOTE).text


def test_a_stream_gives_what_it_can_before_its_end(scrubber: Scrubber) -> None:
    stream = ScrubbedStream(scrubber)
    early = "".join(stream.feed(word + " ") for word in NOTE.split())
    assert len(early) > len(NOTE) // 2
