"""Whole training steps of a Hugging Face OLMoE-class model on a file of bytes.

Usage: train_step.py FILE STEPS PRECISION IMPLEMENTATION [SHAPE [fused]]
SHAPE is such as the default below; with `fused`, AdamW takes PyTorch's fused kernel. Prints one row with the median step (the first three left out), the losses of all steps and the peak memory of the
process. Same architecture, batch, optimizer and data file as `bench/train_step.toml` gives Mixtura.
"""

import resource
import sys
import time

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from common import DTYPES, row

path, steps, precision, implementation = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
SHAPE = sys.argv[5] if len(sys.argv) > 5 else "d256 L4 h4 E16 k2 f512 V512 b16 s128"
FUSED = sys.argv[6:] == ["fused"]
sizes = {axis[0]: int(axis[1:]) for axis in SHAPE.split()}
BATCH, SEQ, VOCAB = sizes["b"], sizes["s"], sizes["V"]

torch.manual_seed(0)
config = OlmoeConfig(
    vocab_size=VOCAB,
    hidden_size=sizes["d"],
    intermediate_size=sizes["f"],
    num_hidden_layers=sizes["L"],
    num_attention_heads=sizes["h"],
    num_key_value_heads=sizes["h"],
    num_experts=sizes["E"],
    num_experts_per_tok=sizes["k"],
    max_position_embeddings=2 * SEQ,
    output_router_logits=True,
    router_aux_loss_coef=0.01,
    norm_topk_prob=False,
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=1,
)
model = OlmoeForCausalLM(config)
model.set_experts_implementation(implementation)
decay = [p for n, p in model.named_parameters() if "norm" not in n and "mlp.gate.weight" not in n]
rest = [p for n, p in model.named_parameters() if "norm" in n or "mlp.gate.weight" in n]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95),
    fused=FUSED or None,
)

# A leading byte of zeros stands for "no text before": windows are drawn like Mixtura's, at random, with a fixed seed.
data = torch.frombuffer(bytearray(open(path, "rb").read()), dtype=torch.uint8).long()
pick = torch.Generator().manual_seed(0)
times, losses = [], []
for _ in range(steps):
    starts = torch.randint(0, len(data) - SEQ - 1, (BATCH,), generator=pick)
    window = torch.stack([data[s : s + SEQ + 1] for s in starts])
    begin = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=DTYPES[precision] == torch.bfloat16):
        out = model(input_ids=window[:, :-1], output_router_logits=True)
        ce = torch.nn.functional.cross_entropy(out.logits.float().reshape(-1, VOCAB), window[:, 1:].reshape(-1))
        loss = ce + config.router_aux_loss_coef * out.aux_loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - begin)
    losses.append(ce.item())

middle = sorted(times[3:])[len(times[3:]) // 2]
row(
    "train_step",
    SHAPE,
    precision,
    middle,
    tokens=BATCH * SEQ,
    implementation=implementation,
    losses=losses,
    peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    parameters=sum(p.numel() for p in model.parameters()),
)
