"""A written GGUF as a model of a running Ollama server, through Ollama's own client."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from a3q.errors import InputError
from converters.modelfile import Modelfile

if TYPE_CHECKING:
    import httpx

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(
    rf"(?:(?:[A-Za-z0-9_][A-Za-z0-9_.:-]{{0,349}}/)?[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{_PART}(?::{_PART})?"
)
"""[[host/]namespace/]model[:tag], as Ollama takes it (types/model/name.go)."""

_CONNECT_S = 2.0
_ANSWER_S = 10.0
_CHUNK = 1 << 20

OnProgress = Callable[[float], None]
"""Called with the share of the work that is done."""


@dataclass(frozen=True)
class OllamaOutcome:
    """What became of a model in Ollama. The GGUF is complete whatever it says."""

    name: str
    created: bool
    message: str
    """One line; where nothing was created, why."""
    commands: tuple[str, ...]
    """What is left to run by hand."""


def check_name(name: str, split: bool = False) -> None:
    """InputError for a name that Ollama does not take, or if the GGUF is to be written as several files."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"--ollama {name}: no model name for Ollama; give letters, digits, '-', '_' and '.', as in smol or "
            f"me/smol:25"
        )
    if split:
        # Those from 0.35 on do, and put them together again.
        raise InputError(
            "--ollama and --split-max-size: most versions of Ollama read no split GGUF; give one of the two"
        )


def create_in_ollama(
    name: str, gguf: Path, modelfile: Modelfile, on_progress: OnProgress = lambda _: None, *, digest: str | None = None
) -> OllamaOutcome:
    """Make model `name` of `gguf` in the Ollama server at OLLAMA_HOST, if one answers; what fails there is no error.

    `digest`: the file's SHA-256 in hexadecimal, if known.
    """
    check_name(name)
    run = f"ollama run {name}"
    by_hand = (f"ollama create {name} -f {shlex.quote(str(modelfile.path))}", run)

    def failed(message: str) -> OllamaOutcome:
        return OllamaOutcome(name, False, message, by_hand)

    try:
        import httpx
        import ollama
    except ImportError:
        return failed('not created in Ollama: its client is not installed; pip install "a3q[ollama]"')
    try:
        # A server may take minutes to check a large file, so only the connection has a limit.
        client = ollama.Client(timeout=httpx.Timeout(None, connect=_CONNECT_S))
    except (httpx.InvalidURL, ValueError) as error:
        return failed(f"not created in Ollama: OLLAMA_HOST cannot be used ({_one_line(error)})")
    # The client's own connection, which knows OLLAMA_HOST: its `create_blob` does not ask whether the server has the
    # file, nor tells how far it is.
    http = client._client
    with http:
        try:
            _ask(http)
        except httpx.TransportError:
            return failed(f"not created in Ollama: no server answers at {http.base_url}")
        except (httpx.HTTPError, ValueError) as error:
            return failed(f"not created in Ollama: what answers at {http.base_url} is no Ollama ({_one_line(error)})")
        try:
            blob = _upload(http, gguf, digest, on_progress)
            status = None
            for step in client.create(
                name,
                # Only the ending counts, and Ollama takes not every name.
                files={"model.gguf": blob},
                template=modelfile.template,
                license=modelfile.license,
                parameters=modelfile.parameters,
                stream=True,
            ):
                status = step.status
        except (httpx.HTTPError, httpx.StreamError, ollama.ResponseError, OSError, ValueError) as error:
            return failed(f"not created in Ollama: {_reason(error)}")
    if status != "success":
        return failed(f"not created in Ollama: the server ended with {status!r}")
    on_progress(1.0)
    return OllamaOutcome(name, True, f"created in Ollama as {name}", (run,))


def _ask(http: httpx.Client) -> None:
    """Raise unless an Ollama server answers."""
    import httpx

    response = http.get("/api/version", timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S))
    response.raise_for_status()
    said = response.json()
    if not (isinstance(said, dict) and "version" in said):
        raise ValueError("it names no version")


def _upload(http: httpx.Client, gguf: Path, digest: str | None, on_progress: OnProgress) -> str:
    """The file's name as a blob of the server, to which it is sent unless it is there already."""
    size = gguf.stat().st_size
    passes = 1 if digest else 2
    done = 0

    def chunks() -> Iterator[bytes]:
        nonlocal done
        with gguf.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
                done += len(chunk)
                on_progress(done / (passes * size))

    if digest is None:
        sha256 = hashlib.sha256()
        for chunk in chunks():
            sha256.update(chunk)
        digest = sha256.hexdigest()
    blob = f"sha256:{digest}"
    if not http.head(f"/api/blobs/{blob}").is_success:
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        http.post(f"/api/blobs/{blob}", content=chunks(), headers=headers).raise_for_status()
    return blob


def _reason(error: Exception) -> str:
    """What the server says is wrong, where it says it."""
    import httpx
    import ollama

    if isinstance(error, ollama.ResponseError):
        return _one_line(error.error)
    if isinstance(error, httpx.HTTPStatusError):
        try:
            return _one_line(error.response.json()["error"])
        except (ValueError, LookupError, TypeError):
            return f"the server answers {error.response.status_code}"
    return _one_line(error)


def _one_line(said: object) -> str:
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= 200 else text[:197] + "..."
