"""`LayerStore` in memory, on disk and in a folder that outlives it."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from a3q.errors import InputError
from a3q.model import LayerShape, plain_frequencies
from a3q.solve.gptq import nearest
from a3q.solve.grid import GRIDS, Blocks, Grid
from a3q.store import Finished, LayerLosses, LayerStore
from converters.gptq import gptq_grid

Item = dict[str, Tensor]
BYTES = 6 * 4 + 2 * 4
SHAPE = LayerShape(4, 4, 8)
WINDOWED = LayerShape(
    qk_head_dim=6,
    v_head_dim=5,
    intermediate_size=96,
    # Not all decimal fractions, and not all of one size.
    frequencies=(plain_frequencies(1e6 / 3, 6), (0.1, 1e-300, 0.0), (1.0, 1 / 3, 5e-324)),
    sliding_window=512,
)
OWN = Grid("own", 4, 64, 32, has_base=True, scales=(0, 63), mins=(0, 63), spare=1)
LEVELS = replace(GRIDS["iq4_nl"], block=64, sub=64)
"""Under a name that another grid has."""


def items(count: int = 4) -> list[Item]:
    # Transposed on purpose: in a file only contiguous tensors are.
    return [{"a": torch.randn(3, 2).T, "b": torch.full((2,), float(i))} for i in range(count)]


def done(layer: Item, blocks: dict[str, Blocks] | None = None) -> Finished:
    return Finished(layer, SHAPE, blocks=blocks or {})


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def filled(budget: int, given: list[Item]) -> LayerStore:
    store = LayerStore(budget)
    for item in given:
        store.append(done(item))
    return store


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, so that NaN and the zeros are told apart as well."""
    bits = [one.contiguous().view(-1).view(torch.uint8) for one in (found, expected)]
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*bits)


def same_blocks(found: Blocks, expected: Blocks) -> bool:
    fields = found.tensors()
    return (
        found.grid == expected.grid
        and fields.keys() == expected.tensors().keys()
        and all(same(fields[name], value) for name, value in expected.tensors().items())
    )


def same_finished(found: Finished, expected: Finished) -> bool:
    """All but the grids' identity."""
    return (
        found.layer.keys() == expected.layer.keys()
        and all(same(found.layer[role], weight) for role, weight in expected.layer.items())
        and found.blocks.keys() == expected.blocks.keys()
        and all(same_blocks(found.blocks[role], one) for role, one in expected.blocks.items())
        and found.shape == expected.shape
        and found.losses == expected.losses
        and dict(found.rounding_losses) == dict(expected.rounding_losses)
    )


@pytest.mark.parametrize(("budget", "on_disk"), [(10**6, 0), (4 * BYTES, 0), (2 * BYTES + 1, 2), (0, 4)])
def test_gives_back_what_it_was_given(temp: Path, budget: int, on_disk: int) -> None:
    given = items()
    store = filled(budget, given)
    assert len(list(temp.rglob("*.safetensors"))) == on_disk
    assert len(store) == 4
    for item, expected in zip(store, given, strict=True):
        assert item.keys() == expected.keys()
        assert all(torch.equal(item[name], expected[name]) for name in item)
    assert torch.equal(store[-1]["b"], given[3]["b"])
    assert [float(item["b"][0]) for item in store[1:]] == [1, 2, 3]
    assert [float(item["b"][0]) for item in store[::-2]] == [3, 1]
    assert store[4:] == []
    with pytest.raises(IndexError):
        store[4]


def test_a_small_item_still_fits_after_a_large_one_went_to_disk(temp: Path) -> None:
    large = {"a": torch.zeros(100)}
    store = filled(2 * BYTES, [items()[0], large, items()[1]])
    assert len(list(temp.rglob("*.safetensors"))) == 1
    assert [sorted(item) for item in store] == [["a", "b"], ["a"], ["a", "b"]]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_folder_goes_away_with_the_store(temp: Path) -> None:
    store = filled(0, items())
    assert len(list(temp.iterdir())) == 1
    del store
    gc.collect()
    assert list(temp.iterdir()) == []


def test_no_folder_while_everything_fits(temp: Path) -> None:
    store = filled(10**6, items())
    assert len(store) == 4 and list(temp.iterdir()) == []


def test_what_stays_in_memory_is_the_weights_themselves() -> None:
    given = items(1)
    store = filled(10**6, given)
    assert all(store[0][name] is given[0][name] for name in given[0])


def rounded() -> tuple[Item, dict[str, Blocks]]:
    """A layer of which `q` and `down` are rounded; `q_bias` begins like one of them."""
    weights = {role: torch.randn(5, 256) for role in ("q", "k", "down")}
    blocks = {
        role: nearest(weights[role], GRIDS[name], torch.ones(256)) for role, name in (("q", "q4_k"), ("down", "q4_1"))
    }
    return weights | {role: one.dequantize() for role, one in blocks.items()} | {"q_bias": torch.randn(5)}, blocks


@pytest.mark.parametrize("budget", [10**6, 0])
def test_rounded_weights_are_kept_as_blocks(temp: Path, budget: int) -> None:
    store, given = LayerStore(budget), [rounded() for _ in range(2)]
    for layer, blocks in given:
        store.append(done(layer, blocks))
    store.append(done(given[0][0]))
    assert len(list(temp.rglob("*.safetensors"))) == (0 if budget else 3)
    for i, (layer, blocks) in enumerate(given):
        assert store[i].keys() == layer.keys()
        assert all(torch.equal(store[i][role], layer[role]) for role in layer)
        found = store.blocks(i)
        assert found.keys() == blocks.keys()
        for role, one in blocks.items():
            assert found[role].grid is one.grid and found[role].tensors().keys() == one.tensors().keys()
            for name, field in one.tensors().items():
                assert torch.equal(found[role].tensors()[name], field)
                assert found[role].tensors()[name].dtype == field.dtype
    assert store.blocks(2) == {} and torch.equal(store[2]["q"], given[0][0]["q"])


def test_blocks_take_the_room_of_blocks(temp: Path) -> None:
    """The budget of a layer in full is that of more than one rounded."""
    layer, blocks = rounded()
    store = LayerStore(sum(weight.nbytes for weight in layer.values()))
    store.append(done(layer, blocks))
    store.append(done({}, blocks))
    assert list(temp.iterdir()) == []
    store.append(done(layer))
    assert len(list(temp.rglob("*.safetensors"))) == 1


def all_kinds() -> Finished:
    """A layer with every kind of number in it."""
    grids = {
        "q": GRIDS["q4_k"],
        "k": GRIDS["q3_k"],
        "v": GRIDS["q8_0"],
        "o": OWN,
        "up": LEVELS,
        "gate": GRIDS["iq4_nl"],
    }
    grids |= {"down": gptq_grid(4, 128, symmetric=False)}
    blocks = {role: nearest(torch.randn(5, 256), grid, torch.ones(256)) for role, grid in grids.items()}
    layer = {role: one.dequantize() for role, one in blocks.items()} | {
        "q_bias": torch.randn(5),
        "attn_norm": torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 1 / 3]),
        "odd": torch.randn(3, 5).T.to(torch.bfloat16),
        "half": torch.randn(3).half(),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    losses = LayerLosses(0.1, 1 / 3, 5e-324)
    return Finished(layer, WINDOWED, losses, blocks, {"q": 0.1 + 0.2, "down": 1e-17})


@pytest.mark.parametrize("where", ["memory", "temporary folder", "folder", "reopened"])
def test_all_of_a_layer_comes_back_exactly(temp: Path, where: str) -> None:
    folder = temp / "layers"
    folder.mkdir()
    given = [all_kinds(), done(items(1)[0]), all_kinds()]
    embed = given[2].blocks["q"]
    store = LayerStore(10**9 if where == "memory" else 0, folder if where in ("folder", "reopened") else None)
    for one in given:
        store.append(one)
    store.keep_top("embed", embed)
    if where == "reopened":
        del store
        # The budget is not for what a folder holds.
        store = LayerStore(10**9, folder)
    assert len(store) == 3
    for i, one in enumerate(given):
        assert same_finished(store.finished(i), one)
        assert same_finished(store.finished(i - 3), one)
        assert store[i].keys() == one.layer.keys() and all(same(store[i][role], one.layer[role]) for role in one.layer)
        assert store.blocks(i).keys() == one.blocks.keys()
        assert all(same_blocks(store.blocks(i)[role], blocks) for role, blocks in one.blocks.items())
    found = store.top("embed")
    assert found is not None and same_blocks(found, embed)
    assert store.top("output") is None
    with pytest.raises(IndexError):
        store.finished(3)
    names = sorted(path.name for path in folder.iterdir())
    kept = ["00000.safetensors", "00001.safetensors", "00002.safetensors", "top-embed.safetensors"]
    assert names == (kept if where in ("folder", "reopened") else [])


def test_blocks_of_the_last_layer_are_those_of_the_layer_that_is_last_then() -> None:
    given = [all_kinds(), all_kinds()]
    store = LayerStore(10**9)
    for one in given:
        store.append(one)
        assert same_blocks(store.blocks(-1)["q"], one.blocks["q"])


def test_others_can_read_the_files(tmp_path: Path) -> None:
    one = all_kinds()
    LayerStore(0, tmp_path).append(one)
    found = load_file(tmp_path / "00000.safetensors")
    assert same(found["odd"], one.layer["odd"]) and same(found["down.codes"], one.blocks["down"].codes)
    data = (tmp_path / "00000.safetensors").read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0


def test_goes_on_behind_the_layers_it_finds(tmp_path: Path) -> None:
    given = items(3)
    store = LayerStore(0, tmp_path)
    assert len(store) == 0 and list(store) == []
    store.append(done(given[0]))
    store = LayerStore(0, tmp_path)
    store.append(done(given[1]))
    store.append(done(given[2]))
    assert [float(item["b"][0]) for item in LayerStore(0, tmp_path)] == [0, 1, 2]


def test_layers_behind_a_gap_do_not_count(tmp_path: Path) -> None:
    """They were fitted to a layer that is made anew."""
    store = LayerStore(0, tmp_path)
    for item in items(4):
        store.append(done(item))
    store.keep_top("embed", all_kinds().blocks["q"])
    (tmp_path / "00001.safetensors").unlink()
    store = LayerStore(0, tmp_path)
    assert len(store) == 1 and store.top("embed") is not None
    store.append(done(items(1)[0]))
    assert len(LayerStore(0, tmp_path)) == 2


def test_what_a_killed_run_was_writing_goes(tmp_path: Path) -> None:
    LayerStore(0, tmp_path).append(done(items(1)[0]))
    (tmp_path / ".00001.safetensors.4711.part").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert len(LayerStore(0, tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "notes.txt"]


def metadata(path: Path, **changes: object) -> None:
    """Write what a file tells of itself anew, with these changes."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    about = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["a3q"])
    save_file(load_file(path), path, {"a3q": json.dumps(about | changes)})


@pytest.mark.parametrize("name", ["00001.safetensors", "top-embed.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b"\xff" * 1000),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: save_file(load_file(path), path),
        lambda path: save_file({}, path, {"a3q": "{"}),
        lambda path: save_file({}, path, {"a3q": "[]"}),
        lambda path: metadata(path, grids={"q": "q9_k"}),
        lambda path: metadata(path, grids={"q": {"name": "own"}}),
        lambda path: metadata(path, grids={"absent": "q4_k"}),
        lambda path: metadata(path, grids=None),
        lambda path: metadata(path, shape={"qk_head_dim": 4}),
        lambda path: metadata(path, losses={"qk": 0, "kv": 0}),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    store = LayerStore(0, tmp_path)
    for _ in range(2):
        store.append(all_kinds())
    store.keep_top("embed", all_kinds().blocks["q"])
    damage(tmp_path / name)
    message = f"{tmp_path / name}: is damaged; delete the work folder and start again"
    for use in (lambda: LayerStore(0, tmp_path), lambda: (store[1], store.top("embed"))):
        with pytest.raises(InputError) as caught:
            use()
        assert str(caught.value) == message


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    store = LayerStore(0, tmp_path)
    store.append(all_kinds())
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(InputError, match=r"00000\.safetensors: cannot be read: No such file"):
        store.finished(0)


def raising(number: int) -> Callable[..., None]:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "{0}: disk full: 00001.safetensors cannot be written; make room there, then"),
        (errno.EDQUOT, "{0}: disk full: 00001.safetensors cannot be written; make room there, then"),
        (errno.EIO, "{0}/00001.safetensors: cannot be written: Input/output error"),
    ],
)
def test_full_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    given = all_kinds()
    store = LayerStore(0, tmp_path)
    store.append(given)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(number))
        with pytest.raises(InputError) as caught:
            store.append(given)
    assert str(caught.value).startswith(says.format(tmp_path)) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]
    # Room was made.
    assert len(store) == 1
    store.append(given)
    assert same_finished(LayerStore(0, tmp_path).finished(1), given)


def test_full_temporary_folder(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(0, items(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", raising(errno.ENOSPC))
        with pytest.raises(InputError) as caught:
            store.append(done(items(1)[0]))
    says = "disk full: 00001.safetensors cannot be written; make room there, or set TMPDIR to a folder with more"
    assert str(caught.value) == f"{temp}: {says}"
    assert [path.name for path in temp.rglob("*.*")] == ["00000.safetensors"] and len(store) == 1


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", raising(errno.ENOSPC))
    with pytest.raises(InputError, match=r"no temporary folder for layers can be made: No space left .* set TMPDIR"):
        filled(0, items(1))


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    start = "import os, signal, sys, torch\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
    start += "from a3q.model import LayerShape\nfrom a3q.store import Finished, LayerStore\n"
    start += "store = LayerStore(0, folder)\ndef layer(n):\n"
    start += "    return Finished({'a': torch.arange(float(n))}, LayerShape(4, 4, 8))\n"
    return subprocess.run([sys.executable, "-c", start + code, str(folder)], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_file_that_the_system_cuts_short(tmp_path: Path) -> None:
    """The write fails by itself, in the middle."""
    code = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
store.append(layer(100))
try:
    store.append(layer(5000))
except Exception as error:
    print(type(error).__name__, error)
store.append(layer(200))
"""
    out = run(code, tmp_path).stdout
    assert out == f"InputError {tmp_path}/00001.safetensors: cannot be written: File too large\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "00001.safetensors"]
    assert [len(item["a"]) for item in LayerStore(0, tmp_path)] == [100, 200]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signal")
def test_killed_while_it_writes(tmp_path: Path) -> None:
    code = """
store.append(layer(100))
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
store.append(layer(5000))
"""
    assert run(code, tmp_path).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.part"))) == 1
    assert [len(item["a"]) for item in LayerStore(0, tmp_path)] == [100]
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]
