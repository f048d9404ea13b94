"""Ask a GGUF a question in llama.cpp, through the chat template that the file carries.

python examples/chat.py FILE.gguf "question" [more questions of the same conversation]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from llama_cpp import Llama


def main() -> None:
    if len(sys.argv) < 3 or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    llama = Llama(sys.argv[1], n_ctx=2048, verbose=False)
    messages: list[Any] = []
    for question in sys.argv[2:]:
        messages.append({"role": "user", "content": question})
        start = time.monotonic()
        reply: Any = llama.create_chat_completion(messages, max_tokens=96, temperature=0, repeat_penalty=1.1)
        seconds = time.monotonic() - start
        answer = reply["choices"][0]["message"]
        messages.append(answer)
        rate = reply["usage"]["completion_tokens"] / seconds
        print(f"> {question}\n{answer['content'].strip()}\n[{rate:.0f} tokens/s]\n")


if __name__ == "__main__":
    main()
