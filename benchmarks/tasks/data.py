"""Items of the tasks as lm-eval wants them; the YAML files call `load`.

lm-eval's own `data_files` are relative to the working directory, and Hugging Face's JSON loader copies them to a cache.
This file finds them beside itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

SHOTS = 5
"""First items of each file; they are shown as examples and not scored."""


def load(file: str, **_: Any) -> DatasetDict:
    """Splits `shots` and `test` of a JSON lines file in this folder."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    return DatasetDict({"shots": Dataset.from_list(items[:SHOTS]), "test": Dataset.from_list(items[SHOTS:])})
