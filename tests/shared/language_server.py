"""Asks yaml-language-server, as editors do, what it marks in a file."""

from __future__ import annotations

import json
import subprocess
from types import TracebackType
from typing import Any


class LanguageServer:
    """A server on standard input and output (LSP 3), which fetches no schemas from elsewhere."""

    def __init__(self, program: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([program, "--stdio"], **pipes)
        self._send("initialize", {"processId": None, "rootUri": None, "capabilities": {}}, id=1)
        while self._receive().get("id") != 1:
            pass
        self._send("initialized", {})
        settings = {"yaml": {"validate": True, "schemaStore": {"enable": False}}}
        self._send("workspace/didChangeConfiguration", {"settings": settings})

    def __enter__(self) -> LanguageServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def marks(self, uri: str, text: str) -> list[str]:
        """What is said of a text."""
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self._send("textDocument/didOpen", {"textDocument": document})
        while True:
            message = self._receive()
            said = message.get("params")
            if message.get("method") == "textDocument/publishDiagnostics" and said["uri"] == uri:
                return [each["message"] for each in said["diagnostics"]]

    def _send(self, method: str, params: dict[str, Any], **more: Any) -> None:
        self._write({"jsonrpc": "2.0", "method": method, "params": params, **more})

    def _write(self, message: dict[str, Any]) -> None:
        content = json.dumps(message).encode()
        assert self._process.stdin
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        """The next message; a request is answered with nothing."""
        assert self._process.stdout
        length = 0
        while line := self._process.stdout.readline().strip():
            name, _, number = line.partition(b":")
            if name == b"Content-Length":
                length = int(number)
        assert length, "the server ended"
        message: dict[str, Any] = json.loads(self._process.stdout.read(length))
        if "id" in message and "method" in message:
            asked = message["params"].get("items", []) if "params" in message else []
            self._write({"jsonrpc": "2.0", "id": message["id"], "result": [None for _ in asked]})
        return message
