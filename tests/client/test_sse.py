"""The parser: bytes in any chunks, hostile text inside."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from magent2.client.sse import Frame, Parser

HOSTILE = st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\r\n\0\u2028\u2029\x85\x0b\x0c\x1c\ufeff: 🙂")))
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
NOISE = st.sampled_from([": ping", "retry: 7", "unknown: x", "event: token", ""])


def parse(*chunks: bytes) -> list[Frame]:
    parser = Parser()
    return [frame for chunk in chunks for frame in parser.feed(chunk)]


def chunked(wire: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(wire) + 1) for cut in cuts} | {0, len(wire)})
    return [wire[start:end] for start, end in pairwise(places)]


@given(st.lists(st.tuples(HOSTILE, NOISE), max_size=5), LINE_ENDS, st.lists(st.integers(0, 10_000), max_size=20))
def test_json_of_any_text_comes_back_from_any_chunks(
    texts: list[tuple[str, str]], line_end: str, cuts: list[int]
) -> None:
    wire = ""
    for number, (text, noise) in enumerate(texts):
        data = json.dumps({"text": text}, ensure_ascii=False)
        wire += line_end.join([noise, f"id: {number}-0", f"data: {data}", "", ""])

    frames = parse(*chunked(wire.encode("utf-8", "surrogatepass"), cuts))

    assert [frame.id for frame in frames] == [f"{number}-0" for number in range(len(texts))]
    assert [json.loads(frame.data)["text"] for frame in frames] == [
        text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for text, _ in texts
    ]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=20))
@example(b"data: x\r\n\r\n", [8])
@example(b"data: x\r\r\n\n", [8, 9])
@example("data: \u2028🙂\n\n".encode(), [7, 8, 10])
def test_chunks_make_no_difference(wire: bytes, cuts: list[int]) -> None:
    assert parse(*chunked(wire, cuts)) == parse(wire)


@given(st.lists(st.sampled_from([b"data", b"id", b":", b" ", b"\r", b"\n", b"\0", b"x", b"retry", b"\xff"])))
def test_any_mixture_of_tokens_is_survived_byte_by_byte(parts: list[bytes]) -> None:
    wire = b"".join(parts)

    assert parse(*(wire[at : at + 1] for at in range(len(wire)))) == parse(wire)


@pytest.mark.parametrize(
    ("wire", "frames"),
    [
        (b"data: a\ndata: b\n\n", [Frame(None, "a\nb")]),
        (b"data\n\n", [Frame(None, "")]),
        (b"data:a\n\ndata:  b\n\n", [Frame(None, "a"), Frame(None, " b")]),
        (b"id: 1-0\ndata: a\n\ndata: b\n\n", [Frame("1-0", "a"), Frame(None, "b")]),
        (b"id: 1\x00\ndata: a\n\n", [Frame(None, "a")]),
        (b"id: 1-0\n\ndata: a\n\n", [Frame(None, "a")]),
        (b": ping\n\n: ping\n\n", []),
        (b"\xef\xbb\xbfdata: a\n\n", [Frame(None, "a")]),
        (b"data: cut", []),
        (b"data: cut\n", []),
        (b"data: \xff\n\n", [Frame(None, "\ufffd")]),
        ("data: a\u2028b\x85c\x0bd\n\n".encode(), [Frame(None, "a\u2028b\x85c\x0bd")]),
    ],
)
def test_fields(wire: bytes, frames: list[Frame]) -> None:
    assert parse(wire) == frames


def test_a_line_of_a_megabyte_in_small_chunks() -> None:
    text = "x" * 1_000_000
    wire = f"id: 1-0\ndata: {text}\n\n".encode()

    assert parse(*(wire[at : at + 100] for at in range(0, len(wire), 100))) == [Frame("1-0", text)]


@pytest.mark.parametrize(("wire", "retry_ms"), [(b"retry: 1500\n\n", 1500), (b"retry: soon\n\n", None), (b"", None)])
def test_retry(wire: bytes, retry_ms: int | None) -> None:
    parser = Parser()
    list(parser.feed(wire))

    assert parser.retry_ms == retry_ms
