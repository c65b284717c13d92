"""The text that ``vllm-quantspec estimate`` prints: sections of lines, a blank line between them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vllm_quantspec.checkpoint import four_bits
from vllm_quantspec.config import CACHE_DTYPES, parse_draft_context
from vllm_quantspec.estimate.cost_model import Speed, needed_acceptance, speed
from vllm_quantspec.estimate.draft_weights import int4_experts_bytes, share_in_8_bits
from vllm_quantspec.estimate.gpu_memory import GIB, Memory, default_max_num_seqs, memory, why_no_int4_experts
from vllm_quantspec.estimate.sizes import Model, model_from, read_config
from vllm_quantspec.memory import WIDER_SHARE
from vllm_quantspec.supported import text_part, towers_of, undrafted

# Drafts that are accepted per token where nobody says: of those that read the whole cache, and a part of it. They differ by
# what books-30m loses by a sixteenth (benchmarks/results/sparse_acceptance-books-30m.json: 0.938 and 0.91).
ACCEPTED, ACCEPTED_SPARSE = 0.93, 0.90


@dataclass(frozen=True)
class Estimate:
    """What the sections say in words.

    arguments: the command line's arguments (see ``cli.py``).
    no_drafts: the engine's sentence, of a model that has the cache alone.
    sees: whether the model has towers beside the language model, which alone is counted.
    page_bits, wide_share: as of `memory`; draft_context, draft_experts: as of `QuantSpecOptions`, parsed.
    no_int4_experts: why a mixture's draft reads the target's experts though nobody said so.
    num_speculative_tokens: tokens drafted per verification; of those asked for, the number that ``speed`` is best with.
    wide_speed: with the same number, and all of the draft's linears in 8 bits.
    """

    arguments: Namespace
    model: Model
    no_drafts: str | None
    sees: bool
    page_bits: int
    draft_context: str | int | float
    draft_experts: str
    no_int4_experts: str | None
    wide_share: float
    max_num_seqs: int
    num_speculative_tokens: int
    speed: Speed
    wide_speed: Speed
    memory: Memory

    @property
    def fits(self) -> bool:
        return self.memory.free_with_draft > 0 or bool(self.no_drafts and self.memory.free)


def report(arguments: Namespace) -> str:
    """The estimate for the command line's arguments (see ``cli.py``).

    Raises:
        ValueError: one sentence, where there is no estimate; for a model that the engine refuses, with its sentence.
    """
    return "\n\n".join("\n".join(section) for section in sections(estimate(arguments)))


def estimate(arguments: Namespace) -> Estimate:
    """Errors as of `report`."""
    config = read_config(arguments.model)
    model = model_from(config, arguments.model)
    if arguments.one_copy and model.linear_bits is None:
        reason = four_bits(config.get("quantization_config"))
        raise ValueError(f"--one-copy is for 4-bit checkpoints, but {model.name} {reason}; drop --one-copy.")
    page_bits = CACHE_DTYPES[arguments.kv_cache_dtype]
    draft_context = parse_draft_context(arguments.draft_context, arguments.group_size)
    wide_share = share_in_8_bits(arguments.weight_bits)

    max_num_seqs = arguments.max_num_seqs or default_max_num_seqs(arguments.gpu_memory * GIB)

    def memory_with(draft_experts: str, number: int) -> Memory:
        return memory(
            model,
            arguments.gpu_memory * GIB,
            arguments.gpu_memory_utilization,
            arguments.tensor_parallel_size,
            arguments.group_size,
            arguments.overhead * GIB,
            number,
            max_num_seqs,
            page_bits,
            draft_experts,
            wide_share,
            arguments.one_copy,
        )

    draft_experts, no_int4_experts = arguments.draft_experts, None
    if draft_experts is None:
        quantized = any(part.get("quantization_config") for part in (config, text_part(config)))
        free = memory_with("target", 1).free
        no_int4_experts = why_no_int4_experts(model, quantized, free, arguments.tensor_parallel_size)
        draft_experts = "target" if no_int4_experts else "int4"

    def speed_of(number: int, accepted: float, wide_share: float = wide_share) -> Speed:
        return speed(
            model,
            arguments.bandwidth * 1e12,
            arguments.context,
            arguments.batch,
            arguments.tensor_parallel_size,
            arguments.group_size,
            accepted,
            number,
            page_bits=page_bits,
            draft_context=draft_context,
            draft_experts=draft_experts,
            wide_share=wide_share,
        )

    speeds = {
        number: speed_of(number, ACCEPTED if arguments.acceptance is None else arguments.acceptance)
        for number in arguments.num_speculative_tokens or range(1, 9)
    }
    if arguments.acceptance is None:
        speeds |= {n: speed_of(n, ACCEPTED_SPARSE) for n, s in speeds.items() if s.draft_share < 1}
    best = min(speeds, key=lambda number: speeds[number].quantspec)
    held = memory_with(draft_experts, best)
    return Estimate(
        arguments,
        model,
        no_drafts=undrafted(config),
        sees=bool(towers_of(config)),
        page_bits=page_bits,
        draft_context=draft_context,
        draft_experts=draft_experts,
        no_int4_experts=no_int4_experts,
        wide_share=wide_share,
        max_num_seqs=max_num_seqs,
        num_speculative_tokens=best,
        speed=speeds[best],
        wide_speed=speed_of(best, speeds[best].acceptance, 1.0),
        memory=held,
    )


def sections(e: Estimate) -> Iterator[Iterable[str]]:
    """Lines of each section."""
    yield introduction(e)
    yield memory_section(e)
    if not e.fits:
        yield ["The model does not fit; use more GPUs or larger ones."]
        return
    yield requests_section(e)
    yield speed_section(e)
    if not e.no_drafts and e.speed.quantspec > min(e.speed.exact, e.speed.cache):
        cache = f"--kv-cache-dtype {e.arguments.kv_cache_dtype}" if e.page_bits == 4 else "--attention-backend QUANTSPEC"
        yield [f"Drafting does not pay here; the cache alone ({cache}) may."]


def line(label: str, text: str) -> str:
    return f"  {label:<34}{text}"


def introduction(e: Estimate) -> Iterator[str]:
    """Whether an engine would run the model, and on what."""
    yield f"{e.model.name}: supported, as far as its configuration shows"
    if e.no_drafts:
        yield f"but its cache alone; with drafts an engine would stop with this: {e.no_drafts}"
    num_gpus = e.arguments.tensor_parallel_size
    yield f"on {num_gpus} GPU{'s' * (num_gpus > 1)} with {e.arguments.gpu_memory:g} GiB each"


def memory_section(e: Estimate) -> Iterator[str]:
    """What each GPU holds."""
    m, model = e.memory, e.model
    yield "memory, per GPU"
    yield line("weights", f"{m.weights / GIB:.2f} GiB{', of the language model alone' if e.sees else ''}")
    if not e.no_drafts:
        yield from memory_of_drafting(e)
    yield line("KV cache, 16 bits", f"{m.kv_bytes_per_token / 1024:.1f} KiB per token")
    yield line(f"KV cache, {e.arguments.kv_cache_dtype}", f"{m.quantspec_bytes_per_token / 1024:.1f} KiB per token")
    window = f"{m.window_bytes_per_request / 2**20:.0f} MiB per running request, at most"
    yield line("recent window, QuantSpec", window)
    if model.sliding_layers:
        layers = f"{model.sliding_layers} of {model.num_layers} layers, {model.sliding_window} tokens, 16 bits"
        yield line("sliding windows", f"{m.sliding_bytes_per_request / 2**20:.0f} MiB per running request ({layers})")
    beside = "" if e.no_drafts else f", {m.free_with_draft / GIB:.1f} GiB beside what drafting takes"
    yield line("free for the cache", f"{m.free / GIB:.1f} GiB{beside}")


def memory_of_drafting(e: Estimate) -> Iterator[str]:
    """The draft's weights and logits."""
    m, wide = e.memory, e.wide_share
    copy = "INT4 copy" if not wide else "INT8 copy" if wide == 1 else "INT4 and INT8 copy"
    less = " (of the output layer: the rest is one copy)" if e.arguments.one_copy else " (none with draft_weights=target)"
    yield line(f"{copy} for drafting", f"{m.int4_weights / GIB:.2f} GiB{less}")
    if not wide and e.model.linear_bits is None:
        share = f"{100 * WIDER_SHARE:g} %"
        yield line("", f"and up to {share} of what is left for the cache where draft_weights auto finds 8 bits faster")
    if wide:
        yield line("", "the speed of weights in 8 bits is expected from single layers on an H100; no engine was measured")
    if e.model.experts and e.draft_experts == "int4":
        part = int4_experts_bytes(e.model) / e.arguments.tensor_parallel_size
        yield line("", f"of it {part / GIB:.2f} GiB for the experts")
    if e.no_int4_experts:
        yield line("", f"none of the experts: {e.no_int4_experts}")
    many = f"{e.max_num_seqs} sequences: --max-num-seqs; {e.num_speculative_tokens} drafts each"
    yield line("logits of drafts", f"{m.draft_logits / GIB:.2f} GiB ({many})")


def requests_section(e: Estimate) -> Iterator[str]:
    """How many requests fit."""
    context, m = e.arguments.context, e.memory
    yield f"requests of {context} tokens that fit"
    yield line("16 bits", str(m.requests(context, quantspec=False)))
    fit = m.requests(context, quantspec=True, draft=False)
    yield line("QuantSpec's cache alone", str(fit))
    if not e.no_drafts:
        fit = m.requests(context, quantspec=True)
        yield line("QuantSpec", str(fit))
    if fit < e.arguments.batch:
        yield line("", f"fewer than --batch {e.arguments.batch}: requests will wait or be preempted")


def speed_section(e: Estimate) -> Iterator[str]:
    """Predicted times."""
    arguments, s = e.arguments, e.speed
    at = f"decoding {arguments.batch} x {arguments.context} tokens at {arguments.bandwidth:g} TB/s"
    yield f"{at}, predicted (ms per token of each request)"
    if e.model.linear_bits is not None:
        yield line("", "for linear layers in 16 bits: how fast a GPU reads this checkpoint in 4 is not predicted")
    yield line("16 bits, FlashAttention", f"{s.exact:.2f}")
    yield line("QuantSpec's cache alone", f"{s.cache:.2f}, {s.exact / s.cache:.2f}x")
    if not e.no_drafts:
        yield from speed_with_drafts(e)


def speed_with_drafts(e: Estimate) -> Iterator[str]:
    """The same with drafts, and what a draft step reads."""
    s = e.speed
    yield line(
        f"QuantSpec, {e.num_speculative_tokens} token{'s' * (e.num_speculative_tokens > 1)} drafted",
        f"{s.quantspec:.2f}, {s.exact / s.quantspec:.2f}x at {s.acceptance:g} accepted per token "
        f"({s.tokens_per_cycle:.2f} tokens per verification)",
    )
    yield line("one draft step", f"{s.draft_step:.2f}, {s.exact / s.draft_step:.2f}x less than a step in 16 bits")
    if not e.wide_share and e.model.linear_bits is None:
        needed = needed_acceptance(e.wide_speed.cycle, e.num_speculative_tokens, s.quantspec)
        when = "never faster" if needed is None else f"as fast at {needed:.3f} accepted per token"
        yield line("with its weights in 8 bits", f"{when} (draft_weights auto measures what is)")
    if e.draft_context != "all" and (e.draft_context != "auto" or s.draft_share < 1):
        read = f"{100 * s.draft_share:.1f} % of the older tokens" if s.draft_share < 1 else "all of the older tokens"
        yield line("a draft step reads", f"{read} (--draft-context {e.draft_context})")
    if s.draft_share < 1:
        yield line("", "fewer such drafts are accepted: give what you measured as --acceptance")
    if e.model.experts:
        yield from experts_read(e)


def experts_read(e: Estimate) -> Iterator[str]:
    """By a draft step, and by a verification."""
    experts, in_int4 = e.model.experts, e.draft_experts == "int4"
    step, verification = experts.chosen(e.arguments.batch), experts.chosen(e.arguments.batch, e.num_speculative_tokens + 1)
    yield line(
        "experts read",
        f"{step:.0f} of {experts.number} per layer by a draft step, in {4 if in_int4 else 16} bits; "
        f"{verification:.0f} by a verification, in 16",
    )
    if e.arguments.batch > 1:
        yield line("", "that requests choose theirs evenly is assumed")
