"""Text that may be printed to a terminal, whatever the names of files in it are."""

import sys


def printable(text: object) -> str:
    r"""`str(text)` as one line in which everything that does not print is escaped as Python's strings have it.

    Names of files may hold line breaks, the control sequences of terminals, bytes that are no text in the encoding of
    file names (which Python keeps as lone surrogates; they become \xNN) and characters that stdout cannot encode.
    """
    return "".join(map(_escaped, str(text)))


def _escaped(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # PEP 383: the undecodable byte 0xNN is kept as U+DCNN
        return f"\\x{ord(character) - 0xDC00:02x}"
    if not character.isprintable():
        return character.encode("unicode_escape").decode("ascii")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return character.encode(encoding, "backslashreplace").decode(encoding)
