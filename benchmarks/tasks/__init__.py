"""Two tasks of our own for lm-eval's `hf` backend, which run without any network: `a3q_arithmetic` and `a3q_facts`.

Both are 4-way multiple choice by log-likelihood, so chance is 0.25. `lm_eval --include_path benchmarks/tasks --tasks
a3q_arithmetic,a3q_facts` runs them too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("a3q_arithmetic", "a3q_facts")


def evaluate(
    model: Any, tokenizer: Any = None, tasks: Sequence[str] = TASKS, device: str = "cpu", limit: int | None = None
) -> dict[str, tuple[float, float]]:
    """Accuracy and its standard error by task; `model` is a Hugging Face folder or a transformers model.

    A model that is given as an object needs its tokenizer; a folder holds one.
    """
    # Read when these libraries are first imported.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    backend = HFLM(
        pretrained=str(model) if isinstance(model, str | Path) else model.to(device),
        tokenizer=tokenizer,
        device=device,
        batch_size=16,
        dtype="float32",
    )
    manager = TaskManager(include_path=str(Path(__file__).parent), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=backend, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
    )
    assert results is not None
    scores = results["results"]
    return {task: (scores[task]["acc,none"], scores[task]["acc_stderr,none"]) for task in tasks}


def accuracy(model: Any, tokenizer: Any = None, tasks: Sequence[str] = TASKS, device: str = "cpu") -> dict[str, float]:
    """Accuracy by task; see `evaluate`."""
    return {task: score for task, (score, _) in evaluate(model, tokenizer, tasks, device).items()}
