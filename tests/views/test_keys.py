"""Decoding of what a terminal sends."""

from __future__ import annotations

from hypothesis import given, strategies as st

from backbeat_trio._views.keys import KeyDecoder

SENT = {
    b"q": ["q"],
    b"\x1b[A": ["up"],
    b"\x1bOB": ["down"],
    b"\x1b[1;5C": ["right"],
    b"\x1b[D": ["left"],
    b"\x1b[5~": ["pageup"],
    b"\x1b[6;2~": ["pagedown"],
    b"\x1b[H": ["home"],
    b"\x1b[1~": ["home"],
    b"\x1bOF": ["end"],
    b"\x1b[8~": ["end"],
    b"\x1b[Z": ["backtab"],
    b"\x1bOP": ["f1"],
    b"\r": ["enter"],
    b"\n": ["enter"],
    b"\t": ["tab"],
    b"\x7f": ["backspace"],
    b"\x08": ["backspace"],
    b"\x03": ["ctrl-c"],
    b"\x0c": ["ctrl-l"],
    b"\x15": ["ctrl-u"],
    "\N{CJK UNIFIED IDEOGRAPH-4E2D}".encode(): ["\N{CJK UNIFIED IDEOGRAPH-4E2D}"],
    # What is unknown is not typed.
    b"\x1b[200~": [],
    b"\x1b[?62;4c": [],
    b"\x01": [],
}


@given(st.lists(st.sampled_from(sorted(SENT))), st.lists(st.integers(1, 5)))
def test_keys_are_decoded_however_their_bytes_are_cut(sent: list[bytes], cuts: list[int]) -> None:
    data, decoder, keys = b"".join(sent), KeyDecoder(), []
    for cut in (*cuts, len(data)):
        keys += decoder.feed(data[:cut])
        data = data[cut:]
    assert keys == [key for each in sent for key in SENT[each]]
    assert not decoder.waiting


def test_escape_alone_is_a_key_when_nothing_follows() -> None:
    decoder = KeyDecoder()
    assert decoder.feed(b"\x1b") == []
    assert decoder.waiting
    assert decoder.flush() == ["escape"]
    assert decoder.feed(b"[A") == ["[", "A"]
    assert decoder.feed(b"\x1bq") == ["escape", "q"]
    assert decoder.feed(b"\x1b\x1b[A") == ["escape", "up"]
    assert decoder.flush() == []


@given(st.binary())
def test_any_bytes_are_survived(data: bytes) -> None:
    decoder = KeyDecoder()
    for key in (*decoder.feed(data), *decoder.flush()):
        assert key
        assert key.isprintable()


def test_a_sequence_without_an_end_is_not_waited_for() -> None:
    decoder = KeyDecoder()
    keys = decoder.feed(b"\x1b[" + b"1" * 1000)
    assert keys[:2] == ["escape", "["]
    assert not decoder.waiting
