"""The folder of a run that can be continued: what the run is, and what it has settled and finished so far."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from a3q import ranks
from a3q.calibration import Calibration
from a3q.errors import InputError
from a3q.files import kept, read_tensors, remove_parts, write_tensors, write_whole

_RUN = "run"
"""Name of the document that tells the run."""
_LOCK = "lock"
_OUTPUT = "output"
"""Name of the document that tells the output's files."""
_OTHER = "give another folder with --work"


class WorkFolder:
    """What a run keeps so that it can be continued. Whatever is kept is there whole, wherever the run is killed.

    InputError for files that are damaged and for a disk that is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def open(cls, path: Path, identity: Mapping[str, str]) -> Iterator[WorkFolder]:
        """The folder of the run that `identity` tells by names and values, created where there is none.

        It is locked meanwhile. InputError, and nothing touched, for one of another run or of something else.
        """
        folder = cls(path)
        with _usable(path):
            folder._check(identity)
            path.mkdir(exist_ok=True)
        with _locked(path):
            with _usable(path):
                # Another a3q may have begun in it since.
                known = folder._check(identity)
            remove_parts(path)
            if not known:
                folder.keep(_RUN, dict(identity))
            yield folder

    def recall(self, name: str) -> object | None:
        """What `keep` was given under a name, as JSON has it: lists for tuples, text for keys; None: nothing."""
        path = self.document(name)
        if not path.exists():
            return None
        with kept(path):
            content: object = json.loads(path.read_text("utf-8"))
        return content

    def keep(self, name: str, content: object) -> None:
        """Keep something that JSON can hold, floats exactly; what was kept under the name is replaced."""
        write_whole(self.document(name), json.dumps(content, indent=1) + "\n")

    def calibration(self) -> Calibration | None:
        """What `keep_calibration` was given; None: nothing."""
        path = self._calibration
        if not path.exists():
            return None
        with kept(path):
            tensors, metadata = read_tensors(path)
            tokens, held_out = tensors["tokens"], tensors["held_out"]
            return Calibration(tokens, held_out, metadata["source"], metadata["description"])

    def keep_calibration(self, calibration: Calibration) -> None:
        """Keep the tokens, which are on the CPU, and what is said of them."""
        tensors = {"tokens": calibration.tokens, "held_out": calibration.held_out}
        told = {"source": calibration.source, "description": calibration.description}
        write_tensors(self._calibration, tensors, told)

    def tokens(self, name: str) -> Tensor | None:
        """What `keep_tokens` was given under a name; None: nothing."""
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            return None
        with kept(path):
            return read_tensors(path)[0]["tokens"]

    def keep_tokens(self, name: str, tokens: Tensor) -> None:
        """Keep token ids, which are on the CPU."""
        write_tensors(self.path / f"{name}.safetensors", {"tokens": tokens}, {})

    def keep_output(self, files: Iterable[Path]) -> None:
        """Tell the files of the output, which are about to be renamed; see `placed`."""
        known = self._outputs()
        # Those of a run that was killed may still have the names.
        self.keep(_OUTPUT, known | {name: [*known.get(name, []), mark] for name, mark in _marks(files).items()})

    def placed(self, files: Iterable[Path]) -> bool:
        """Whether `files`, which there are, are of an output that was told here, and untouched."""
        known, marks = self._outputs(), _marks(files)
        return bool(marks) and all(mark in known.get(name, []) for name, mark in marks.items())

    def layers(self, stage: str) -> Path:
        """The folder for the `LayerStore` of a stage."""
        path = self.path / f"layers-{stage}"
        with _usable(path):
            path.mkdir(exist_ok=True)
        return path

    def _outputs(self) -> dict[str, list[list[int]]]:
        found = self.recall(_OUTPUT)
        return found if isinstance(found, dict) else {}

    @property
    def _calibration(self) -> Path:
        return self.path / "calibration.safetensors"

    def document(self, name: str) -> Path:
        """The file of what is kept under a name."""
        return self.path / f"{name}.json"

    def _check(self, identity: Mapping[str, str]) -> bool:
        """Whether `identity` is written there; False: it can be."""
        if not self.path.parent.is_dir():
            raise InputError(f"{self.path}: the folder it is to lie in does not exist; create {self.path.parent} first")
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise InputError(f"{self.path}: is there and no folder; {_OTHER}")
        file = self.document(_RUN)
        if not file.exists():
            self._check_empty()
            return False
        try:
            found = json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{file}: tells no run of a3q; {_OTHER}, or delete this one")
        for name in {**identity, **found}:
            then, now = found.get(name, "not given"), identity.get(name, "not given")
            if then != now:
                raise InputError(
                    f"{self.path}: is the work folder of another run: {name} was {then} and is {now} now; {_OTHER}, or "
                    "delete this one"
                )
        return True

    def _check_empty(self) -> None:
        """InputError where there is more than a run killed at its very beginning leaves."""
        names = sorted(entry.name for entry in self.path.iterdir())
        begun = f".{_RUN}.json."
        strange = [name for name in names if name != _LOCK and not (name.startswith(begun) and name.endswith(".part"))]
        if strange:
            raise InputError(
                f"{self.path}: holds {strange[0]} and no {_RUN}.json, so it is no work folder of a3q; {_OTHER}"
            )


@contextmanager
def opened(path: Path | None, identity: Mapping[str, str]) -> Iterator[WorkFolder | None]:
    """The work folder, if there is to be one; of several processes the first alone has it."""
    if path is None:
        yield None
        return
    with ExitStack() as stack:
        yield ranks.alone(lambda: stack.enter_context(WorkFolder.open(path, identity)))


def draft_of(output: Path, work: Path) -> Path:
    """Where a run with the folder `work` prepares `output`: beside it, and found again after the process was killed."""
    mark = hashlib.sha256(str(work.resolve()).encode()).hexdigest()[:8]
    return output.with_name(f".{output.name}.{mark}.unverified")


def placed(work: Path | None, files: Iterable[Path]) -> bool:
    """`WorkFolder.placed`, before the folder is opened."""
    return work is not None and WorkFolder(work).placed(files)


def _marks(files: Iterable[Path]) -> dict[str, list[int]]:
    """What stays of a file when it is renamed, and does not when it is replaced or written to."""
    known = {path.name: path.stat() for path in files}
    return {name: [about.st_ino, about.st_size, about.st_mtime_ns] for name, about in known.items()}


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be used: {error.strerror or error}; {_OTHER}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process has `folder` meanwhile; the lock ends with the process, however that ends."""
    with _usable(folder):
        file = (folder / _LOCK).open("ab")
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{folder}: is in use by another a3q; wait for it, or {_OTHER}") from error
            except OSError:
                # Some network file systems have no locks.
                pass
        yield
