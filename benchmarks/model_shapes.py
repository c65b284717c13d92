"""Models' shapes for engines with random weights: config.json by name, or from a file."""

import json
from pathlib import Path

# Longer than any context here; a step's time does not depend on it.
MAX_POSITIONS = 1 << 20
SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    # The same, of a 4-bit checkpoint: linears but the output layer, in groups of 128 around 8.
    "8b-w4a16": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        quantization_config=dict(
            quant_method="compressed-tensors",
            format="pack-quantized",
            ignore=["lm_head"],
            config_groups=dict(
                all=dict(
                    targets=["Linear"],
                    weights=dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128),
                    input_activations=None,
                )
            ),
        ),
    ),
    # To try the script out, also on a CPU.
    "tiny": dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=512),
    "tiny-moe": dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
    ),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000),
    "qwen2.5-7b": dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
    "qwen3-32b": dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    ),
    "70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "qwen3-30b-a3b": dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}
# A public model of the same vocabulary that people draft with.
DRAFTS = {
    "8b": dict(
        hidden_size=2048, intermediate_size=8192, num_key_value_heads=8, num_hidden_layers=16, tie_word_embeddings=True
    ),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_attention_heads=2, num_hidden_layers=1),
    "7b": dict(hidden_size=2048, intermediate_size=5632, num_key_value_heads=4, num_hidden_layers=22),
}
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    num_hidden_layers=32,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    torch_dtype="bfloat16",
)


def model_config(shape: str) -> dict:
    """The config.json of a shape: a name among ``SHAPES``, or the path of such a file or of its folder.

    Raises:
        ValueError: one sentence, where it is neither.
    """
    if shape in SHAPES:
        return LLAMA | {"max_position_embeddings": MAX_POSITIONS} | SHAPES[shape]
    path = Path(shape).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--shape {shape}: neither one of {', '.join(SHAPES)} nor a config.json or its folder.")
    return json.loads(path.read_text()) | {"max_position_embeddings": MAX_POSITIONS}


def shape_name(shape: str) -> str:
    """What results are called by: the name of a shape, or of the folder that its config.json is in."""
    path = Path(shape).expanduser().resolve()
    return shape if shape in SHAPES else path.name if path.is_dir() else path.parent.name
