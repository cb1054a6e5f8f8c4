"""Frames: what was packed comes out, however the bytes are cut on their way."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcompile.errors import BackendError
from medcompile.serve.frames import Frame, Unpacker, packed, received

HEADERS = st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.text(), st.lists(st.booleans())))


@given(st.lists(st.tuples(HEADERS, st.binary(max_size=40)), max_size=6), st.lists(st.integers(1, 50), max_size=30))
def test_frames_come_out_as_they_went_in_wherever_the_bytes_are_cut(
    frames: list[tuple[dict[str, object], bytes]], cuts: list[int]
) -> None:
    stream = b"".join(packed(header, body) for header, body in frames)
    unpacker, found, at = Unpacker(), [], 0
    for size in [*cuts, len(stream)]:
        found += unpacker.feed(stream[at : at + size])
        at += size
    assert found == [Frame(header, body) for header, body in frames]


def test_text_that_is_no_unicode_survives() -> None:
    assert Unpacker().feed(packed({"text": "\ud800"})) == [Frame({"text": "\ud800"})]


def test_a_length_beyond_the_limit_is_refused_before_it_is_waited_for() -> None:
    with pytest.raises(BackendError, match="a frame of"):
        Unpacker().feed(struct.pack("!II", 1 << 31, 0))


def test_a_socket_gives_frames_until_the_other_side_is_gone() -> None:
    ours, theirs = socket.socketpair()

    def say() -> None:
        for i in range(100):
            theirs.sendall(packed({"i": i}, bytes(i * 1000)))
        theirs.close()

    thread = threading.Thread(target=say)
    thread.start()
    found = [frame for together in received(ours) for frame in together]
    thread.join()
    assert [(f.header["i"], len(f.body)) for f in found] == [(i, i * 1000) for i in range(100)]
