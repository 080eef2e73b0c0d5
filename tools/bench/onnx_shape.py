"""A random model of a known shape as a Hugging Face folder: for speed, since its text means nothing."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

#: Sizes of config.json by name of the shape. `1b`: those of Llama-3.2-1B, tied head, without its RoPE scaling.
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
}
#: Standard deviation of the weights.
STD = 0.02


def write(shape: str, n_layers: int, vocab: int, like: Path, out: Path) -> None:
    """Write the folder once, bf16, seed 0. like: a Llama-like folder whose tokenizer and token ids it takes."""
    if (out / "model.safetensors").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    given = json.loads((like / "config.json").read_text(encoding="utf-8"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPES[shape],
        "num_hidden_layers": n_layers,
        "vocab_size": vocab or given["vocab_size"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **{key: given.get(key) for key in ("bos_token_id", "eos_token_id")},
    }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (like / name).exists():
            shutil.copyfile(like / name, out / name)
    part = out / "model.part"
    save_file(_weights(config), part, metadata={"format": "pt"})
    part.rename(out / "model.safetensors")


def _weights(config: dict[str, int]) -> dict[str, torch.Tensor]:
    """Checkpoint name → bf16 tensor."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    rng = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=rng) * STD).to(torch.bfloat16)

    weights = {"model.embed_tokens.weight": random(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {f"{prefix}{name}.weight": random(*size) for name, size in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    weights["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return weights
