"""Models made in an Ollama server: a stand-in that speaks its HTTP API and checks what it gets."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from a3q.errors import InputError
from a3q.ollama import check_name, create_in_ollama
from converters.modelfile import Modelfile

SUCCESS = [{"status": "parsing GGUF"}, {"status": "writing manifest"}, {"status": "success"}]
DATA = bytes(range(256)) * 10_000
DIGEST = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers as Ollama does, and remembers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        self.blobs: set[str] = set()
        self.created: dict[str, Any] = {}
        self.version: Any = {"version": "0.12.0"}
        self.steps: list[dict[str, Any]] = SUCCESS
        self.create_status = 200
        self.blob_status = 201


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        assert self.path == "/api/version"
        self._answer(200, json.dumps(self.server.version).encode())

    def do_HEAD(self) -> None:
        self._answer(200 if self.path.removeprefix("/api/blobs/") in self.server.blobs else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/create":
            self.server.created = json.loads(body)
            self._answer(self.server.create_status, b"".join(json.dumps(s).encode() + b"\n" for s in self.server.steps))
        elif f"sha256:{hashlib.sha256(body).hexdigest()}" != self.path.removeprefix("/api/blobs/"):
            self._answer(400, b'{"error": "digest mismatch"}')
        else:
            self.server.blobs.add(self.path.removeprefix("/api/blobs/"))
            self._answer(
                self.server.blob_status, b"" if self.server.blob_status == 201 else b'{"error": "no space left"}'
            )

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("ollama")
    with Server() as running:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{running.server_port}")
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "my model.gguf"
    path.write_bytes(DATA)
    return path


def modelfile(gguf: Path, template: str | None = "{{ .Prompt }}") -> Modelfile:
    return Modelfile(gguf.with_name("Modelfile"), template, ("</s>", "<|im_end|>"), 2048, "apache-2.0", ())


@pytest.mark.parametrize("digest", [None, DIGEST])
def test_created(server: Server, gguf: Path, digest: str | None) -> None:
    shares: list[float] = []
    outcome = create_in_ollama("me/smol:25", gguf, modelfile(gguf), shares.append, digest=digest)
    assert outcome.created and outcome.message == "created in Ollama as me/smol:25"
    assert outcome.commands == ("ollama run me/smol:25",)
    blob = f"/api/blobs/sha256:{DIGEST}"
    assert server.requests == ["GET /api/version", f"HEAD {blob}", f"POST {blob}", "POST /api/create"]
    assert server.created == {
        "model": "me/smol:25",
        "files": {"model.gguf": f"sha256:{DIGEST}"},
        "template": "{{ .Prompt }}",
        "license": "apache-2.0",
        "parameters": {"num_ctx": 2048, "stop": ["</s>", "<|im_end|>"]},
        "stream": True,
    }
    assert shares == sorted(shares) and 0 < shares[0] < 1 and shares[-1] == 1 and len(shares) > 3


def test_a_blob_that_the_server_has_is_not_sent(server: Server, gguf: Path) -> None:
    server.blobs.add(f"sha256:{DIGEST}")
    outcome = create_in_ollama("smol", gguf, modelfile(gguf, None))
    assert outcome.created and not any(request.startswith("POST /api/blobs") for request in server.requests)
    assert "template" not in server.created


def test_the_server_refuses(server: Server, gguf: Path) -> None:
    def refused() -> str:
        outcome = create_in_ollama("smol", gguf, modelfile(gguf))
        assert not outcome.created
        assert outcome.commands == (f"ollama create smol -f {gguf.parent}/Modelfile", "ollama run smol")
        return outcome.message

    server.steps = [{"status": "parsing GGUF"}, {"error": "unknown\nmodel architecture"}]
    assert refused() == "not created in Ollama: unknown model architecture"
    server.create_status, server.steps = 400, [{"error": "invalid model name"}]
    assert refused() == "not created in Ollama: invalid model name"
    server.create_status, server.steps = 200, [{"status": "parsing GGUF"}]
    assert "ended with 'parsing GGUF'" in refused()
    server.blobs.clear()
    server.blob_status = 507
    assert refused() == "not created in Ollama: no space left"
    server.version = ["something else"]
    assert "is no Ollama" in refused()


def test_a_wrong_digest_is_refused_by_the_server(server: Server, gguf: Path) -> None:
    outcome = create_in_ollama("smol", gguf, modelfile(gguf), digest="0" * 64)
    assert outcome.message == "not created in Ollama: digest mismatch" and "POST /api/create" not in server.requests


def test_no_server(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ollama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free.getsockname()[1]}")
        outcome = create_in_ollama("smol", gguf, modelfile(gguf))
    assert not outcome.created and "no server answers at http://127.0.0.1:" in outcome.message
    assert outcome.commands[1] == "ollama run smol"
    monkeypatch.setenv("OLLAMA_HOST", "localhost:port")
    assert "OLLAMA_HOST cannot be used" in create_in_ollama("smol", gguf, modelfile(gguf)).message


def test_without_the_client(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ollama", None)
    outcome = create_in_ollama("smol", gguf, modelfile(gguf))
    assert not outcome.created and 'pip install "a3q[ollama]"' in outcome.message
    assert outcome.commands == (f"ollama create smol -f {gguf.parent}/Modelfile", "ollama run smol")


def test_names() -> None:
    for name in ("smol", "Smol_2.5-x:25-q4", "me/smol", "example.org:5000/me/smol:latest", "_x"):
        check_name(name)
    for name in (
        "",
        "my model",
        "-x",
        "a/b/c/d",
        "smol:",
        "me.too/smol",
        "smöl",
        "a" * 81,
        "x\n",
        "$(x)",
        "http://x/y/z",
    ):
        with pytest.raises(InputError, match="--ollama"):
            check_name(name)
    with pytest.raises(InputError, match="--ollama and --split-max-size"):
        check_name("smol", split=True)
