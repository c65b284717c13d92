"""Small vision-language models with random weights, and prompts with images for them.

Their checkpoints have no processor, as transformers' need torchvision, which the CPU engine is set up without: a prompt is
given as vLLM's own processors leave it, with pixels in patches and with the places of images among its tokens.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import torch
from conftest import ASSETS
from engine_tools import Answer
from safetensors.torch import load_file
from transformers import BatchFeature
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseProcessingInfo

IMAGE, BREAK, START, END = 4092, 4093, 4094, 4095  # tokens; a vocabulary as large as books-4m's has no others to spare
PATCH = 14  # pixels
MERGE = 2  # patches along each side of an image that become one token
BOOKS_4M = json.loads((ASSETS / "books-4m" / "config.json").read_text())
TEXT = {
    key: BOOKS_4M[key]
    for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id",
    )
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": BOOKS_4M["rope_theta"]}
QWEN_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": PATCH}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": BREAK, "vision_start_token_id": START, "vision_end_token_id": END}
MROPE = {**ROPE, "mrope_section": [8, 12, 12]}
MODELS = {
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "glm4v": ("glm4_1v", "Glm4vForConditionalGeneration"),
    "mistral3": ("mistral3", "Mistral3ForConditionalGeneration"),
    "gemma3": ("gemma3_mm", "Gemma3ForConditionalGeneration"),
}  # vLLM's module and class
CONFIGS = {
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "out_hidden_size": 256, "window_size": 56, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": {
            **QWEN_VISION,
            "out_hidden_size": 256,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_TOKENS,
    },
    "glm4v": {
        "text_config": {**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}},
        "vision_config": {**QWEN_VISION, "out_hidden_size": 256, "image_size": 8 * PATCH},
        "image_token_id": IMAGE,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_token_id": BREAK,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None, "rope_parameters": ROPE},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "image_size": 1024,
        },
        "image_token_index": IMAGE,
        "spatial_merge_size": MERGE,
        "tie_word_embeddings": False,
    },
}


def write_model(architecture: str, folder: Path) -> str:
    """Write a checkpoint with random weights, and those of books-4m where its language model is a Llama; its folder."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(architecture, **CONFIGS[architecture])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    if architecture in ("qwen2_5_vl", "mistral3"):  # a Llama, in the end: rotary positions of text are all alike
        trained = load_file(ASSETS / "books-4m" / "model.safetensors")
        text = {name.removeprefix("model."): weight for name, weight in trained.items()}
        missing, unexpected = model.model.language_model.load_state_dict(text, strict=False)
        assert not unexpected and all(name.endswith(".bias") for name in missing), (missing, unexpected)
        model.lm_head.weight.data.copy_(text["embed_tokens.weight"])
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # vLLM makes no processor without one
        shutil.copy(ASSETS / "books-4m" / name, folder)
    return str(folder)


def without_processor(architecture: str, monkeypatch) -> None:
    """Let vLLM run the model though its processor cannot be made: its size limits are given, the processor never asked."""
    module, name = MODELS[architecture]
    with _stand_in_for_torchvision():
        model = getattr(import_module(f"vllm.model_executor.models.{module}"), name)
    ModelRegistry.register_model(name, model)  # the class: of a name alone, vLLM would load the module in another process
    for info in (BaseProcessingInfo, *_subclasses(BaseProcessingInfo)):
        if "get_mm_max_tokens_per_item" in vars(info):
            monkeypatch.setattr(info, "get_mm_max_tokens_per_item", lambda self, seq_len, mm_counts: {"image": 256})


@contextmanager
def _stand_in_for_torchvision() -> Iterator[None]:
    """What modules of models import but do not use before an image is processed."""
    import transformers.utils

    transformers.utils.is_torchvision_available()  # keeps its answer
    names = ["torchvision", *("torchvision.transforms" + below for below in ("", ".v2", ".v2.functional"))]
    missing = names if find_spec("torchvision") is None else []
    for name in missing:
        sys.modules[name] = MagicMock(__path__=[], __spec__=None)
    yield
    for name in missing:
        del sys.modules[name]


def _subclasses(cls: type) -> list[type]:
    return [c for sub in cls.__subclasses__() for c in (sub, *_subclasses(sub))]


class Picture:
    """Random pixels, ``rows`` x ``columns`` tokens large."""

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        self.rows, self.columns, self.name = rows, columns, f"picture-{rows}-{columns}-{seed}"
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(3, rows * MERGE * PATCH, columns * MERGE * PATCH, generator=generator)

    def prompt(self, architecture: str) -> list[int]:
        """Its tokens."""
        if architecture == "mistral3":
            return ([IMAGE] * self.columns + [BREAK]) * (self.rows - 1) + [IMAGE] * self.columns + [END]
        return [IMAGE] * (self.rows * self.columns)

    def features(self, architecture: str):
        """What a model takes for it, by name: [kind of field, tensor]."""
        if architecture == "mistral3":
            return {"pixel_values": (MultiModalFieldConfig.batched("image"), self.pixels[None])}
        height, width = self.rows * MERGE, self.columns * MERGE
        # Patches in the order of the tokens that they become, each of them twice: Qwen-VL takes two frames at a time.
        patches = self.pixels.reshape(3, self.rows, MERGE, PATCH, self.columns, MERGE, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
        patches = patches.reshape(height * width, 3, 1, PATCH * PATCH).repeat(1, 1, 2, 1).reshape(height * width, -1)
        sizes = torch.tensor([height * width])
        return {
            "pixel_values": (MultiModalFieldConfig.flat_from_sizes("image", sizes), patches),
            "image_grid_thw": (
                MultiModalFieldConfig.batched("image", keep_on_cpu=True),
                torch.tensor([[1, height, width]]),
            ),
        }


def prompt(architecture: str, parts: Sequence[list[int] | Picture]):
    """An engine's input: tokens and pictures, in this order."""
    tokens, ranges, items, names = [], [], [], []
    for part in parts:
        if not isinstance(part, Picture):
            tokens += part
            continue
        own = part.prompt(architecture)
        ranges.append(PlaceholderRange(len(tokens), len(own), torch.tensor(own) == IMAGE))
        names.append(part.name)
        features = part.features(architecture)
        data = BatchFeature({name: values for name, (_, values) in features.items()})
        fields = {name: field for name, (field, _) in features.items()}
        items += MultiModalKwargsItems.from_hf_inputs(data, fields)["image"]
        tokens += own
    if not items:
        return tokens_input(tokens)
    return mm_input(tokens, MultiModalKwargsItems({"image": items}), {"image": names}, {"image": ranges})


def generate(llm: LLM, inputs: Sequence, max_tokens: int) -> list[Answer]:
    """As `engine_tools.generate`, greedily, for engine inputs."""
    engine, outputs = llm.llm_engine, {}
    for index, one in enumerate(inputs):
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=5)
        engine.add_request(f"{next(llm.request_counter)}-{index}", one, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id.split("-")[1])] = output
    answers = []
    for _, output in sorted(outputs.items()):
        completion = output.outputs[0]
        top = [{token: lp.logprob for token, lp in step.items()} for step in completion.logprobs or []]
        answers.append(Answer(list(completion.token_ids), completion.finish_reason, top, output.num_cached_tokens or 0))
    return answers
