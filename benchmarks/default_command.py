"""Wall time and peak memory of the default command, `python -m a3q convert --quant 4bit --ratio 0.25`.

python -m benchmarks.default_command [more arguments of convert]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time

from benchmarks.common import peak_memory


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "a3q", "convert", "--quant", "4bit", "--ratio", "0.25", *sys.argv[1:]]
        start = time.monotonic()
        subprocess.run([*command, "-o", f"{folder}/out.gguf"], check=True)
        seconds = time.monotonic() - start
    print(f"{seconds / 60:.1f} minutes, peak memory {peak_memory(resource.RUSAGE_CHILDREN):.2f} GiB")


if __name__ == "__main__":
    main()
