"""A tiny random LoRA adapter for the tiny model, in the form that PEFT saves."""

import json
from pathlib import Path

RANK = 4
# Output sizes of the tiny model's projections; what goes in is its hidden size.
HIDDEN = 256
PROJECTIONS = {"q_proj": 256, "v_proj": 128}
LAYERS = 2


def make_adapter(path: Path) -> Path:
    """Write the adapter into a folder, and return that."""
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    weights = {}
    for layer in range(LAYERS):
        for name, size in PROJECTIONS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, HIDDEN) / 100
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size, RANK) / 100
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
        "base_model_name_or_path": "tiny",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
