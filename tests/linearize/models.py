"""Small models to convert."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | changes))).eval()


def qwen2(**changes):
    return Qwen2ForCausalLM(Qwen2Config(**(SHAPE | changes))).eval()


def collapsed(**changes):
    """A model whose keys carry the same large number in one channel: softmax attention hardly minds."""
    model = llama(attention_bias=True, initializer_range=0.15, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            # The last channel of each half turns slowest, so that RoPE leaves the constant nearly one.
            layer.self_attn.k_proj.bias.view(2, 16)[:, 15] = 12.0
    return model


def command(folder, out, *more):
    """`regla linearize` of the model in `folder`, see the fixture of that name."""
    text = str(folder / "text.txt")
    sizes = ["--seq-len", "64", "--batch-size", "4", "--valid-tokens", "1000", "--calibration-tokens", "1024"]
    return ["linearize", str(folder / "model"), "--out", str(out), "--data", text, *sizes, *more]
