#!/usr/bin/env python3
"""What n-gram drafts win where a text copies another, and cost where it does not: a model of real size follows a script.

    python benchmarks/copying.py                                   # 8B shape, 8k and 32k, batch 1, one GPU
    python benchmarks/copying.py --configs drafts-auto ngram-auto --contexts 8192 --every 20 80
    python benchmarks/copying.py --shape tiny --layers 2 --contexts 600 --tokens 120        # to try it out, also on a CPU

Random weights write nothing that anybody would copy. So the engine's model is a Llama whose target puts the script's next
token first, and whose draft does so with the probability --acceptance, and otherwise another one; the same at every run.
All else is the engine's own: its kernels, its search for n-grams in what was written, its policy and its times. Sampling is
greedy. Prompts are not computed, as in end_to_end.py.

Two texts of each context, out of --text: "edited", whose answer is the prompt with a replacement, an insertion or a deletion
of 1 to 8 tokens every --every tokens or so, and "novel", whose answer goes on from the prompt and copies nothing on purpose.

    bf16          no speculation, vLLM's cache      cache         no speculation, this cache
    N             QuantSpec, N tokens drafted       drafts-auto   num_speculative_tokens: auto
    ngram-auto    the same with ngram: auto         vllm-ngram    vLLM's n-grams on vLLM's cache, 12 drafted

A row's first answer is learned on and its time given apart ("first_ms_per_token"); "ms_per_token" is the median of
--repeats further ones, from an answer's first token to its last. "over_quantspec" is the speed over the best row of N,
"over_auto" over that of drafts-auto: of "edited" what is won, of "novel" what looking costs.
"""

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import QUANTSPEC, RESULTS, TEXT_HELP, read_texts, write_json
from end_to_end_engine import PREFILL_TOKENS
from model_shapes import MAX_POSITIONS, SHAPES, model_config

from vllm_quantspec.config import AUTO_NUMBERS, NGRAM_NUMBERS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
ASSETS = ROOT / "vllm_quantspec" / "assets"
# Of an answer, that the prompt already has: what a user asks to copy begins somewhere.
BEGUN = 16
LONGEST_EDIT = 8
NAMED = {
    "bf16": {},
    "cache": {"attention_backend": "QUANTSPEC"},
    "drafts-auto": {"speculative_config": {**QUANTSPEC, "num_speculative_tokens": "auto"}},
    "ngram-auto": {"speculative_config": {**QUANTSPEC, "num_speculative_tokens": "auto", "ngram": "auto"}},
    "vllm-ngram": {
        "speculative_config": {
            "method": "ngram_gpu",
            "num_speculative_tokens": 12,
            "prompt_lookup_min": 3,
            "prompt_lookup_max": 5,
        }
    },
}
CONFIGS = ["bf16", "3", "4", "6", "drafts-auto", "ngram-auto", "vllm-ngram"]


def drafted(config: str) -> tuple[int, ...]:
    """Numbers of drafts that a verification may have."""
    if config.isdigit():
        return (int(config),)
    return {"drafts-auto": AUTO_NUMBERS, "ngram-auto": AUTO_NUMBERS + NGRAM_NUMBERS, "vllm-ngram": (12,)}.get(config, ())


def engine_arguments(config: str, more: dict, on_gpu: bool) -> dict:
    """LLM arguments of a configuration; ``more``: options of ngram-auto."""
    if config.isdigit():
        return {"speculative_config": {**QUANTSPEC, "num_speculative_tokens": int(config)}}
    arguments = copy.deepcopy(NAMED[config])
    if config == "ngram-auto":
        arguments["speculative_config"] |= more
    if config == "vllm-ngram" and not on_gpu:
        arguments["speculative_config"]["method"] = "ngram"
    return arguments


def edited(document: list[int], every: float, rng: random.Random, vocabulary: int) -> list[int]:
    """``document`` with an edit every so many tokens or so: some tokens replaced, put in between, or left out."""
    answer, position = [], 0
    while position < len(document):
        run = 1 + int(rng.expovariate(1 / every))
        answer += document[position : position + run]
        position += run
        kind, size = rng.choice(("replace", "insert", "delete")), rng.randint(1, LONGEST_EDIT)
        if kind != "delete":
            answer += rng.choices(range(3, vocabulary), k=size)
        if kind != "insert":
            position += size
    return answer


def scripts(text: list[int], context: int, tokens: int, every: list[float], vocabulary: int) -> dict[str, list[int]]:
    """{text's name: prompt and answer}; the prompt is the first ``context`` tokens of each.

    Raises:
        ValueError: one sentence, where the text is too short.
    """
    if len(text) < context + tokens:
        raise ValueError(f"--text has {len(text)} tokens, but a context and its answer need {context + tokens}; give more.")
    found = {"novel": text[: context + tokens]}
    document = text[: context - BEGUN]
    for n in every:
        answer = edited(document, n, random.Random(0), vocabulary)
        answer += document  # edits may leave less than is asked for
        found[f"edited every {n:g}"] = (document + answer)[: context + tokens]
    return found


def scripted_llama(acceptance: float):
    """A Llama whose logits follow `script`, a buffer that all its copies share; see the module's text."""
    import torch
    from vllm.model_executor.models.llama import LlamaForCausalLM

    class ScriptedLlama(LlamaForCausalLM):
        skips_prompts = False
        target: "ScriptedLlama | None" = None

        def __init__(self, *, vllm_config, prefix=""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            cls = type(self)
            cls.target = self
            device = torch.get_default_device()
            cls.script = torch.zeros(MAX_POSITIONS, dtype=torch.int64, device=device)
            rng = torch.Generator().manual_seed(0)
            # On the CPU whatever the default device is, as the generator.
            cls.is_right = (torch.rand(MAX_POSITIONS, generator=rng, device="cpu") < acceptance).to(device)

        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            if self.skips_prompts and input_ids.shape[0] >= PREFILL_TOKENS:
                hidden = torch.zeros(len(input_ids), self.config.hidden_size, dtype=torch.bfloat16, device=input_ids.device)
            else:
                hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds).clone()
            # In digits that 16 bits hold exactly: rows are picked out before logits are computed.
            digits = torch.stack([positions >> 14, positions >> 7 & 127, positions & 127], dim=1)
            hidden[:, :3] = digits.to(hidden.dtype)
            return hidden

        def compute_logits(self, hidden_states):
            logits = super().compute_logits(hidden_states)
            digits = hidden_states[:, :3].long()
            positions = (digits[:, 0] << 14) + (digits[:, 1] << 7) + digits[:, 2]
            positions = positions.clamp(0, MAX_POSITIONS - 2)
            token = self.script[positions + 1]
            if self is not type(self).target:  # the draft
                token = torch.where(self.is_right[positions], token, (token + 1) % self.config.vocab_size)
            # Not the model's own beside it: what it makes of a cache without a prompt may be no number.
            return torch.zeros_like(logits).scatter(1, token[:, None], 1e4)

    return ScriptedLlama


def answer(llm, prompt: list[int], batch: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds per token from the first to the last of the slowest answer, and all answers."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens, detokenize=False)
    names = [f"{time.time()}-{i}" for i in range(batch)]
    for name in names:
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    answers: dict[str, list[int]] = {}
    first = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        if first is None and len(answers) == batch:
            first = time.perf_counter(), min(map(len, answers.values()))
    return (time.perf_counter() - first[0]) / (tokens - first[1]), [answers[name] for name in names]


def speculation(llm) -> dict[str, float]:
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value") and "spec_decode" in m.name}
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return {name: metrics.get(f"vllm:spec_decode_{name}", 0) for name in names}


def child(args) -> None:
    """One engine, all contexts and texts; prints a JSON line for each."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch
    import vllm
    from transformers import AutoTokenizer
    from vllm import LLM, ModelRegistry

    on_gpu = torch.cuda.is_available()
    shape = model_config(args.shape) | ({"num_hidden_layers": args.layers} if args.layers else {})
    model = scripted_llama(args.acceptance)
    ModelRegistry.register_model("LlamaForCausalLM", model)
    options = engine_arguments(args.child, json.loads(args.options), on_gpu)
    rows = {1, *(1 + number for number in drafted(args.child))}  # of a request, in a draft step or a verification
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    text = [token % shape["vocab_size"] for novel in read_texts(args.text).values() for token in tokenizer.encode(novel)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max(args.contexts) + args.tokens + 64,
            max_num_seqs=args.batch,
            max_num_batched_tokens=4096,
            gpu_memory_utilization=0.9,
            enable_prefix_caching=False,
            disable_log_stats=False,
            enforce_eager=not on_gpu,
            compilation_config={"cudagraph_capture_sizes": sorted({args.batch * n for n in rows})},
            **options,
        )
    model.skips_prompts = True
    for context in args.contexts:
        for name, script in scripts(text, context, args.tokens, args.every, shape["vocab_size"]).items():
            model.script[: len(script)] = torch.tensor(script)
            prompt, expected = script[:context], script[context : context + args.tokens]
            before, times = speculation(llm), []
            for _ in range(1 + args.repeats):
                seconds, answers = answer(llm, prompt, args.batch, args.tokens)
                times.append(1e3 * seconds)
                wrong = sum(a != expected for a in answers)
            spent = {key: value - before[key] for key, value in speculation(llm).items()}
            row = {"config": args.child, "context": context, "batch": args.batch, "text": name, "vllm": vllm.__version__}
            row |= {"first_ms_per_token": times[0], "ms_per_token": statistics.median(times[1:] or times)}
            row |= spent | {"answers_that_left_the_script": wrong}
            print("ROW " + json.dumps(row), flush=True)


def compare(rows: list[dict]) -> None:
    """To every row: its speed over the best of QuantSpec with a fixed number, and over that with a number chosen."""
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("context", "batch", "text"))]
        fixed = [r["ms_per_token"] for r in same if r["config"].isdigit()]
        auto = [r["ms_per_token"] for r in same if r["config"] == "drafts-auto"]
        for name, times in (("over_quantspec", fixed), ("over_auto", auto)):
            if times:
                row[name] = min(times) / row["ms_per_token"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    llamas = [name for name, shape in SHAPES.items() if "architectures" not in shape]
    parser.add_argument("--shape", choices=llamas, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="added to what the JSON has, see above")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--batch", type=int, default=1, help="requests with the same text at a time")
    parser.add_argument("--every", type=float, nargs="+", default=[20.0, 60.0], help="tokens from an edit to the next")
    parser.add_argument("--acceptance", type=float, default=0.938, help="of the model's drafts, as in end_to_end.py")
    parser.add_argument("--options", default="{}", help="more options of ngram-auto, as JSON")
    parser.add_argument("--tokens", type=int, default=768, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--tokenizer", type=Path, default=ASSETS / "books-4m")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [c for c in args.configs if c not in NAMED and not c.isdigit()]:
        parser.error(f"--configs {unknown[0]}: neither a number of drafts nor one of {', '.join(NAMED)}.")
    if args.child:
        return child(args)
    path = args.json or RESULTS / f"copying-{args.shape}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for config in args.configs:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", config]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        tail: list[str] = []
        for line in process.stdout:
            tail = [*tail[-40:], line]
            if line.startswith("ROW "):
                row = json.loads(line[4:])
                keys = ("config", "context", "batch", "text")
                rows = [r for r in rows if any(r[k] != row[k] for k in keys)] + [row]
                compare(rows)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
                write_json(path, rows, shape=args.shape, acceptance=args.acceptance, options=json.loads(args.options))
        if process.wait():
            print(f"{config} failed:\n" + "".join(tail), flush=True)


if __name__ == "__main__":
    main()
