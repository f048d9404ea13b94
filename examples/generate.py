"""Ask a folder that `a3q reduce` wrote a question in transformers, and show the sizes of its key/value cache.

python examples/generate.py FOLDER "What is the capital of France?"
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3q  # noqa: F401 (makes transformers know the model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    for prompt in args.prompts:
        if tokenizer.chat_template is None:
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            messages = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=args.tokens, do_sample=False, return_dict_in_generate=True, use_cache=True
            )
        answer = out.sequences[0, inputs["input_ids"].shape[1] :]
        print(f"> {prompt}\n{tokenizer.decode(answer, skip_special_tokens=True)}\n")
    sizes = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in out.cache.layers]
    print("key and value size of each layer's cache:", *(f"{k}/{v}" for k, v in sizes))


if __name__ == "__main__":
    main()
