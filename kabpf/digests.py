"""blake2b(7), as hashlib has it, without the 4 MiB and the 8 ms that hashlib takes for OpenSSL."""

from __future__ import annotations

try:
    # As random of the standard library does.
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

__all__ = ["blake2b"]
