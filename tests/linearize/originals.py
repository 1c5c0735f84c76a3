"""A small model of every family that converts, in its variants; as many as one layer of each kind needs."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: What all have in common, by the names of most.
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
TWELVE = {"hidden_size": 96, "num_attention_heads": 12}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

#: Arguments of each variant: "model_type" or "model_type, what is special".
VARIANTS = {
    "llama": {},
    "llama, scaled RoPE": {"rope_parameters": LLAMA3},
    "llama, biases, one key head": TWELVE | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "mistral": {"sliding_window": None},
    "mistral, own head size": {"sliding_window": None, "head_dim": 24},
    "mistral, windows": {"sliding_window": 16},
    "qwen2": {},
    "qwen2, tied, one key head": TWELVE | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2, windows": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3, biases, one key head": TWELVE | {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1},
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "gemma3_text": WINDOWS | {"head_dim": 16, "query_pre_attn_scalar": 24},
    "gemma3_text, soft-cap, one key head": WINDOWS
    | TWELVE
    | {"head_dim": 8, "query_pre_attn_scalar": 20, "num_key_value_heads": 1, "final_logit_softcapping": 5.0},
    "gemma3_text, scaled RoPE": WINDOWS
    | {
        "head_dim": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "olmo2": {},
    "olmo2, one key head": TWELVE | {"num_key_value_heads": 1},
    "granite": {
        "attention_multiplier": 0.05,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "phi3": {},
    "phi3, partial rotary, one key head": TWELVE
    | {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "phi3, windows": {"sliding_window": 16},
    "phi3, RoPE of two scales": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 32,
        },
    },
    "gpt_neox": TWELVE,
    "gpt_neox, 9 heads, one after the other": {
        "use_parallel_residual": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
    "gpt_neox, scaled RoPE, no biases": TWELVE
    | {"attention_bias": False, "rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    "gpt2": TWELVE,
    "gpt2, 9 heads, scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
}

#: One variant of each family.
FIRST = [name for name in VARIANTS if "," not in name]


def original(name, **changes):
    """The model of this variant. Its weights are drawn so that no two alike take each other's place unseen."""
    model_type = name.partition(",")[0]
    arguments = SHAPE | VARIANTS[name] | changes
    if model_type in ("gpt_neox", "gpt2"):  # no shared key heads
        arguments.pop("num_key_value_heads")
    return stir(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**arguments)).eval())


def stir(model):
    """Biases and norms start at constants, which would hide a mix-up."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
