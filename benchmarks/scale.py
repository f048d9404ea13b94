"""How fast a3q is on models of real sizes, and what memory it needs.

    python -m benchmarks.scale llama-3.1-8b -o results.json [--layers 4 --ratio 0.25 --quant Q4_K_M --device cuda]
    python -m benchmarks.scale MODEL_FOLDER -o results.json --limit-memory 6GiB --no-stages

First the command itself, `python -m a3q convert`, in a process of its own: wall time, a3q's own stage times, peak
memory, under limits if so told. Then what the machine can do at best (`benchmarks.scale_rates`), and the same
conversion once more in this process with timers around its parts (`benchmarks.scale_stages`). Nothing is found in a
cache. Of a shape's first `--layers`, times of the whole model are extrapolated (`benchmarks.scale_extrapolation`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import a3q
from a3q.calibration import HELD_OUT, HELD_OUT_LENGTH, SELF
from a3q.model import pick_device
from a3q.pipeline import WINDOWS
from a3q.settings import parse_size
from benchmarks.limits import Usage, end_cleanly, run_watched
from benchmarks.random_words import random_text
from benchmarks.scale_extrapolation import Estimate, extrapolate
from benchmarks.scale_rates import reference_rates
from benchmarks.scale_stages import Section, Timers
from benchmarks.scale_tables import show
from benchmarks.shapes import SHAPES, weight_bytes, write_shape

_REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """A conversion that is measured."""

    model: Path
    ratio: float
    quant: str
    calib: str
    calib_tokens: int
    device: str
    memory: str | None = None
    """a3q's own `--memory`."""

    def arguments(self, output: Path) -> list[str]:
        """What `python -m a3q` is given."""
        return [
            *("convert", str(self.model), "-o", str(output), "--force", "--no-verify", "--no-report"),
            *("--quant", self.quant, "--ratio", f"{self.ratio:g}", "--device", self.device),
            *("--calib", self.calib, "--calib-tokens", str(self.calib_tokens)),
            *(() if self.memory is None else ("--memory", self.memory)),
        ]

    def convert(self, output: Path, timers: Timers) -> int:
        """The same in this process; the written file's size."""
        result = a3q.convert(
            self.model,
            ratio=self.ratio,
            quant=self.quant,
            output=output,
            calib=self.calib,
            calib_tokens=self.calib_tokens,
            device=self.device,
            verify_file=False,
            force=True,
            memory_budget=None if self.memory is None else parse_size("--memory", self.memory),
            stages=timers.stages,
        )
        return result.written.size


@contextmanager
def empty_cache() -> Iterator[Path]:
    """A cache folder for a3q in which nothing is."""
    with tempfile.TemporaryDirectory(prefix="a3q-cache-") as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def run_command(job: Job, output: Path, limit: int | None, gpu_memory: str | None) -> tuple[Usage, dict[str, float]]:
    """Usage of the command, and the stage times that it prints, in whole seconds; its output stays beside `output`."""
    module = ["a3q"] if gpu_memory is None else ["benchmarks.limits", "--gpu-memory", gpu_memory]
    log = output.with_suffix(".log")
    with empty_cache():
        path = os.pathsep.join(filter(None, (str(_REPOSITORY), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "1000"}
        usage = run_watched([sys.executable, "-m", *module, *job.arguments(output)], log, limit, env)
    text = log.read_text(encoding="utf-8", errors="replace")
    if usage.code != 0:
        print(f"the command ended with {usage.code}; the end of {log}:\n{text[-2000:]}", file=sys.stderr)
    line = re.search(r"^\d+ s: (.+)$", text, re.MULTILINE)
    stages = {} if line is None else dict(re.findall(r"(\S[^,]*) (\d+)(?:,|\s*$)", line[1]))
    return usage, {title: float(seconds) for title, seconds in stages.items()}


def run_timed(job: Job, output: Path) -> tuple[Timers, list[str], int | None]:
    """Timers after the conversion, the functions that were not found, and the peak of the GPU's memory."""
    device = pick_device(job.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timers = Timers(device)
    with empty_cache(), timers.installed() as missing:
        job.convert(output, timers)
    return timers, missing, torch.cuda.max_memory_reserved() if device.type == "cuda" else None


def estimates(
    timers: Timers, shape: str, layers: int, command: tuple[float, dict[str, float]] | None
) -> dict[str, Estimate]:
    """Times of the whole model: of the command, if it ran (wall time and stages), else of the timed pass."""
    of, share = SHAPES[shape].layers, weight_bytes(shape) / weight_bytes(shape, layers)
    sections, scale = dict(timers.sections), None
    if command is not None:
        wall, printed = command
        # Whole seconds of short stages say nothing.
        scale = {title: s if s >= 10 else timers.sections[title].seconds for title, s in printed.items()}
        scale["rest"] = max(0.0, wall - sum(scale.values()))
        sections["rest"] = Section(scale["rest"])
    return extrapolate(sections, layers, of, share, scale)


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were taken on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    facts = {"cpus": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "device": gpu or "CPU"}
    return {**facts, "platform": platform.platform(), "torch": torch.__version__, "a3q": a3q.__version__}


def measure(args: argparse.Namespace, work: Path) -> dict[str, object]:
    """All that was asked for, as the JSON file has it."""
    device, shape = pick_device(args.device), args.model if args.model in SHAPES else None
    model = Path(args.model)
    if shape is not None:
        layers = args.layers or SHAPES[shape].layers
        model = work / f"{shape}-{layers}"
        if not (model / "tokenizer_config.json").is_file():  # which is written last
            write_shape(shape, model, layers)
    elif args.layers is not None or not (model / "config.json").is_file():
        sys.exit(f"{args.model}: give a model folder, without --layers, or one of {', '.join(SHAPES)}")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    count, length = WINDOWS[device.type]
    tokens = args.calib_tokens or count * min(length, config["max_position_embeddings"])
    calib = args.calib
    if calib is None:
        calib = str(work / "calibration.txt")
        wanted = tokens + HELD_OUT * HELD_OUT_LENGTH
        Path(calib).write_text(random_text(wanted + wanted // 8, config["vocab_size"]), encoding="utf-8")
    job = Job(model, args.ratio, args.quant, calib, tokens, args.device, args.memory)
    found: dict[str, object] = {
        "model": args.model,
        "layers": config["num_hidden_layers"],
        "of_layers": config["num_hidden_layers"] if shape is None else SHAPES[shape].layers,
        "model_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "job": {**asdict(job), "model": model.name, "calib": "self" if calib == SELF else Path(calib).name},
        "machine": machine(device),
    }
    # The command comes first: what the kernel tells as its peak begins at what this process has.
    command = None
    if args.run:
        limit = None if args.limit_memory is None else parse_size("--limit-memory", args.limit_memory)
        usage, stages = run_command(job, work / "command.gguf", limit, args.gpu_memory)
        found["command"] = {**asdict(usage), "stages": stages, "gpu_memory": args.gpu_memory}
        command = (usage.seconds, stages) if usage.code == 0 else None
    found["rates"] = reference_rates(device, work)
    if args.stages:
        timers, missing, gpu = run_timed(job, work / "stages.gguf")
        found["sections"] = {title: asdict(section) for title, section in timers.sections.items()}
        found["stages"] = [
            {"section": title, "name": name, "overlapped": overlapped, **asdict(tally)}
            for (title, name, overlapped), tally in timers.tallies.items()
        ]
        found["not_found"], found["misread"], found["gpu_reserved"] = missing, timers.misread, gpu
        if shape is not None and layers < SHAPES[shape].layers:
            whole = estimates(timers, shape, layers, command)
            found["extrapolated"] = {title: asdict(one) for title, one in whole.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"model folder, or one of {', '.join(SHAPES)}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--layers", type=int, help="of a shape, only so many")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--quant", default="Q4_K_M")
    parser.add_argument("--calib", help="self, or a text file; random words unless told")
    parser.add_argument("--calib-tokens", type=int, help="a3q's own number for the device unless told")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--memory", metavar="SIZE", help="a3q's own option")
    parser.add_argument("--limit-memory", metavar="SIZE", help="of the command's process (benchmarks.limits)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="the same on the device")
    parser.add_argument("--run", action=argparse.BooleanOptionalAction, default=True, help="the command itself")
    parser.add_argument("--stages", action=argparse.BooleanOptionalAction, default=True, help="the timed pass")
    parser.add_argument("--work", type=Path, help="folder for models and outputs, which stay there; else temporary")
    args = parser.parse_args()
    end_cleanly()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        found = measure(args, args.work)
    else:
        with tempfile.TemporaryDirectory(prefix=".a3q-scale-", dir=args.output.absolute().parent) as folder:
            found = measure(args, Path(folder))
    args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
