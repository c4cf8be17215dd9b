"""Write a model of random weights: its configuration and a tokenizer, and no weights.

vLLM makes them up (`--load-format dummy`), so nothing is downloaded and nothing large is written.
The shapes are those of Llama 3: what a step takes depends on the shape, not on the values. Words
mean nothing here; the tokenizer is that of the demo's model.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cost_meter.lab.tiny_model import default_path, make_tiny_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
NAME = "model"
TINY = "tiny"
GIB = 1 << 30
# Two servers of it, each with room for its contexts, fit on a card of this size.
LARGE_FROM_BYTES = 60 * GIB

_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "num_key_value_heads": 8,
}


@dataclass(frozen=True, slots=True)
class DummyShape:
    """A shape: what differs from Llama 3 8B's kind, and the context that it is served with."""

    name: str
    config: Mapping[str, Any]
    context_tokens: int

    def write(self, folder: Path) -> Path:
        """Write the model to `folder`, which is made, and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {**_LLAMA, **self.config, "max_position_embeddings": self.context_tokens}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        make_tiny_model(default_path())
        for name in TOKENIZER_FILES:
            if (source := default_path() / name).exists():
                shutil.copyfile(source, folder / name)
        return folder


SHAPES = {
    "8b": DummyShape(
        "8b",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "head_dim": 128,
        },
        65_536,
    ),
    "1b": DummyShape(
        "1b",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "head_dim": 64,
        },
        65_536,
    ),
    # For a machine without a GPU.
    TINY: DummyShape(
        TINY,
        {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 32_000,
            "torch_dtype": "float32",
        },
        8192,
    ),
}


def shape_of(name: str | None, memory_bytes: int | None) -> DummyShape:
    """Return the shape of a name, or the one that fits a card. Raises ValueError.

    Without a card (`memory_bytes` is None) that is the tiny one, which is for nothing else.
    """
    fitting = [TINY] if memory_bytes is None else [shape for shape in SHAPES if shape != TINY]
    if name is None:
        is_large = memory_bytes is not None and memory_bytes >= LARGE_FROM_BYTES
        name = fitting[0] if memory_bytes is None or is_large else fitting[-1]
    if name not in fitting:
        raise ValueError(f"--shape: expected {' or '.join(fitting)} here, got {name!r}")
    return SHAPES[name]
