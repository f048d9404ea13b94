"""Written folders in the hands of transformers and of the libraries that build on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from a3q.hf.configuration_a3q import A3QConfig
from a3q.hf.modeling_a3q import A3QForCausalLM, A3QModel
from converters.hf_reader import open_huggingface
from converters.hf_writer import write_huggingface
from tests.pico import KINDS, TEXT, VOCAB, write_model
from tests.reduced import reduced

VARIANTS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS} | {
    **{f"{kind}-tied": {"kind": kind, "tied": True} for kind in KINDS},
    "llama-biases": {"kind": "llama", "bias": True, "hidden_act": "gelu"},
    "mistral-window": {"kind": "mistral", "sliding_window": 12},
    "phi3-partial": {"kind": "phi3", "rope": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    "gpt_neox-sequential": {"kind": "gpt_neox", "use_parallel_residual": False, "attention_bias": False},
    "gpt2-gelu": {"kind": "gpt2", "activation_function": "gelu"},
    "opt-no-bias": {"kind": "opt", "enable_bias": False},
    "mpt-six-heads": {"kind": "mpt", "hidden_size": 96, "num_attention_heads": 6},
}


def tokens(length: int = 48) -> Tensor:
    return torch.randint(2, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced model with a fused projection, shared keys and a tokenizer."""
    root = tmp_path_factory.mktemp("transformers")
    model = reduced(open_huggingface(write_model(root / "phi3", "phi3")))
    return write_huggingface(model, root / "phi3-a3q", dtype=torch.float32).path


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_unreduced_logits_equal_those_of_the_original(tmp_path: Path, options: dict[str, Any]) -> None:
    source = write_model(tmp_path / "source", **options)
    written = write_huggingface(open_huggingface(source), tmp_path / "written", dtype=torch.float32).path
    expected = AutoModelForCausalLM.from_pretrained(source)(tokens()).logits
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(written, attn_implementation=attention)
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=0)


def test_auto_classes(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is A3QConfig
    assert type(AutoModel.from_pretrained(folder)) is A3QModel
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is A3QForCausalLM
    assert AutoTokenizer.from_pretrained(folder).decode(AutoTokenizer.from_pretrained(folder)(TEXT).input_ids) == TEXT


IMPORTS = {
    "a3q first": (
        "import a3q, sys; assert 'torch' not in sys.modules\n"
        "import converters.open; assert 'transformers' not in sys.modules"
    ),
    "transformers first": "from transformers import LlamaForCausalLM; import a3q",
    "another model in between": "import a3q; from transformers.models.llama.modeling_llama import LlamaModel",
}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_registered_whatever_is_imported_first(folder: Path, imports: str) -> None:
    program = (
        f"{imports}\nfrom transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        f"config = AutoConfig.from_pretrained({str(folder)!r})\n"
        "print(*(type(auto.from_config(config)).__name__ for auto in (AutoModel, AutoModelForCausalLM)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["A3QModel", "A3QForCausalLM"], done.stderr


def test_lora_trains_and_merges(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    optimizer = torch.optim.AdamW((w for w in model.parameters() if w.requires_grad), lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        expected = model.eval()(tokens()).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens()).logits, expected, atol=1e-4, rtol=0)
    # What transformers saves is a folder for a3q again.
    merged.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = open_huggingface(tmp_path)
    assert again.config == open_huggingface(folder).config
    q, k, v = (again.layers[1][role] for role in ("q", "k", "v"))
    torch.testing.assert_close(torch.cat((q, k, v)), merged.model.layers[1].self_attn.qkv_proj.weight.data)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_it(folder: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    lm = huggingface.HFLM(pretrained=str(folder), device="cpu", batch_size=2, dtype="float32")
    pairs = [("The quick brown", " fox"), ("it naps under", " a tree near the old mill")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        with torch.no_grad():
            logs = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        assert score == pytest.approx(logs.gather(1, ids[0, start:, None]).sum().item(), abs=1e-3)
