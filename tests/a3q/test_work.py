"""The work folder: whose it is, what comes back from it, and what is no whole one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from a3q.calibration import Calibration
from a3q.errors import InputError
from a3q.work import WorkFolder

IDENTITY = {"a3q": "0.6.0", "model": "sha256 ab12", "--ratio": "0.25"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def refused(path: Path, identity: dict[str, str] = IDENTITY) -> str:
    """What opening says; the folder must be as it was."""
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(InputError) as caught, WorkFolder.open(path, identity):
        pytest.fail("was opened")
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_new_folder_tells_its_run(path: Path) -> None:
    with WorkFolder.open(path, IDENTITY) as work:
        assert work.path == path
        assert json.loads((path / "run.json").read_text("utf-8")) == IDENTITY
        assert work.recall("plan") is None and work.calibration() is None
    assert names(path) == ["lock", "run.json"]


def test_an_empty_folder_becomes_one(path: Path) -> None:
    path.mkdir()
    with WorkFolder.open(path, IDENTITY):
        assert names(path) == ["lock", "run.json"]


def test_all_comes_back_exactly(path: Path) -> None:
    document = {"losses": [0.1 + 0.2, 1 / 3, 5e-324, 1e300, -0.0], "plan": {"é": None, "n": [1, True]}}
    tokens = torch.randint(0, 2**40, (6, 5)).T
    given = Calibration(tokens, torch.arange(8).view(2, 4), "text “a”.txt", "5 × 6 tokens")
    with WorkFolder.open(path, IDENTITY) as work:
        work.keep("plan", {"older": 1})
        work.keep("plan", document)
        work.keep("none", [])
        work.keep_calibration(given)
        assert work.layers("reduced").is_dir()
    with WorkFolder.open(path, IDENTITY) as work:
        assert repr(work.recall("plan")) == repr(document)
        assert work.recall("none") == []
        found = work.calibration()
        assert work.layers("reduced") == work.layers("reduced") != work.layers("rounded")
    assert found is not None and (found.source, found.description) == (given.source, given.description)
    for one, expected in ((found.tokens, given.tokens), (found.held_out, given.held_out)):
        assert one.dtype == torch.int64 and torch.equal(one, expected)


def test_a_calibration_without_held_out_tokens(path: Path) -> None:
    given = Calibration(torch.arange(6).view(2, 3), torch.empty(0, 128, dtype=torch.int64), "self", "")
    with WorkFolder.open(path, IDENTITY) as work:
        work.keep_calibration(given)
        found = work.calibration()
    assert found is not None and found.held_out.shape == (0, 128)


@pytest.mark.parametrize(
    ("identity", "difference"),
    [
        (IDENTITY | {"--ratio": "0.3"}, "--ratio was 0.25 and is 0.3 now"),
        (IDENTITY | {"a3q": "0.7.0", "--ratio": "0.3"}, "a3q was 0.6.0 and is 0.7.0 now"),
        (IDENTITY | {"--seed": "1"}, "--seed was not given and is 1 now"),
        ({"a3q": "0.6.0", "--ratio": "0.25"}, "model was sha256 ab12 and is not given now"),
    ],
)
def test_another_run(path: Path, identity: dict[str, str], difference: str) -> None:
    with WorkFolder.open(path, IDENTITY):
        pass
    assert refused(path, identity) == (
        f"{path}: is the work folder of another run: {difference}; give another folder with --work, or delete this one"
    )
    with WorkFolder.open(path, dict(reversed(IDENTITY.items()))):
        pass


def test_what_is_no_work_folder(path: Path) -> None:
    path.mkdir()
    (path / "model.gguf").write_bytes(b"weights")
    (path / "zebra").mkdir()
    says = "holds model.gguf and no run.json, so it is no work folder of a3q; give another folder with --work"
    assert refused(path) == f"{path}: {says}"
    assert names(path) == ["model.gguf", "zebra"]


@pytest.mark.parametrize("content", [b"", b'{"a3q": "0.6', b"[]", b"null", b"\xff\xfe", b"[" * 100000])
def test_a_run_that_cannot_be_read(path: Path, content: bytes) -> None:
    path.mkdir()
    (path / "run.json").write_bytes(content)
    says = "tells no run of a3q; give another folder with --work, or delete this one"
    assert refused(path) == f"{path / 'run.json'}: {says}"
    assert names(path) == ["run.json"]


def test_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert refused(tmp_path / "file") == f"{tmp_path}/file: is there and no folder; give another folder with --work"
    says = f"the folder it is to lie in does not exist; create {tmp_path}/a first"
    assert refused(tmp_path / "a" / "b") == f"{tmp_path}/a/b: {says}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").mkdir()
    says = "cannot be used: Is a directory; give another folder with --work"
    assert refused(tmp_path / "run") == f"{tmp_path}/run: {says}"


def test_killed_before_it_told_its_run(path: Path) -> None:
    path.mkdir()
    (path / "lock").touch()
    (path / ".run.json.4711.part").write_text('{"a3q"')
    with WorkFolder.open(path, IDENTITY):
        assert names(path) == ["lock", "run.json"]


def test_what_a_killed_run_was_writing_goes(path: Path) -> None:
    with WorkFolder.open(path, IDENTITY) as work:
        work.keep("plan", 1)
    (path / ".plan.json.4711.part").write_text("{")
    (path / ".calibration.safetensors.4711.part").write_bytes(b"half")
    with WorkFolder.open(path, IDENTITY) as work:
        assert names(path) == ["lock", "plan.json", "run.json"]
        assert work.recall("plan") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_one_a3q_at_a_time(path: Path) -> None:
    with WorkFolder.open(path, IDENTITY):
        says = "is in use by another a3q; wait for it, or give another folder with --work"
        assert refused(path) == f"{path}: {says}"
    # Whatever happens in it, it is free then.
    with pytest.raises(KeyError), WorkFolder.open(path, IDENTITY):
        raise KeyError
    with WorkFolder.open(path, IDENTITY):
        pass


def test_where_there_are_no_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOLCK))
    with WorkFolder.open(path, IDENTITY):
        assert names(path) == ["lock", "run.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signal")
def test_a_killed_run_leaves_it_free_and_whole(path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from a3q.work import WorkFolder
with WorkFolder.open(Path(sys.argv[1]), {"a3q": "1"}) as work:
    work.keep("plan", [1, 2])
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    work.keep("plan", [3, 4])
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    with WorkFolder.open(path, {"a3q": "1"}) as work:
        assert work.recall("plan") == [1, 2]
        assert names(path) == ["lock", "plan.json", "run.json"]


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"\xff\xfe\x00"])
def test_a_damaged_document(path: Path, content: bytes) -> None:
    with WorkFolder.open(path, IDENTITY) as work:
        work.keep("plan", [1, 2])
        (path / "plan.json").write_bytes(content)
        with pytest.raises(InputError) as caught:
            work.recall("plan")
    assert str(caught.value) == f"{path}/plan.json: is damaged; delete the work folder and start again"


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_damaged_calibration(path: Path, length: int) -> None:
    with WorkFolder.open(path, IDENTITY) as work:
        work.keep_calibration(Calibration(torch.zeros(8, 8).long(), torch.zeros(2, 8).long(), "self", "text"))
        file = path / "calibration.safetensors"
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(InputError) as caught:
            work.calibration()
    assert str(caught.value) == f"{file}: is damaged; delete the work folder and start again"


def raising(number: int) -> Callable[..., None]:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    calibration = Calibration(torch.zeros(8, 8).long(), torch.zeros(2, 8).long(), "self", "text")
    with WorkFolder.open(path, IDENTITY) as work:
        work.keep("plan", 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", raising(number))
            with pytest.raises(InputError) as caught:
                work.keep("plan", 2)
            assert str(caught.value) == f"{path}/plan.json: cannot be written: {os.strerror(number)}"
            with pytest.raises(InputError) as caught:
                work.keep_calibration(calibration)
            says = "disk full: calibration.safetensors cannot be written; make room there, then give the same command"
            assert str(caught.value) == f"{path}: {says} again"
        assert work.recall("plan") == 1 and work.calibration() is None
        assert names(path) == ["lock", "plan.json", "run.json"]


def test_disk_full_at_the_very_beginning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(errno.ENOSPC))
        with (
            pytest.raises(InputError, match=r"run\.json: cannot be written: No space"),
            WorkFolder.open(path, IDENTITY),
        ):
            pytest.fail("was opened")
    with WorkFolder.open(path, IDENTITY):
        assert names(path) == ["lock", "run.json"]
