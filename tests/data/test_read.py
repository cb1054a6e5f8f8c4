"""Reading data: the three formats, digests, limits, overlap, the gate for patient information, and bad files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medcompile import data
from medcompile.errors import DataError, PhiError

SECRET = "Zyxwvut"
"""Stands for a patient's words: no message may ever hold it."""

TEXT = {"text": "text"}
TAGS = {"words": 0, "labels": 1}
SENTENCES = "Wilson\tB-Disease\ndisease\tI-Disease\n.\tO\n\nNo\tO\naspirin\tB-Chemical\n"


def manifest(
    folder: Path, kind: str, fields: dict[str, object], *contents: str | bytes, **more: object
) -> data.Manifest:
    """A manifest of files with those contents, with right digests."""
    paths, digests = [], []
    for number, content in enumerate(contents):
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / f"d{number}").write_bytes(raw)
        paths.append(f"d{number}")
        digests.append(hashlib.sha256(raw).hexdigest())
    keys = {"name": "set", "source": "a test", "licence": "CC0-1.0", "phi": "none", "role": "calibration"}
    keys |= {"format": kind, "fields": fields, "path": paths, "sha256": digests} | more
    (folder / "set.yaml").write_text(yaml.safe_dump(keys))
    return data.load_manifest(folder / "set.yaml")


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts)


def test_jsonl_gives_items_with_ids_documents_and_labels(tmp_path: Path) -> None:
    row = {"key": 7, "note": "No fever.", "kind": True, "visit": "v1"}
    fields = {"id": "key", "text": "note", "label": "kind", "document": "visit"}
    found = data.read(manifest(tmp_path, "jsonl", fields, json.dumps(row) + "\n\n"))
    assert [(i.id, i.text, i.label, i.document) for i in found.items] == [("7", "No fever.", "True", "v1")]
    assert found.role == "calibration"
    with pytest.raises(FrozenInstanceError):
        found.items[0].text = "x"  # type: ignore[misc]


def test_query_and_passage_become_text_and_text_pair(tmp_path: Path) -> None:
    content = json.dumps({"q": "what", "p": "that"}) + "\n"
    item = data.read(manifest(tmp_path, "jsonl", {"query": "q", "passage": "p"}, content)).items[0]
    assert (item.text, item.text_pair) == ("what", "that")


def test_jsonl_may_hold_words_and_labels_as_lists(tmp_path: Path) -> None:
    content = json.dumps({"w": ["a", "b"], "l": ["O", "B-X"]}) + "\n"
    item = data.read(manifest(tmp_path, "jsonl", {"words": "w", "labels": "l"}, content)).items[0]
    assert (item.words, item.labels, item.text) == (("a", "b"), ("O", "B-X"), "a b")


def test_csv_follows_its_header_and_its_quotes(tmp_path: Path) -> None:
    content = '\ufeffid,text,label\r\n1,"two\nlines, and a ""quote""",yes\r\n\r\n2,plain,no\r\n'
    found = data.read(manifest(tmp_path, "csv", {"text": "text", "label": "label"}, content))
    assert [(i.text, i.label) for i in found.items] == [('two\nlines, and a "quote"', "yes"), ("plain", "no")]


def test_a_csv_field_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    found = data.read(manifest(tmp_path, "csv", TEXT, "text\n" + "word " * 60_000 + "\n"))
    assert len(found.items[0].text) == 300_000


def test_conll_sentences_end_at_blank_lines_and_documents_at_docstart(tmp_path: Path) -> None:
    found = data.read(manifest(tmp_path, "conll", TAGS, "-DOCSTART-\tO\n\n" + SENTENCES + "\n-DOCSTART-\tO\nx\tO\n"))
    assert [i.words for i in found.items] == [("Wilson", "disease", "."), ("No", "aspirin"), ("x",)]
    assert found.items[0].labels == ("B-Disease", "I-Disease", "O")
    assert [i.document for i in found.items] == ["d0#1", "d0#1", "d0#2"]


def test_conll_without_docstart_knows_no_documents(tmp_path: Path) -> None:
    assert {i.document for i in data.read(manifest(tmp_path, "conll", TAGS, SENTENCES)).items} == {""}


def test_several_files_are_one_set_in_order(tmp_path: Path) -> None:
    found = data.read(manifest(tmp_path, "jsonl", TEXT, lines("a", "b"), lines("c")))
    assert [i.text for i in found.items] == ["a", "b", "c"]


def test_keep_and_label_map_judge_one_type_alone(tmp_path: Path) -> None:
    kept = data.read(manifest(tmp_path, "conll", TAGS, SENTENCES, keep=["Disease"]))
    assert [i.labels for i in kept.items] == [("B-Disease", "I-Disease", "O"), ("O", "O")]
    mapped = data.read(manifest(tmp_path, "conll", TAGS, SENTENCES, label_map={"Chemical": "O", "Disease": "D"}))
    assert [i.labels for i in mapped.items] == [("B-D", "I-D", "O"), ("O", "O")]
    with pytest.raises(DataError, match="no label of the file is one of those that keep lists: disease"):
        data.read(manifest(tmp_path, "conll", TAGS, SENTENCES, keep=["disease"]))


def test_item_digest_is_of_the_text_alone_with_white_space_normalized(tmp_path: Path) -> None:
    plain = data.read(manifest(tmp_path, "jsonl", TEXT, lines("No  fever.\n ", "No fever.", "No fever!"))).items
    assert plain[0].digest == plain[1].digest != plain[2].digest
    canonical = json.dumps({"text": "No fever."}, separators=(",", ":")).encode()
    assert plain[0].digest == hashlib.sha256(canonical).hexdigest()
    tagged = data.read(manifest(tmp_path, "conll", TAGS, "No\tO\nfever.\tB-Sign\n")).items
    assert tagged[0].digest == plain[0].digest


def test_dataset_digest_sees_texts_labels_and_order(tmp_path: Path) -> None:
    def digest(content: str) -> str:
        return data.read(manifest(tmp_path, "conll", TAGS, content)).digest

    assert digest("a\tO\n") == digest("a\tO\n\n\n")
    assert len({digest("a\tO\n"), digest("a\tB-X\n"), digest("b\tO\n"), digest("a\tO\n\nb\tO\n")}) == 4


def test_limit_takes_an_even_spread_that_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    texts = [f"sentence {i}" for i in range(100)]
    whole = manifest(tmp_path, "jsonl", TEXT, lines(*texts))
    some = data.read(whole, limit=10)
    assert len(some.items) == 10
    order = [i.text for i in data.read(whole).items]
    assert [order.index(i.text) for i in some.items] == sorted(order.index(i.text) for i in some.items)
    assert {i.text for i in some.items} != set(texts[:10])
    ranks = sorted(i.digest for i in data.read(whole).items)
    assert sorted(ranks.index(i.digest) for i in some.items) == list(range(0, 100, 10))
    turned = data.read(manifest(tmp_path, "jsonl", TEXT, lines(*reversed(texts))), limit=10)
    assert {i.text for i in turned.items} == {i.text for i in some.items}
    assert len(data.read(manifest(tmp_path, "jsonl", TEXT, lines("a", "b")), limit=10).items) == 2


def test_without_overlap_drops_and_counts_shared_texts_in_any_role(tmp_path: Path) -> None:
    calibration = data.read(manifest(tmp_path, "jsonl", TEXT, lines("a  b", "c", "d", "e", "f")))
    pairs = json.dumps({"q": "x", "p": "a b"}) + "\n" + json.dumps({"q": "c", "p": "y"}) + "\n"
    evaluation = data.read(manifest(tmp_path, "jsonl", {"query": "q", "passage": "p"}, pairs))
    kept, dropped = data.without_overlap(calibration, evaluation)
    assert dropped == 2
    assert [i.text for i in kept.items] == ["d", "e", "f"]
    assert kept.digest != calibration.digest


def test_without_overlap_leaves_disjoint_data_as_it_is(tmp_path: Path) -> None:
    calibration = data.read(manifest(tmp_path, "jsonl", TEXT, lines("a", "b")))
    evaluation = data.read(manifest(tmp_path, "jsonl", TEXT, lines("c")))
    assert data.without_overlap(calibration, evaluation) == (calibration, 0)


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    dataset = data.read(manifest(tmp_path, "jsonl", TEXT, lines("a", "b", "c")))
    with pytest.raises(DataError, match="3 of 3 calibration items of set also stand in"):
        data.without_overlap(dataset, dataset)


def test_phi_present_stops_before_any_file_is_opened_unless_allowed(tmp_path: Path) -> None:
    gated = manifest(tmp_path, "jsonl", TEXT, lines(SECRET), phi="present")
    with pytest.raises(PhiError) as caught:
        data.read(gated)
    assert "--allow-phi" in caught.value.fix
    assert len(data.read(gated, allow_phi=True).items) == 1
    (tmp_path / "d0").unlink()
    with pytest.raises(PhiError):
        data.read(gated)
    assert data.read(manifest(tmp_path, "jsonl", TEXT, lines("x"), phi="deidentified")).items


def test_another_file_than_the_manifest_describes_is_refused(tmp_path: Path) -> None:
    described = manifest(tmp_path, "jsonl", TEXT, lines("a"))
    (tmp_path / "d0").write_text(lines(SECRET))
    with pytest.raises(DataError, match="is not the file that the manifest describes: its sha256 is") as caught:
        data.read(described)
    assert hashlib.sha256(lines(SECRET).encode()).hexdigest() in str(caught.value)


def test_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    described = manifest(tmp_path, "jsonl", TEXT, lines("a"))
    (tmp_path / "d0").unlink()
    with pytest.raises(DataError, match="no file d0") as caught:
        data.read(described)
    assert "a test" in caught.value.fix


WELL = json.dumps({"text": "fine"})
MALFORMED: dict[str, tuple[str, dict[str, object], str | bytes, str]] = {
    "broken json": ("jsonl", TEXT, f'{WELL}\n{{"text": "{SECRET}\n', "d0:2: is not valid JSON"),
    "json bomb": ("jsonl", TEXT, "[" * 100_000, "d0:1: is not valid JSON"),
    "json list": ("jsonl", TEXT, f'["{SECRET}"]\n', "d0:1: is not a JSON object"),
    "missing key": ("jsonl", TEXT, f'{WELL}\n{{"txt": "{SECRET}"}}\n', "d0:2: has no key 'text'"),
    "text is a number": ("jsonl", TEXT, '{"text": 3}\n', "d0:1: text is not text"),
    "empty text": ("jsonl", TEXT, '{"text": "  "}\n', "d0:1: text is empty"),
    "half a surrogate": ("jsonl", TEXT, f'{{"text": "{SECRET} \\ud800"}}\n', "d0:1: holds half of a surrogate pair"),
    "label is a list": ("jsonl", TEXT | {"label": "l"}, '{"text": "a", "l": []}\n', "d0:1: label is neither"),
    "words are no list": ("jsonl", {"words": "w"}, f'{{"w": "{SECRET}"}}\n', "d0:1: words is not a list of words"),
    "too few labels": (
        "jsonl",
        {"words": "w", "labels": "l"},
        '{"w": ["a", "b"], "l": ["O"]}\n',
        "d0:1: has 1 labels for 2 words",
    ),
    "csv without header": ("csv", TEXT, f"{SECRET},yes\nmore,no\n", "d0:1: the header has no column 'text'"),
    "csv row too long": ("csv", TEXT, f"text\nfine\n{SECRET},x\n", "d0:3: has 2 columns; the header has 1"),
    "csv quotes": ("csv", TEXT, f'text\n"{SECRET}"x\n', "d0:2: is not valid CSV"),
    "csv open quote": ("csv", TEXT, f'text\n"{SECRET}\n', "is not valid CSV"),
    "conll columns": ("conll", TAGS, f"a\tO\n{SECRET}\n", "d0:2: has 1 columns, not 2"),
    "conll one column": ("conll", TAGS, f"{SECRET}\n", "d0:1: has 1 columns, not 2"),
    "conll label": ("conll", TAGS, f"a\tO\n\nb\t{SECRET}\n", "d0:3: has a label that is none of O, B-..., I-..."),
    "conll swapped": ("conll", {"words": 1, "labels": 0}, f"{SECRET}\tO\n", "d0:1: has a label that is none of O"),
    "conll bare B": ("conll", TAGS, "a\tB-\n", "d0:1: has a label that is none of O"),
    "not utf-8": ("jsonl", TEXT, f"{WELL}\n".encode() + SECRET.encode() + b"\xff\n", "d0:2: is not UTF-8 text"),
    "not utf-8 csv": ("csv", TEXT, b"text\nfine\n\xe9\n", "d0:3: is not UTF-8 text"),
    "not utf-8 conll": ("conll", TAGS, b"a\tO\n\xe9\tO\n", "d0:2: is not UTF-8 text"),
    "empty": ("jsonl", TEXT, "", "set: d0 holds no records"),
    "blank": ("conll", TAGS, "\n\n", "set: d0 holds no records"),
    "header only": ("csv", TEXT, "text\n", "set: d0 holds no records"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_told_by_line_and_never_by_its_text(tmp_path: Path, case: str) -> None:
    kind, fields, content, message = MALFORMED[case]
    described = manifest(tmp_path, kind, fields, content)
    for limit in (None, 1):
        with pytest.raises(DataError) as caught:
            data.read(described, limit=limit)
        assert message in str(caught.value)
        assert caught.value.fix
        assert SECRET not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["jsonl", "csv", "conll"]), st.binary(max_size=60), st.booleans())
def test_any_bytes_read_or_raise_data_error_without_the_text(
    tmp_path: Path, kind: str, raw: bytes, headed: bool
) -> None:
    start = {"jsonl": b'{"text": "a"}\n', "csv": b"text\n", "conll": b"a\tO\n"}[kind] if headed else b""
    described = manifest(tmp_path, kind, TAGS if kind == "conll" else TEXT, start + SECRET.encode() + raw)
    try:
        found = data.read(described)
    except DataError as error:
        assert SECRET not in str(error)
    else:
        assert all(len(i.digest) == 64 for i in found.items)
