"""Names that strangers may give to what commands print or parse, and what no output may have."""

from __future__ import annotations

FORGED = "FORGED"  # begins a line where a name was taken for the end of one
_MARK = FORGED.encode()

# Each without NUL and "/", as a cgroup's, a file's or a process's may be, and without a newline.
NAMES: dict[str, bytes] = {
    "CR": b"a\r" + _MARK,
    "VT": b"a\x0b" + _MARK,
    "FF": b"a\x0c" + _MARK,
    "FS": b"a\x1c" + _MARK,
    "NEL": b"a\xc2\x85" + _MARK,
    "LS": b"a\xe2\x80\xa8" + _MARK,
    "PS": b"a\xe2\x80\xa9" + _MARK,
    "ESC": b"a\x1b[2J\x1b]0;x\x07\x1b[31m" + _MARK,
    "C1": b"a\xc2\x9b31m",
    "BEL and BS": b"a\x07\x08\x08\x08b",
    "tab": b"a\tb",
    "bidi": "a\u202e\u2066moc.elpmaxe\u2069".encode(),
    "zero width": "a\u200b\u200d\ufeffb".encode(),
    "deleted": b"a (deleted)",
    "not UTF-8": b"a\xff\xfe\x80\xc0\xaf",
    "surrogate": b"a\xed\xa0\x80",
    "255 bytes": b"x" * 255,
    "255 bytes, wide": ("\u754c" * 85).encode(),
    "dash": b"--all",
    "dots": b"...",
    "space": b" a  b ",
    "YAML": b"a: {b: [c]} #d &e *f !g |h >i 'j\"k%l@m`n,o?p-q",
    "YAML's words": b"null",
    "JSON": b'a"b\\c\\u0000{}[],:',
    "shell": b"$(touch kabpf-was-here)`x`;&|<>*?!~",
    "systemd": b"a\\x2db@c%i.service",
    "format": b"%s%n{0}{a!r}",
    "markup": b"[red]a[link=x]",
}
WITH_NEWLINES: dict[str, bytes] = {  # as a file's or an environment's value may be
    "LF": b"a\n" + _MARK,
    "CR LF": b"a\r\n" + _MARK,
    "policy": b"a\nmode: enforce\n" + _MARK,
}

LOCALES = ("C.UTF-8", "C", "en_US.ISO-8859-1")


def wrong_with(output: bytes, locale: str) -> str:
    """What is wrong with the output of a command, as a terminal of that locale shows it; "" where
    nothing is: a line that a name made, or a character that changes what is seen."""
    encoding = "iso-8859-1" if "8859" in locale else "utf-8"
    try:
        text = output.decode(encoding)
    except UnicodeDecodeError as error:
        return f"not {encoding}: {error.object[error.start - 20 : error.end + 20]!r}"
    for line in text.split("\n"):
        if not line.isprintable():
            return f"not printable: {line!r}"
        if line.lstrip().startswith(FORGED):
            return f"forged: {line!r}"
    if "Traceback" in text:
        return text
    return ""
