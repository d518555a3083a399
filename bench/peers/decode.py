"""Decoding and reading prompts with a Hugging Face model, transformers' own key-value cache.

decode.py MODEL_DIR PRECISION          every row, the experts of an MoE model by each implementation
decode.py MODEL_DIR PRECISION first    reads the model and a prompt of 32 tokens, makes one token and ends: to be timed as a process

Tokens are drawn beforehand with a fixed seed and fed whatever the model says, as llama.cpp's benchmarks do: a model with random
weights would otherwise repeat one token and visit the same experts over and over.
"""

import inspect
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from common import DTYPES

PROMPT, NEW, PREFILL = 32, 64, 512
REPEATS = 3

folder, precision = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])
model.eval()
# transformers 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
pick = torch.Generator().manual_seed(0)


def tokens(batch, count):
    return torch.randint(0, model.config.vocab_size, (batch, count), generator=pick)


def prefill(batch, count, cache=None):
    """Reads a prompt; only the logits of its last position are needed."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(input_ids=tokens(batch, count), use_cache=True, logits_to_keep=1, **{CACHE: cache})


def decode(batch):
    """New tokens of all sequences per second, the prompt not counted."""
    cache = DynamicCache(config=model.config)
    prefill(batch, PROMPT, cache)
    new = tokens(batch, NEW)
    start = time.perf_counter()
    for at in range(NEW):
        out = model(input_ids=new[:, at : at + 1], use_cache=True, **{CACHE: cache})
        out.logits.argmax(-1)
    assert cache.get_seq_length() == PROMPT + NEW, "the cache was not used"
    return batch * NEW / (time.perf_counter() - start)


def read(count):
    start = time.perf_counter()
    prefill(1, count)
    return count / (time.perf_counter() - start)


def row(name, batch, how, measure):
    start = time.perf_counter()
    speeds = [measure()]
    # The first warms up; where it took half a minute, as bf16 does on a CPU without bf16, it is the figure.
    if time.perf_counter() - start < 30:
        speeds = sorted(measure() for _ in range(REPEATS))
    out = {"name": name, "batch": batch, "precision": precision, "implementation": how, "tokens_per_second": speeds[len(speeds) // 2]}
    print(json.dumps(out), flush=True)


with torch.inference_mode():
    if sys.argv[3:] == ["first"]:
        prefill(1, PROMPT).logits.argmax(-1)
        sys.exit()
    is_moe = getattr(model.config, "num_experts", None) is not None
    for how in ("eager", "grouped_mm", "batched_mm") if is_moe else ("",):
        if is_moe:
            model.set_experts_implementation(how)
        row("decode", 1, how, lambda: decode(1))
        row("decode", 8, how, lambda: decode(8))
        # This one copies the weights of every (token, choice) pair: 12 GB for a prompt of 512.
        if how != "batched_mm":
            row("prefill", 1, how, lambda: read(PREFILL))
