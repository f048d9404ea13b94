"""Writes the items of both tasks, the same at every run: `python -m benchmarks.tasks.generate`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from benchmarks.tasks.data import SHOTS
from benchmarks.tasks.facts import CLOZES, PAIRS

SEED = 2505
ARITHMETIC_ITEMS = 400
LARGEST = 20
"""Of the numbers that are added or subtracted."""

Item = dict[str, str | list[str] | int]


def item(rng: random.Random, prompt: str, right: str, wrong: Iterable[str]) -> Item:
    choices = [right, *wrong]
    assert len(set(choices)) == 4, choices
    rng.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "label": choices.index(right)}


def arithmetic(rng: random.Random) -> list[Item]:
    """As many sums as differences, no item twice; the wrong results lie within 3 of the right one."""
    items: dict[str, Item] = {}
    while len(items) < SHOTS + ARITHMETIC_ITEMS:
        a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
        if len(items) % 2:
            a, b = max(a, b), min(a, b)
            prompt, result = f"{a} - {b} =", a - b
        else:
            prompt, result = f"{a} + {b} =", a + b
        if prompt in items:
            continue
        near = [result + step for step in (-3, -2, -1, 1, 2, 3) if result + step >= 0]
        items[prompt] = item(rng, prompt, str(result), map(str, rng.sample(near, 3)))
    return list(items.values())


def facts(rng: random.Random) -> list[Item]:
    """All of `benchmarks.tasks.facts`, in random order."""
    items = [item(rng, prompt, right, wrong) for prompt, right, *wrong in CLOZES]
    for template, pairs in PAIRS.items():
        for subject, right in pairs:
            others = [answer for _, answer in pairs if answer != right]
            items.append(item(rng, template.format(subject), right, rng.sample(others, 3)))
    rng.shuffle(items)
    return items


def main() -> None:
    for name, items in (("a3q_arithmetic", arithmetic), ("a3q_facts", facts)):
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in items(random.Random(SEED)))
        (Path(__file__).parent / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
