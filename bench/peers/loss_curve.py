"""Trains a Hugging Face model from given weights on given batches and prints its losses.

Usage: loss_curve.py MODEL_DIR BATCHES.jsonl
The weights are those Mixtura starts from, the batches those it reads, the optimizer that of `bench/train_step.toml`, f32,
no auxiliary loss: what is left to differ is the arithmetic.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

import common  # noqa: F401  sets the number of threads

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
decay = [p for n, p in model.named_parameters() if "norm" not in n and "mlp.gate.weight" not in n]
rest = [p for n, p in model.named_parameters() if "norm" in n or "mlp.gate.weight" in n]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95)
)
losses = []
for line in open(sys.argv[2]):
    batch = json.loads(line)
    ids = torch.tensor(batch["ids"]).reshape(-1, batch["seq"])
    targets = torch.tensor([-100 if t is None else t for t in batch["targets"]])
    logits = model(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps({"losses": losses}), flush=True)
