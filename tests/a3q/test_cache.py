"""Sensitivities on disk: what makes a file another's, what comes back, and what is no whole file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q import __version__, cache
from a3q.components import Method
from a3q.families import Component
from a3q.model import LayerShape, ModelConfig, Source
from a3q.sensitivity import Sensitivity, Sizes

CONFIG = ModelConfig((LayerShape(16, 16, 64),) * 2, 64, 4, 2, 512, 256, 1e-6, True)


@dataclass(frozen=True)
class Asked:
    """What names a file."""

    digests: Sequence[str] = ("aa", "bb")
    config: ModelConfig = CONFIG
    tokens: Tensor = field(default_factory=lambda: torch.arange(64).view(4, 16))
    probes: Tensor = field(default_factory=lambda: torch.arange(16).view(2, 8))
    sizes: Sequence[Sizes] = ({"QK": (8, 16), "MLP": (32, 64)}, {"QK": (8, 16), "MLP": (32, 64)})
    ratio: float = 0.25
    method: Method = field(default_factory=Method)

    @property
    def file(self) -> Path:
        of = self.digests, self.config
        return cache.cache_file(*of, self.tokens, self.probes, self.sizes, self.ratio, self.method)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def known(kl: float = 0.125) -> cache.Sensitivities:
    one = Sensitivity((8, 16), (0.5, 0.0), 8, kl)
    layer: dict[Component, Sensitivity] = {"QK": one, "MLP": replace(one, sizes=(32, 64), probed=32, losses=(1 / 3, 0))}
    return [layer, {**layer, "QK": replace(one, kl=1e-17)}]


def test_place(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    assert asked.file == Asked().file
    assert asked.file.parent == root / "a3q" / "sensitivity"
    assert asked.file.suffix == ".json"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert asked.file == tmp_path / "home" / ".cache" / "a3q" / "sensitivity" / asked.file.name


OTHERS: dict[str, dict[str, Any]] = {
    "another model": {"digests": ("aa", "cc")},
    "one shard less": {"digests": ("aa",)},
    "another base of RoPE": {"config": replace(CONFIG, rope_theta=500000.0)},
    "other tokens": {"tokens": torch.arange(1, 65).view(4, 16)},
    "tokens cut otherwise": {"tokens": torch.arange(64).view(8, 8)},
    "other probes": {"probes": torch.arange(1, 17).view(2, 8)},
    "other sizes": {"sizes": ({"QK": (4, 16), "MLP": (32, 64)}, {"QK": (8, 16), "MLP": (32, 64)})},
    "other components": {"sizes": ({"OV": (8, 16), "MLP": (32, 64)},) * 2},
    "fewer components": {"sizes": ({"QK": (8, 16)},) * 2},
    "another ratio": {"ratio": 0.5},
    "the paper's": {"method": Method("paper")},
    "frequencies per head": {"method": Method("a3q", "per_head")},
}


def test_every_difference_is_another_file() -> None:
    files = [replace(Asked(), **options).file for options in OTHERS.values()]
    assert len({Asked().file, *files}) == len(OTHERS) + 1


def test_another_version_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Asked().file
    monkeypatch.setattr(cache, "__version__", __version__ + ".post1")
    assert Asked().file != before


def test_order_of_components_is_no_difference() -> None:
    turned: list[Sizes] = [{"MLP": (32, 64), "QK": (8, 16)}] * 2
    assert replace(Asked(), sizes=turned).file == Asked().file


def test_what_is_saved_comes_back(root: Path) -> None:
    asked = Asked()
    assert cache.load(asked.file, asked.sizes) is None
    cache.save(asked.file, known())
    assert cache.load(asked.file, asked.sizes) == known()
    cache.save(asked.file, known(0.5))
    assert cache.load(asked.file, asked.sizes) == known(0.5)
    assert [path for path in root.rglob("*") if path.is_file()] == [asked.file]


BROKEN: dict[str, Any] = {
    "no list": {"QK": 3},
    "no layers": [],
    "one layer less": slice(1),
    "no components": [{}, {}],
    "a component less": [{"QK": {"sizes": [8], "losses": [0.0], "probed": 8, "kl": 0.0}}] * 2,
    "no fields": [{"QK": {}, "MLP": {}}] * 2,
    "no dictionaries": [{"QK": [], "MLP": 3}] * 2,
    "unlike lengths": [{c: {"sizes": [8, 16], "losses": [0.0], "probed": 8, "kl": 0.0} for c in ("QK", "MLP")}] * 2,
    "probed elsewhere": [{c: {"sizes": [8], "losses": [0.0], "probed": 9, "kl": 0.0} for c in ("QK", "MLP")}] * 2,
    "no number": [{c: {"sizes": [8], "losses": ["x"], "probed": 8, "kl": 0.0} for c in ("QK", "MLP")}] * 2,
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_not_whole_is_nothing(content: Any) -> None:
    asked = Asked()
    cache.save(asked.file, known())
    if isinstance(content, slice):
        content = json.loads(asked.file.read_text())[content]
    asked.file.write_text(json.dumps(content))
    assert cache.load(asked.file, asked.sizes) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[{]"])
def test_what_is_no_json_is_nothing(content: bytes) -> None:
    asked = Asked()
    cache.save(asked.file, known())
    asked.file.write_bytes(content)
    assert cache.load(asked.file, asked.sizes) is None


@pytest.mark.parametrize("parts", [("cache",), ("cache", "a3q"), ("cache", "a3q", "sensitivity")])
def test_a_file_where_a_folder_should_be(tmp_path: Path, parts: tuple[str, ...]) -> None:
    blocker = tmp_path.joinpath(*parts)
    blocker.parent.mkdir(parents=True, exist_ok=True)
    blocker.write_text("mine")
    asked = Asked()
    cache.save(asked.file, known())
    assert cache.load(asked.file, asked.sizes) is None
    assert blocker.read_text() == "mine"


def test_full_disk_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache.save(Asked().file, known())
    assert [path for path in root.rglob("*") if path.is_file()] == []


# Known again by its header


def source(folder: Path, content: bytes = b"weights", name: str = "m.gguf") -> Source:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return Source(folder / name, "gguf", len(content), (folder / name,))


def test_what_is_remembered_is_recalled(root: Path, tmp_path: Path) -> None:
    asked, one = Asked(), source(tmp_path / "a")
    assert cache.recall(one, CONFIG, 0.25, Method()) is None
    cache.remember(asked.file, one, CONFIG, 0.25, Method())
    assert cache.recall(one, CONFIG, 0.25, Method()) is None  # nothing was saved
    cache.save(asked.file, known())
    assert cache.recall(one, CONFIG, 0.25, Method()) == known()
    assert cache.recall(one, CONFIG, 0.9, Method()) == known()
    # Moved and renamed it is the same model.
    assert cache.recall(source(tmp_path / "b", name="other.gguf"), CONFIG, 0.25, Method()) == known()
    for other in (source(tmp_path / "c", b"weight"), source(tmp_path / "d", b"Weights"), source(tmp_path / "e", b"")):
        assert cache.recall(other, CONFIG, 0.25, Method()) is None
    assert cache.recall(one, replace(CONFIG, rope_theta=5.0), 0.25, Method()) is None
    assert cache.recall(one, CONFIG, 0.25, Method("paper")) is None
    assert len(list((root / "a3q" / "known").iterdir())) == 1


def test_nearest_ratio_is_recalled(tmp_path: Path) -> None:
    one = source(tmp_path / "a")
    for ratio, kl in ((0.1, 0.01), (0.5, 0.5), (0.5, 0.75)):
        asked = replace(Asked(), ratio=ratio)
        cache.save(asked.file, known(kl))
        cache.remember(asked.file, one, CONFIG, ratio, Method())
    assert cache.recall(one, CONFIG, 0.2, Method()) == known(0.01)
    assert cache.recall(one, CONFIG, 0.4, Method()) == known(0.75)
    # What is gone is passed over.
    replace(Asked(), ratio=0.1).file.unlink()
    assert cache.recall(one, CONFIG, 0.2, Method()) == known(0.75)


def test_last_text_is_recalled(tmp_path: Path) -> None:
    one = source(tmp_path / "a")
    texts = [replace(Asked(), tokens=torch.arange(i, 64 + i).view(4, 16)) for i in range(3)]
    for turn in (0, 1, 2, 0):
        cache.save(texts[turn].file, known(turn + 1.0))
        cache.remember(texts[turn].file, one, CONFIG, 0.25, Method())
        assert cache.recall(one, CONFIG, 0.25, Method()) == known(turn + 1.0)


def test_ends_of_large_files_tell_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_END", 16)
    one = source(tmp_path / "a", b"h" * 16 + b"x" * 100 + b"t" * 16)
    cache.save(Asked().file, known())
    cache.remember(Asked().file, one, CONFIG, 0.25, Method())
    for content in (b"H" * 16 + b"x" * 100 + b"t" * 16, b"h" * 16 + b"x" * 100 + b"T" * 16, b"h" * 16 + b"t" * 16):
        assert cache.recall(source(tmp_path / "b", content), CONFIG, 0.25, Method()) is None
    two = replace(one, weight_files=(*one.weight_files, source(tmp_path / "c").path))
    assert cache.recall(two, CONFIG, 0.25, Method()) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[3]", b"[{}]", b'[{"file": 3, "ratio": "x"}]', b"\xff"])
def test_damaged_index_is_none(root: Path, tmp_path: Path, content: bytes) -> None:
    one = source(tmp_path / "a")
    cache.save(Asked().file, known())
    cache.remember(Asked().file, one, CONFIG, 0.25, Method())
    [index] = (root / "a3q" / "known").iterdir()
    index.write_bytes(content)
    assert cache.recall(one, CONFIG, 0.25, Method()) is None
    cache.remember(Asked().file, one, CONFIG, 0.25, Method())
    assert cache.recall(one, CONFIG, 0.25, Method()) == known()


def test_index_leads_nowhere_else(root: Path, tmp_path: Path) -> None:
    """A name in it is that of a file beside the others."""
    one = source(tmp_path / "a")
    cache.save(Asked().file, known())
    cache.remember(Asked().file, one, CONFIG, 0.25, Method())
    [index] = (root / "a3q" / "known").iterdir()
    index.write_text(json.dumps([{"file": f"../../{Asked().file.name}", "ratio": 0.25}]))
    assert cache.recall(one, CONFIG, 0.25, Method()) == known()
