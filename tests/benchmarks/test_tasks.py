"""The items of our lm-eval tasks, and a run without any network."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

import pytest

from benchmarks.tasks import TASKS, evaluate
from tests.pico import write_model

lm_eval = pytest.importorskip("lm_eval")

FOLDER = Path(__file__).parents[2] / "benchmarks" / "tasks"


def test_files_are_what_the_script_writes() -> None:
    from benchmarks.tasks.generate import SEED, arithmetic, facts

    for name, items in zip(TASKS, (arithmetic, facts), strict=True):
        lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == items(random.Random(SEED))


@pytest.mark.parametrize("name", TASKS)
def test_items_have_four_choices_and_answers_everywhere(name: str) -> None:
    items = [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(items) >= 200
    assert len({item["prompt"] for item in items}) == len(items)
    assert all(len(set(item["choices"])) == 4 for item in items)
    share = [sum(item["label"] == place for item in items) / len(items) for place in range(4)]
    assert min(share) > 0.15


def test_sums_are_right() -> None:
    for line in (FOLDER / "a3q_arithmetic.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        a, sign, b, _ = item["prompt"].split()
        assert int(item["choices"][item["label"]]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_random_model_scores_near_chance_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a task asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    scores = evaluate(write_model(tmp_path / "pico"), limit=40)
    assert set(scores) == set(TASKS)
    for score, stderr in scores.values():
        assert score < 0.6
        assert 0.02 < stderr < 0.1
