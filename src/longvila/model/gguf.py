"""A Llama-family GGUF file written out as an ordinary Qwen2 checkpoint.

1. The header gives the sizes; the tokenizer comes from the same file through transformers.
2. Each tensor is dequantised by the ``gguf`` library: 4- and 8-bit blocks are products of small
   integers and float16 scales, exact in float32.
3. Rows of the query and key projections are put back from GGUF's rotary order (pairs side by side)
   into Hugging Face's (halves).
4. Llama is Qwen2 without biases on q, k and v, so zero biases make it one, exactly.

Cost: seconds, and the float32 weights in memory once. Other architectures, and rotary angles that
are scaled, are refused.

Dimensions: H heads, D head dim, M model dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config

from longvila.errors import CheckpointError

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """Translate a GGUF tensor name into Qwen2's.

    Args:
        name: Such as ``blk.3.attn_q.weight``.

    Returns:
        Such as ``model.layers.3.self_attn.q_proj.weight``.

    Raises:
        CheckpointError: If no place is known for it.
    """
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}"
    raise CheckpointError(f"GGUF tensor {name} has no place in a Qwen2 model")


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's rotary row order of a query or key projection.

    Args:
        weight: Shape (H * D, M), rows of a head ordered (0, D/2, 1, D/2 + 1, ...).
        heads: H.

    Returns:
        Same shape, rows of a head in Hugging Face's order.
    """
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.view(heads, half, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_gguf(path: Path) -> tuple[Qwen2Config, dict[str, Tensor]]:
    """Read a Llama GGUF as the configuration and float32 weights of a Qwen2 model.

    Args:
        path: A single GGUF file.

    Returns:
        The configuration and the state dict of ``Qwen2ForCausalLM``.

    Raises:
        ImportError: If the ``gguf`` package is missing.
        CheckpointError: If the architecture is another one, rotary angles are scaled, or tensors
            are missing.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise ImportError("reading GGUF files needs `pip install 'longvila[weights]'`") from error
    reader = GGUFReader(str(path))

    def field(key: str) -> Any:
        entry = reader.get_field(key)
        if entry is None:
            raise CheckpointError(f"{path.name} has no field {key}")
        return entry.contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path.name} holds a {architecture!r} model, expected 'llama'")
    for key in ("llama.rope.scaling.type", "llama.rope.scale_linear"):
        entry = reader.get_field(key)
        if entry is not None and entry.contents() not in ("none", 1.0):
            raise CheckpointError(
                f"{path.name} scales its rotary angles ({key} is {entry.contents()!r}), which is "
                "not converted; take a file of the model without it"
            )
    heads = int(field("llama.attention.head_count"))
    kv_heads = int(field("llama.attention.head_count_kv"))
    layers = int(field("llama.block_count"))
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        name = hf_name(tensor.name)
        if ".q_proj." in name or ".k_proj." in name:
            weight = unpermute(weight, heads if ".q_proj." in name else kv_heads)
        state[name] = weight.contiguous()
    for layer in range(layers):
        for part in "qkv":
            weight_name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            if weight_name not in state:
                raise CheckpointError(f"{path.name} has no tensor for {weight_name}")
            bias = weight_name.replace(".weight", ".bias")
            state[bias] = torch.zeros(state[weight_name].shape[0])
    tied = "lm_head.weight" not in state
    config = Qwen2Config(
        vocab_size=state["model.embed_tokens.weight"].shape[0],
        hidden_size=int(field("llama.embedding_length")),
        intermediate_size=int(field("llama.feed_forward_length")),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=int(field("llama.context_length")),
        rms_norm_eps=float(field("llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(field("llama.rope.freq_base")),
        },
        tie_word_embeddings=tied,
        bos_token_id=int(field("tokenizer.ggml.bos_token_id")),
        eos_token_id=int(field("tokenizer.ggml.eos_token_id")),
        architectures=["Qwen2ForCausalLM"],
        dtype="float32",
    )
    return config, state


def convert_gguf(path: Path, out: Path) -> Path:
    """Write a GGUF file out as a Hugging Face folder with its tokenizer.

    Args:
        path: The GGUF file.
        out: The folder to make.

    Returns:
        ``out``.
    """
    config, state = read_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out
