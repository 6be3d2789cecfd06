"""A tiny model of every causal architecture of transformers, made from its config class with random weights."""

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 61
LAYERS = 4
# By the names that configs use, at every depth of a config. An entry that a config does not have is left out.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "is_decoder": True, "add_cross_attention": False, "tie_word_embeddings": False,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "emb_dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "embedding_dim": 32, "output_embedding_size": 32, "input_embedding_size": 32, "hidden_size_per_layer_input": 8,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "num_blocks": LAYERS,
    "decoder_layers": LAYERS, "encoder_layers": LAYERS,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "kv_n_heads": 2, "num_kv_heads": 2,
    "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_hidden_size": 48,
    "dff": 48, "n_inner": 48, "d_inner": 48, "expert_ffn_hidden_size": 24, "dim_ff": 48, "dim_head": 8, "n_special": 0,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24, "intermediate_size_mlp": 48, "d_head": 8,
    "head_dim": 8, "global_head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_head_dim": 16, "rotary_dim": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 8, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "max_target_positions": 64, "n_ctx": 64,
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "moe_top_k": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "top_k_experts": 2, "n_shared_experts": 1, "moe_k": 2,
    "moe_topk": 2, "zero_expert_num": 1, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1, "moe_layer_start_index": 1, "moe_layer_end_index": LAYERS - 1,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4, "time_step_rank": 4, "mamba_dt_rank": 4, "mamba_d_state": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_headdim": 16, "n_mamba_heads": 2, "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "state_size": 8, "ssm_state_size": 8, "n_groups": 1, "mamba_n_groups": 1, "mamba_ngroups": 1, "mamba_d_ssm": None,
    "chunk_size": 4, "mamba_chunk_size": 4, "lru_width": 32, "laurel_rank": 4, "adapter_rank": 4,
    "router_hidden_size": 8,
    "image_size": 8, "patch_size": 4, "audio_channels": 1, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "d_rel": 4, "rel_extent": 64, "unpadded_vocab_size": VOCAB - 2,
    "logits_scaling": 2.0, "lm_head_multiplier": 0.5, "sliding_window": 4,
    "pronunciation_embed_dim": 8, "shape_embed_dim": 8, "pronunciation_vocab_size": 61, "shape_vocab_size": 61,
}  # fmt: skip
# What a family needs beyond that, or differently.
_GEMMA3N = {
    "intermediate_size": 48, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SHARED_KV = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
_DOTS3 = {"num_key_value_heads": 4, "per_layer_config": {}, "head_dim": 16, "shared_experts_intermediate_size": 24}
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
    "indexer_compress_ratio": 1, "ple_embed_dim": 8, "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
    "hc_lowrank": 4,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": LAYERS
        }
    },
    "blt": {"encoder_hash_byte_group_vocab": 61},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"per_layer_config": {}, "adapter_in_dim": 32,
    "adapter_out_dim": 32}, "audio_config": {"whisper_adapter_in_dim": 32, "whisper_adapter_out_dim": 32}},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": _LINEAR_AND_FULL,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gemma4_text": _SHARED_KV,
    "gemma4": {"text_config": _SHARED_KV},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kimi_linear": _LINEAR_AND_FULL,
    "xmod": {"default_language": "en_XX"},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"] * 2,
        "attention_head_size": 8, "feed_forward_size": 48, "num_hidden_layers": 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"n_mamba_heads": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# A config class whose defaults it refuses itself.
_DEFAULTS = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    }
}  # fmt: skip


def tiny_config(model_type: str) -> PreTrainedConfig:
    make, defaults = CONFIG_MAPPING[model_type], _DEFAULTS.get(model_type, {})
    return make(**_merged(_shrunk(make(**defaults).to_dict()), OVERRIDES.get(model_type, {})))


def make_causal(model_type: str) -> PreTrainedModel:
    """The same weights at every call, in fp32 and eval mode, large enough for every fault to show in the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                spread = parameter.std()
                parameter.mul_(0.2 / spread) if spread > 0 else parameter.normal_(0, 0.2)
            elif parameter.dim() == 1 and not parameter.any() and not name.endswith("bias"):
                parameter.normal_(0, 0.2)  # scales that begin at 0 hide what they scale
        head = model.get_output_embeddings()
        if head is not None:
            head.weight.mul_(5)
    return model


def _shrunk(entries: dict[str, Any]) -> dict[str, Any]:
    """Only the entries that differ from the defaults, so that whatever depends on the sizes is derived again."""
    nested = {
        name: {"model_type": entry["model_type"], **_shrunk(entry)} if entry.get("model_type") else _shrunk(entry)
        for name, entry in entries.items()
        if isinstance(entry, dict) and "id2label" in entry
    }
    sizes = {name: SIZES[name] for name in entries if name in SIZES}
    if entries.get("num_key_value_heads") == entries.get("num_attention_heads") and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return sizes | nested


def _merged(entries: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(entries)
    for name, value in changes.items():
        merged[name] = _merged(merged[name], value) if isinstance(value, dict) and name in merged else value
    return merged
