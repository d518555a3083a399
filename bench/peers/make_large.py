"""Writes a model of OLMoE-1B-7B's exact shape with random weights: 6.9 billion parameters, bf16, 13.8 GB in three shards.

Usage: make_large.py OUT

For trying what a machine can hold: `mixtura generate OUT --ids 1,2,3` needs 14 GB and a tokenizer beside it. Needs torch, safetensors and 6 GB
of memory.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

OUT = pathlib.Path(sys.argv[1])
D, LAYERS, HEADS, EXPERTS, CHOICES, HIDDEN, VOCAB = 2048, 16, 16, 64, 8, 1024, 50304
SHARDS = [range(0, 6), range(6, 11), range(11, 16)]
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": D,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOICES,
    "norm_topk_prob": False,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "clip_qkv": None,
    "router_aux_loss_coef": 0.01,
    "eos_token_id": 50279,
    "pad_token_id": 1,
    "torch_dtype": "bfloat16",
}

generator = torch.Generator().manual_seed(0)
# Drawing billions of numbers takes minutes; other parts of the same sixteen million do as well.
drawn = (torch.randn(1 << 24, generator=generator) * 0.02).to(torch.bfloat16)


def weight(*shape):
    count = torch.Size(shape).numel()
    start = int(torch.randint(0, 1 << 16, (1,), generator=generator))
    return drawn.repeat((start + count) // len(drawn) + 1)[start : start + count].clone().reshape(shape)


def norm():
    return torch.ones(D, dtype=torch.bfloat16)


def layer(number):
    tensors = {f"{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")}
    tensors["mlp.gate.weight"] = weight(EXPERTS, D)
    for name in "qkvo":
        tensors[f"self_attn.{name}_proj.weight"] = weight(D, D)
    for expert in range(EXPERTS):
        for name, shape in (("gate_proj", (HIDDEN, D)), ("up_proj", (HIDDEN, D)), ("down_proj", (D, HIDDEN))):
            tensors[f"mlp.experts.{expert}.{name}.weight"] = weight(*shape)
    return {f"model.layers.{number}.{name}": tensor for name, tensor in tensors.items()}


OUT.mkdir(parents=True, exist_ok=True)
(OUT / "config.json").write_text(json.dumps(CONFIG, indent=2))
places = {}
for number, layers in enumerate(SHARDS, 1):
    tensors = {name: tensor for at in layers for name, tensor in layer(at).items()}
    if number == 1:
        tensors["model.embed_tokens.weight"] = weight(VOCAB, D)
    if number == len(SHARDS):
        tensors |= {"model.norm.weight": norm(), "lm_head.weight": weight(VOCAB, D)}
    file = f"model-{number:05}-of-{len(SHARDS):05}.safetensors"
    save_file(tensors, OUT / file, metadata={"format": "pt"})
    places |= {name: file for name in tensors}
(OUT / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
