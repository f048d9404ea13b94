"""Calibration windows from each kind of source, mostly with a tokenizer whose tokens tell their place in the text."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q import calibration
from a3q.calibration import HELD_OUT, HELD_OUT_LENGTH, MINIMUM_TOKENS, Calibration, calibration_tokens, self_text
from a3q.errors import InputError
from a3q.model import Model
from converters.hf_reader import open_huggingface
from tests.pico import corpus, write_model

CPU = torch.device("cpu")
BOS, EOS = 0, 1
CHAT = "{% for m in messages %}{{ bos_token }}{{ m.role }} {{ m.content }}{{ eos_token }}\n{% endfor %}"


@dataclass
class Numbers:
    """Reads the text's numbers: each is the token of that id."""

    metadata: dict[str, Any] = field(
        default_factory=lambda: {"tokenizer.ggml.tokens": SimpleNamespace(value=["<s>", "</s>"])}
    )
    vocab_size: int = 1 << 30
    bos_id: int | None = BOS
    eos_id: int | None = EOS
    add_bos: bool = False
    chat_template: str | None = CHAT

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        marks = {"<s>": BOS, "</s>": EOS} if special else {}
        return [
            marks[one] if one in marks else int(one)
            for one in re.findall(r"\d+|</?s>", text)
            if one.isdigit() or special
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(write_model(tmp_path_factory.mktemp("pico")))


@pytest.fixture
def model(pico: Model) -> Model:
    return replace(pico, tokenizer=Numbers())


def windows(model: Model, source: str | Path, count: int = 8, length: int = 256) -> Calibration:
    return calibration_tokens(model, str(source), count, length, seed=0, device=CPU)


def numbers(path: Path, count: int, per_line: int = 10, first: int = 10) -> Path:
    """A text of unique tokens, counting up."""
    lines = (range(i, min(i + per_line, first + count)) for i in range(first, first + count, per_line))
    path.write_text("\n".join(" ".join(map(str, line)) for line in lines))
    return path


def rows(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def number_rows(path: Path, count: int, per_row: int) -> Path:
    return rows(path, *({"text": " ".join(map(str, range(i, i + per_row)))} for i in range(10, 10 + count, per_row)))


def assert_disjoint(result: Calibration, first: int = 2) -> None:
    ids = torch.cat([result.tokens.flatten(), result.held_out.flatten()])
    ids = ids[ids >= first]
    assert len(ids.unique()) == len(ids)


def assert_runs(ids: Tensor) -> None:
    assert (ids.diff(dim=1) == 1).all()


def assert_repeats(ids: Tensor, cycle: list[int]) -> None:
    for row in ids.tolist():
        n = len(cycle)
        assert any(row == [cycle[(i + shift) % n] for i in range(len(row))] for shift in range(n))


def test_windows_are_spread_and_held_out_ones_are_among_them(model: Model, tmp_path: Path) -> None:
    path = numbers(tmp_path / "valid.txt", 50_000)
    result = windows(model, path, 60, 512)
    assert result.tokens.shape == (60, 512)
    assert result.held_out.shape == (HELD_OUT, HELD_OUT_LENGTH)
    assert result.tokens.dtype == result.held_out.dtype == torch.int64
    assert (result.source, result.description) == ("valid.txt", "60 × 512 tokens of valid.txt")
    assert_disjoint(result)
    assert_runs(result.tokens)
    assert_runs(result.held_out)
    assert result.tokens[0, 0] == 10
    assert result.tokens[-1, -1] == 50_009
    steps = result.tokens[:, 0].diff()
    assert steps.max() < 2.2 * 50_000 / 64
    assert (result.held_out[:, 0].diff() - 12_500).abs().max() < 1000

    again = windows(model, path, 60, 512)
    assert torch.equal(again.tokens, result.tokens)
    assert torch.equal(again.held_out, result.held_out)


def test_bos_takes_the_place_of_each_first_token(model: Model, tmp_path: Path) -> None:
    path = numbers(tmp_path / "text", 10_000)
    plain = windows(model, path)
    marked = windows(replace(model, tokenizer=Numbers(add_bos=True)), path)
    for one, other in ((plain.tokens, marked.tokens), (plain.held_out, marked.held_out)):
        assert (other[:, 0] == BOS).all()
        assert torch.equal(one[:, 1:], other[:, 1:])


@pytest.mark.parametrize("available", [1024, 1100, 2000, 3000, 5000, 9999, 10_239, 10_240, 12_287, 12_288])
@pytest.mark.parametrize("length", [128, 300, 1024])
def test_short_text_is_used_up_and_said_to_be_short(model: Model, tmp_path: Path, available: int, length: int) -> None:
    count = 10240 // length
    result = windows(model, numbers(tmp_path / "short", available), count, length)
    assert_disjoint(result)
    assert 1 <= len(result.held_out) <= HELD_OUT
    assert result.held_out.shape[1] >= 128
    B, T = result.tokens.shape
    assert 2 <= B <= count
    assert 128 <= T <= length
    full = result.tokens.shape == (count, length)
    assert full or result.tokens.numel() + result.held_out.numel() > 0.85 * available
    assert full == (f"({count} × {length} wanted)" not in result.description)
    assert result.description.startswith(f"{B} × {T} tokens of short")


def test_too_little_text(model: Model, tmp_path: Path) -> None:
    path = numbers(tmp_path / "little", MINIMUM_TOKENS - 1)
    with pytest.raises(
        InputError, match=r"little: only 1023 tokens of text; calibration needs at least 1024; .*--calib"
    ):
        windows(model, path)
    for name in ("empty", "empty.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f"{name}: only 0 tokens"):
            windows(model, tmp_path / name)


def test_real_tokenizer(pico: Model, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\r\n".join(corpus(600)).encode())
    result = windows(pico, path, 4, 128)
    ids = pico.tokenizer.encode(path.read_bytes().decode())
    bos = [pico.tokenizer.bos_id] if pico.tokenizer.add_bos else ids[:1]
    assert result.tokens[0].tolist() == bos + ids[1:128]


def test_rows_are_joined_by_eos(model: Model, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", *({"text": " ".join(["5"] * 99), "id": 3} for _ in range(50)))
    path.write_text(path.read_text().replace("\n", "\n\n", 3))
    result = windows(model, path, 2, 200)
    assert_repeats(result.tokens, [5] * 99 + [EOS])
    without = windows(replace(model, tokenizer=Numbers(eos_id=None)), path, 2, 200)
    assert without.tokens.unique().tolist() == [5]


def test_chats_are_rendered(model: Model, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "7 8"}, {"role": "assistant", "content": "9"}]
    path = rows(tmp_path / "b.JSONL", *({"messages": chat} for _ in range(300)))
    result = windows(model, path, 2, 140)
    # Every turn ends in EOS; none is added.
    assert_repeats(result.tokens, [BOS, 7, 8, EOS, BOS, 9, EOS])


def test_what_templates_expect(model: Model, tmp_path: Path) -> None:
    template = (
        "{%- for m in messages %}\n    {%- generation %}\n{{ m | tojson(indent=1) }}{% endgeneration %}"
        "{% if loop.index == 1 %}{% break %}{% endif %}{% endfor %} {{ strftime_now('%Y') }}"
    )
    path = rows(tmp_path / "c.jsonl", *[{"messages": [{"role": "<", "content": "3"}, {"role": "b"}]}] * 1000)
    result = windows(replace(model, tokenizer=Numbers(chat_template=template, eos_id=None)), path, 2, 128)
    assert_repeats(result.tokens, [3, 2025])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('false') }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ none.x.y }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        None,
    ],
)
def test_hostile_and_broken_templates(model: Model, tmp_path: Path, template: str | None) -> None:
    path = rows(tmp_path / "d.jsonl", *[{"messages": [{"role": "user", "content": "7"}]}] * 2000)
    with pytest.raises(
        InputError, match=r"d\.jsonl: line 1: the model's chat template fails: .*give rows with"
    ) as error:
        windows(replace(model, tokenizer=Numbers(chat_template=template)), path)
    assert "\n" not in str(error.value)


def test_harmless_attribute_gives_nothing(model: Model, tmp_path: Path) -> None:
    path = rows(tmp_path / "e.jsonl", *[{"messages": [{"role": "user", "content": "7"}]}] * 2000)
    with pytest.raises(InputError, match="only"):
        windows(replace(model, tokenizer=Numbers(chat_template="{{ ''.__class__ }}", eos_id=None)), path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "line 3: is not JSON: Expecting value"),
        (b"[" * 100_000, "line 3: is not JSON: "),
        (b"[1]", "line 3: is not a JSON object"),
        (b"null", "line 3: is not a JSON object"),
        (b'{"prompt": "a", "answer": "b"}', "line 3: has no `text` .* but prompt, answer"),
        (b'{"text": 5}', "line 3: has no `text`"),
        (b'{"messages": []}', "line 3: `messages` is not a list"),
        (b'{"messages": ["hi"]}', "line 3: `messages` is not a list"),
        (b'{"text": "\xff"}', "line 3: is not UTF-8"),
    ],
)
def test_bad_rows_are_named(model: Model, tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "5"}\n\n' + line + b'\n{"text": "5"}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl: " + message):
        windows(model, path)


def test_lone_surrogates_and_byte_order_marks(pico: Model, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a\\ud800b and more of it"}\n' * 500)
    assert windows(pico, path, 2, 128).tokens.shape == (2, 128)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x89PNG\r\n", r"not UTF-8 text \(byte 0\)"), ("text".encode("utf-16"), "not UTF-8"), (b"a\0b", "NUL")],
)
def test_what_is_not_text(model: Model, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        windows(model, path)


def test_pipe_is_read(model: Model) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as file:
        file.write(" ".join(["5"] * 5000))
    try:
        assert windows(model, f"/dev/fd/{read}", 2, 128).tokens.unique().tolist() == [5]
    finally:
        os.close(read)


# Files too large to be read whole


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that the operating system was asked for; every file above 64 KiB counts as large if it can."""
    sizes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            got = super().readinto(buffer) or 0
            sizes.append(got)
            return got

        def readall(self) -> bytes:
            raise AssertionError("the file is read whole")

    plain = Path.open

    def open_counted(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return io.BufferedReader(Counted(path)) if mode == "rb" else plain(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_counted)
    monkeypatch.setattr(calibration, "_WHOLE_FILE", 1 << 16)
    yield sizes


@pytest.mark.parametrize("kind", ["lines", "one line", "jsonl"])
def test_large_file_is_read_in_places(model: Model, tmp_path: Path, bytes_read: list[int], kind: str) -> None:
    path = tmp_path / ("large.jsonl" if kind == "jsonl" else "large.txt")
    if kind == "jsonl":
        number_rows(path, 1_000_000, 40)
    else:
        numbers(path, 1_000_000, 10 if kind == "lines" else 1_000_000, first=1_000_000)
    result = windows(model, path, 20, 128)
    assert (result.tokens.shape, result.held_out.shape) == ((20, 128), (HELD_OUT, HELD_OUT_LENGTH))
    assert_disjoint(result, first=1_000_000 if kind == "one line" else 2)  # a number may be cut where a window starts
    assert 0 < sum(bytes_read) < 0.1 * path.stat().st_size
    if kind != "jsonl":
        assert_runs(result.tokens[:, 1:] if kind == "one line" else result.tokens)
    begins = (result.tokens[:, 1] - result.tokens[0, 1]) / 1_000_000
    assert begins[-1] > 0.9
    assert begins.diff().max() < 0.1
    again = windows(model, path, 20, 128)
    assert torch.equal(again.tokens, result.tokens)


def test_characters_are_not_cut(pico: Model, tmp_path: Path, bytes_read: list[int]) -> None:
    for shift in range(4):
        path = tmp_path / f"large{shift}"
        path.write_text("x" * shift + "🫠" * 100_000)
        ids = windows(pico, path, 20, 64).tokens[:, 1:].flatten().tolist()
        assert set(ids) <= {*pico.tokenizer.encode("🫠"), *pico.tokenizer.encode("x"), *pico.tokenizer.encode("xxx")}


def test_few_long_rows_are_used_as_far_as_needed(model: Model, tmp_path: Path, bytes_read: list[int]) -> None:
    path = tmp_path / "long.jsonl"
    rows(path, {"text": " ".join(map(str, range(10, 200_000)))}, {"text": " ".join(map(str, range(200_000, 400_000)))})
    result = windows(model, path, 20, 128)
    assert result.description == "20 × 128 tokens of long.jsonl"
    assert_disjoint(result)


def test_little_text_in_a_large_file(model: Model, tmp_path: Path, bytes_read: list[int]) -> None:
    path = tmp_path / "sparse.txt"
    path.write_text("\n".join(f"{i} {'-' * 1000}" for i in range(10, 1500)))
    result = windows(model, path, 20, 128)
    assert "20 × 128 wanted" in result.description
    assert_disjoint(result)
    (tmp_path / "bad").write_bytes(b"5 " * 100_000 + b"\xff " * 100_000)
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 2\d{5}\)"):
        windows(model, tmp_path / "bad", 20, 128)


def test_bad_row_and_endless_line_of_a_large_file(
    model: Model, tmp_path: Path, bytes_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = number_rows(tmp_path / "large.jsonl", 200_000, 40)
    content = path.read_text()
    half = content.index("\n", len(content) // 2) + 1
    path.write_text(content[:half] + "oops\n" * 2000 + content[half:])
    with pytest.raises(InputError, match=r"large\.jsonl: the line at byte \d+: is not JSON"):
        windows(model, path, 20, 128)
    monkeypatch.setattr(calibration, "_LINE_LIMIT", 1 << 16)
    path.write_text(json.dumps({"text": "5 " * 500_000}))
    with pytest.raises(InputError, match="has a line of more than"):
        windows(model, path, 20, 128)


# The model itself


def test_self_text(pico: Model) -> None:
    seen: list[int] = []
    result = calibration_tokens(pico, "self", 3, 24, seed=5, device=CPU, on_tokens=seen.append)
    assert result.tokens.shape == (3, 24)
    assert result.held_out.shape == (HELD_OUT, 24)
    assert (result.source, result.description) == ("self", "3 × 24 tokens that the model wrote itself")
    assert sum(seen) == 24 * (3 + HELD_OUT) or sum(seen) == 23 * (3 + HELD_OUT)
    same = self_text(pico, 3 + HELD_OUT, 24, 5, CPU)
    assert torch.equal(torch.cat([result.tokens, result.held_out]), same)
    assert not torch.equal(self_text(pico, 3 + HELD_OUT, 24, 6, CPU), same)


@pytest.mark.parametrize("add_bos", [False, True])
def test_first_tokens_are_normal(pico: Model, add_bos: bool) -> None:
    kinds = pico.tokenizer.metadata["tokenizer.ggml.token_type"]
    only = [1 if i in (70, 90) else 3 for i in range(512)]
    metadata = pico.tokenizer.metadata | {"tokenizer.ggml.token_type": replace(kinds, value=only)}
    tokenizer = replace(pico.tokenizer, metadata=metadata, add_bos=add_bos)  # type: ignore[type-var]
    ids = self_text(replace(pico, tokenizer=tokenizer), 30, 4, 0, CPU)
    assert set(ids[:, int(add_bos)].tolist()) == {70, 90}
    assert not add_bos or (ids[:, 0] == BOS).all()


# What is neither


@pytest.mark.parametrize("source", ["none.txt", "./none", "/none/none", "~/none", "a/b/c", "..\\none", "some.jsonl"])
def test_missing_file_is_named(model: Model, source: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"{source}: no such file") + "$"):
        windows(model, source)


def test_unusable_paths(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        windows(model, tmp_path)
    with pytest.raises(InputError, match="no such file"):
        windows(model, f"{tmp_path.name}/none" if Path(tmp_path.name).is_dir() else tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        windows(model, "n" * 5000)


class Hub:
    """Stands for the `datasets` library and the Hub."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.asked, self.taken = rows, (), 0

    def load_dataset(self, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked = (*args, options)
        for row in self.rows:
            self.taken += 1
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub([])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    return hub


def test_data_set_is_streamed_as_far_as_needed(model: Model, hub: Hub) -> None:
    hub.rows = [{"text": " ".join(map(str, range(i, i + 100)))} for i in range(10, 100_010, 100)]
    result = windows(model, "org/some-v1.5:en:validation")
    options = {"split": "validation", "streaming": True, "trust_remote_code": False}
    assert hub.asked == ("org/some-v1.5", "en", options)
    assert hub.taken < 60
    assert result.source == "org/some-v1.5:en:validation"
    assert_disjoint(result)
    assert (result.tokens == EOS).sum() > 10
    windows(model, "some")
    assert hub.asked == ("some", None, options | {"split": "train"})


def test_lines_of_a_data_set_are_one_text(model: Model, hub: Hub) -> None:
    hub.rows = [{"text": ""}, {"text": "5 5\n"}, {"text": None}] * 1000
    assert windows(model, "wikitext", 2, 128).tokens.unique().tolist() == [5]


def test_data_set_that_cannot_be_used(model: Model, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(InputError, match=r"^some: row 0: has no `text` .* but question, answer$"):
        windows(model, "some")
    for source in ("a:b:c:d", ":b"):
        with pytest.raises(InputError, match="pass a text file instead"):
            windows(model, source)

    def offline(self: Any, name: str, timeout: float) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(InputError, match=r"^some: no such file.*: no network; pass a text file instead$"):
        windows(model, "some")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "a3q\[datasets\]"'):
        windows(model, "some")
