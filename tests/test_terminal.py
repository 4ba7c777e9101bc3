"""Names of files never harm a terminal: every line that is printed prints, whatever it is about."""

import io
import sys

import pytest

from lenet_fast.terminal import printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("digit 7.png", "digit 7.png"),
        ("café.png", "café.png"),
        ("a\nb.png", r"a\nb.png"),
        ("\x1b]0;owned\x07\x1b[31m.png", r"\x1b]0;owned\x07\x1b[31m.png"),
        (b"caf\xe9.png".decode("utf-8", "surrogateescape"), r"caf\xe9.png"),
        ("\u202egnp.7", r"\u202egnp.7"),
        ("\x9b31m\r", r"\x9b31m\r"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_does_not_print_is_escaped(monkeypatch, name, shown):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert printable(name) == shown
    assert printable(ValueError(name)) == shown


def test_what_stdout_cannot_encode_is_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print(printable("café 数.png"), flush=True)
    assert sys.stdout.buffer.getvalue() == b"caf\\xe9 \\u6570.png\n"
