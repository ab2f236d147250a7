"""A model's shape from its Hugging Face `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmserve_env.errors import InputError
from llmserve_env.files import read_text
from llmserve_env.hardware.profile import Model

_LONGEST = "max_position_embeddings"
_BF16_BYTES = 2


def read_model(path: Path | str, name: str | None = None) -> Model:
    """Read the shape of a dense decoder with gated MLPs (Llama, Qwen, Mistral, ...).

    The weights are counted from the shape, without the few of biases and of norms inside the attention.

    Args:
        path: the file; the shape may lie in a nested text_config.
        name: name of the model; None: as the file says, or else its folder.

    Raises:
        InputError: the file cannot be used; names the key.
    """
    file = str(path)
    text = read_text(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot be read as JSON: {error}", file=file) from error
    if not isinstance(whole, dict):
        raise InputError("expected a JSON object", file=file)
    nested = whole.get("text_config")
    config = {**whole, **nested} if isinstance(nested, dict) else whole
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise InputError(
                "mixture-of-experts models are not covered by the timing model", file=file, field=key
            )

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise InputError(f"expected a whole number >= 1, found {value!r}", file=file, field=key)
        return value

    layers, hidden, vocab = number("num_hidden_layers"), number("hidden_size"), number("vocab_size")
    heads, intermediate = number("num_attention_heads"), number("intermediate_size")
    kv_heads, head_dim = number("num_key_value_heads", heads), number("head_dim", hidden // heads)
    tied = _flag(config, "tie_word_embeddings", file)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    weights = layers * layer + vocab * hidden * (1 if tied else 2) + hidden
    return Model(
        name=name or str(config.get("_name_or_path") or Path(path).resolve().parent.name),
        layers=layers,
        hidden_size=hidden,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tied_embeddings=tied,
        weight_bytes=_BF16_BYTES * weights,
        kv_bytes_per_token=_BF16_BYTES * 2 * layers * kv_heads * head_dim,
        max_model_len=None if config.get(_LONGEST) is None else number(_LONGEST),
        source=f"{Path(path).name} of the model; bytes computed from the shape at bf16",
    )


def _flag(config: dict[str, Any], key: str, file: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"expected true or false, found {value!r}", file=file, field=key)
    return value
