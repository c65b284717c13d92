"""QuantSpec's own options: names, defaults, and one clear sentence for each mistake. No vLLM import."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from vllm_quantspec.format import GROUP_SIZES

METHOD = "quantspec"
HEAD_SIZES = (64, 96, 128, 256)
MAX_SPECULATIVE_TOKENS = 32
# ``num_speculative_tokens: auto``: what is chosen from in every step. Each has CUDA graphs of its own, so there are gaps
# where a neighbour does as well.
AUTO_NUMBERS = (0, 1, 2, 3, 4, 6, 8)
# The same as a schedule of vLLM's, by which it captures graphs for each number; the number of requests means nothing in it.
AUTO_SCHEDULE = [[i, i, number] for i, number in enumerate(AUTO_NUMBERS, start=1)]
# ``ngram: auto``: numbers of drafts in steps whose drafts are n-grams alone, and the schedule that has them as well.
NGRAM_NUMBERS = (4, 8, 12)
NGRAM_SCHEDULE = [[i, i, number] for i, number in enumerate(sorted({*AUTO_NUMBERS, *NGRAM_NUMBERS}), start=1)]
LONGEST_NGRAM = 32
# This cache's names for ``--kv-cache-dtype``, and the bits of a key or value older than the exact window.
CACHE_DTYPES = {"quantspec_int8": 8, "quantspec_int4": 4}
DEFAULT_CACHE_DTYPE = "quantspec_int8"

DRAFT_WEIGHTS = ("int4", "int8", "mixed", "auto", "target")
# Of the draft's INT4 linears.
DRAFT_ACTIVATIONS = ("model", "fp8")
# ``weight_bits`` where no cost model can say what is fastest.
MIXED_BITS = 6.2

# By what a sparse draft chooses its pages; see `QuantSpecOptions.draft_selection`.
DRAFT_SELECTIONS = ("attention", "window", "snapkv")
# ``draft_context: auto``: a sixteenth of the old tokens, but at least this many, of requests that have at least that many.
AUTO_FRACTION, AUTO_TOKENS, AUTO_LENGTH = 1 / 16, 1024, 4096

# Options of vLLM's own SpeculativeConfig that mean the same here.
VLLM_OPTIONS = (
    "draft_sample_method",
    "rejection_sample_method",
    "synthetic_acceptance_rates",
    "synthetic_acceptance_length",
    "num_speculative_tokens_per_batch_size",
    "use_local_argmax_reduction",
    "enforce_eager",
)


@dataclass(frozen=True)
class QuantSpecOptions:
    """What ``--speculative-config '{"method": "quantspec", ...}'`` may say about QuantSpec itself."""

    num_speculative_tokens: int | str = 4
    """Tokens drafted per verification; ``auto``: in every step the one of `AUTO_NUMBERS` that yields most tokens per second.
    (Not the default: it was tried on few shapes.)"""
    group_size: int = 128
    """Tokens of a key group, and of a page of the quantized KV cache."""
    draft_weights: str = "int4"
    """``int4``: the draft's linears are quantized when the engine starts. ``int8``: to 8 bits. ``mixed``: to 8 bits where
    they lose most in 4, which is measured then. ``auto``: as ``mixed``, or ``int4`` where the cost model finds that faster.
    ``target``: the draft uses the target's. Where nothing is said, and GPTQ runs unasked, it is ``auto``."""
    draft_experts: str = "int4"
    """``target``: a mixture's draft reads the target's experts. ``int4``: it has quantized ones, shared ones among them,
    where it can; by default only if their copy leaves room for the KV cache (`memory.experts_fit`)."""
    draft_kv: str = "int4"
    """``int4``: the draft reads the upper 4 bits of older keys and values. ``int8``: all 8, as verification does."""
    weight_group_size: int = 128
    """Input channels that share one scale of an INT4 weight."""
    weight_rounding: str = "auto"
    """``search``: each group's range is the one of least error. ``gptq``: channels also make up for one another's errors, by
    the inputs of texts that the model writes when the engine starts. ``auto``: by GPTQ on a GPU, where it can run."""
    weight_rotation: str = "none"
    """``hadamard``: weights in 4 and 8 bits are those of inputs rotated in blocks of 32 channels, which spreads what is far
    larger than its neighbours. ``none``: as they are. (The default: on a GPU rotating takes 6 to 14 % of the time.)"""
    weight_bits: float | None = None
    """With ``draft_weights: mixed``: the most bits per weight, on average over all linears but the output layer, scales
    and zero points counted. None: what the cost model finds fastest."""
    draft_activations: str = "model"
    """``fp8``: inputs of the draft's INT4 linears are e4m3 numbers, with a power of two as their scale. On a GPU that is so
    from 9 to 64 tokens of a step, where it saves time. ``model``: they have the model's dtype."""
    quantize_lm_head: bool = True
    """Whether the draft's output layer is INT4 as well; its largest logits are computed again exactly."""
    join_layers: bool = True
    """Whether draft steps of up to `joined_layers.MAX_ROWS` sequences compute all between two attentions in one launch, on
    models and GPUs where that is possible (the log says where it is not)."""
    fuse_layers: bool = False
    """Whether draft steps of more sequences launch norms and activations together with the linears behind them, on the same
    models and GPUs. Off, as it gains little."""
    draft_context: str | int | float = "auto"
    """What a draft step reads of the tokens older than the exact window, per layer and KV head: ``all``; a number of tokens
    (rounded up to whole pages); a fraction of them, above 0 and up to 1; or ``auto``: a sixteenth, where that pays.
    Numbers may be strings. By default it is ``all`` where ``auto`` cannot be had (`checks.settle_draft_context`)."""
    draft_selection: str = "attention"
    """Which pages those are. ``attention``: those that the last verification attended to most. ``window``: the first page
    and the newest. ``snapkv``: those that the first verification after the prompt attended to most, and all newer ones."""
    ngram: str = "off"
    """``auto``, with ``num_speculative_tokens: auto``: where a text repeats itself, drafts are what followed before, up to
    the last of `NGRAM_NUMBERS`; the same policy decides. (Not the default, as ``num_speculative_tokens: auto`` is not.)"""
    prompt_lookup_min: int = 3
    """Tokens of the shortest n-gram that is looked for, as with vLLM's ``ngram``."""
    prompt_lookup_max: int = 5
    """Tokens of the longest one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_context", parse_draft_context(self.draft_context, self.group_size))
        number = self.num_speculative_tokens
        is_number = isinstance(number, int) and not isinstance(number, bool)
        if number != "auto" and not (is_number and 1 <= number <= MAX_SPECULATIVE_TOKENS):
            raise ValueError(
                f"quantspec: num_speculative_tokens must be an integer from 1 to {MAX_SPECULATIVE_TOKENS} or 'auto', not "
                f"{number!r}."
            )
        for name, allowed in (
            ("group_size", GROUP_SIZES),
            ("draft_weights", DRAFT_WEIGHTS),
            ("draft_experts", ("target", "int4")),
            ("draft_kv", ("int4", "int8")),
            ("weight_group_size", (32, 64, 128)),
            ("weight_rounding", ("auto", "search", "gptq")),
            ("weight_rotation", ("none", "hadamard")),
            ("draft_activations", DRAFT_ACTIVATIONS),
            ("quantize_lm_head", (False, True)),
            ("join_layers", (False, True)),
            ("fuse_layers", (False, True)),
            ("draft_selection", DRAFT_SELECTIONS),
            ("ngram", ("off", "auto")),
        ):
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                choices = " or ".join(repr(a) for a in allowed)
                raise ValueError(f"quantspec: {name} must be {choices}, not {value!r}.")
        if self.weight_rounding == "gptq" and self.draft_weights == "target":
            raise ValueError(
                "quantspec: weight_rounding 'gptq' is for INT4 and INT8 weights, but draft_weights is 'target'; drop one of "
                "them."
            )
        self._check_weight_bits()
        if self.draft_activations == "fp8" and self.draft_weights in ("target", "int8"):
            raise ValueError(
                "quantspec: draft_activations 'fp8' is for INT4 weights, but draft_weights is "
                f"{self.draft_weights!r}; drop one of them."
            )
        if self.draft_experts == "int4" and self.draft_weights == "target":
            raise ValueError(
                "quantspec: draft_experts 'int4' is for a draft in INT4 or INT8, but draft_weights is 'target'; drop one of "
                "them."
            )
        if self.draft_context == "all" and self.draft_selection != "attention":
            raise ValueError(
                f"quantspec: draft_selection {self.draft_selection!r} chooses pages, but draft_context is 'all', with which "
                "drafts read every page; set draft_context to 'auto', a number of tokens or a fraction, or drop "
                "draft_selection."
            )
        self._check_ngrams()

    def _check_ngrams(self) -> None:
        lengths = self.prompt_lookup_min, self.prompt_lookup_max
        are_integers = all(isinstance(n, int) and not isinstance(n, bool) for n in lengths)
        if not (are_integers and 1 <= lengths[0] <= lengths[1] <= LONGEST_NGRAM):
            raise ValueError(
                f"quantspec: prompt_lookup_min and prompt_lookup_max must be integers from 1 to {LONGEST_NGRAM}, in this "
                f"order, not {lengths[0]!r} and {lengths[1]!r}."
            )
        if self.ngram == "auto" and not self.chooses_number:
            raise ValueError(
                "quantspec: ngram 'auto' is decided beside the number of drafts, but num_speculative_tokens is "
                f"{self.num_speculative_tokens}; set num_speculative_tokens to 'auto', or drop ngram."
            )
        if self.ngram == "off" and lengths != (QuantSpecOptions.prompt_lookup_min, QuantSpecOptions.prompt_lookup_max):
            raise ValueError(
                "quantspec: prompt_lookup_min and prompt_lookup_max say which n-grams are looked for, but ngram is 'off'; "
                "set ngram to 'auto', or drop them."
            )

    def _check_weight_bits(self) -> None:
        bits, scales = self.weight_bits, 32 / self.weight_group_size
        if bits is None:
            return
        if self.draft_weights != "mixed":
            raise ValueError(
                f"quantspec: weight_bits {bits!r} is for draft_weights 'mixed', but draft_weights is "
                f"{self.draft_weights!r}; set it to 'mixed', or drop weight_bits."
            )
        is_number = isinstance(bits, int | float) and not isinstance(bits, bool)
        if not (is_number and 4 + scales <= bits <= 8 + scales):
            raise ValueError(
                f"quantspec: weight_bits must be a number from {4 + scales:g} to {8 + scales:g}, the bits per weight with "
                f"scales and zero points of groups of {self.weight_group_size} where all linears have 4 and where all have "
                f"8, not {bits!r}."
            )

    @property
    def chooses_number(self) -> bool:
        """Whether the number of drafts is chosen in every step."""
        return self.num_speculative_tokens == "auto"

    @property
    def most_drafts(self) -> int:
        """Tokens that are drafted per verification at most."""
        if not self.chooses_number:
            return self.num_speculative_tokens
        return NGRAM_NUMBERS[-1] if self.ngram == "auto" else AUTO_NUMBERS[-1]


@dataclass(frozen=True)
class EngineOptions:
    """What ``--additional-config '{"quantspec": {...}}'`` may say: options that need no speculation."""

    one_copy: bool = False
    """Of a checkpoint in 4 bits, on a GPU: target and draft read the same weights, few tokens of a step on a kernel of this
    package. (Not the default: long prompts were not timed with it on a GPU.)"""


def engine_options(additional_config: Any) -> EngineOptions:
    """`EngineOptions` of a vLLM engine's ``additional_config``; the defaults where it is no dictionary.

    Raises:
        ValueError: an unknown key (the nearest known one is named) or a wrong value.
    """
    given = additional_config.get(METHOD) if isinstance(additional_config, dict) else None
    if given is None:
        return EngineOptions()
    if not isinstance(given, dict):
        raise ValueError(f"quantspec: {METHOD} in --additional-config must be a dictionary of options, not {given!r}.")
    known = [f.name for f in fields(EngineOptions)]
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"quantspec: unknown option {key!r} in --additional-config; the options are {', '.join(known)}."
            )
        if not isinstance(value, bool):
            raise ValueError(f"quantspec: {key} in --additional-config must be true or false, not {value!r}.")
    return EngineOptions(**given)


def parse_draft_context(value: Any, group_size: int) -> str | int | float:
    """``draft_context`` as ``"all"``, ``"auto"``, a number of tokens (int) or a fraction (float), of a user's spelling.

    Raises:
        ValueError: one sentence, for anything else.
    """
    given = value
    if isinstance(value, str):
        word = value.strip()
        if word in ("all", "auto"):
            return word
        for number in (int, float):
            try:
                value = number(word)
                break
            except ValueError:
                continue
    fits = "set it to 'auto', 'all', a fraction above 0 and up to 1, or a number of tokens"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"quantspec: draft_context must be 'auto', 'all' or a number, not {given!r}.")
    if isinstance(value, int) and value < group_size:
        raise ValueError(
            f"quantspec: draft_context {given!r} is a number of tokens, of which drafts read whole pages of {group_size}, "
            f"but it is less than one; {fits} from {group_size} on."
        )
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(
            f"quantspec: draft_context {given!r} is a fraction of the old tokens, but not one above 0 and up to 1; {fits} "
            "without a decimal point."
        )
    return value


class DraftBudget(NamedTuple):
    """How much a sparse draft reads, as `cpu_page_selection.plan_selection` takes it.

    pages: chosen per layer, request and KV head, at least. fraction: of a request's old pages, if that is more.
    min_pages: a request with fewer old pages is read as a whole.
    """

    pages: int
    fraction: float
    min_pages: int

    @property
    def min_scored_pages(self) -> int:
        """A request with fewer old pages reads all of them, whatever they weigh: they need not be scored."""
        return max(self.min_pages, self.pages + 1)


def draft_budget(draft_context: str | int | float, group_size: int) -> DraftBudget | None:
    """The pages of ``group_size`` tokens that a parsed ``draft_context`` stands for; None for ``"all"``.

    With ``"auto"`` all requests together must also have `sparse_policy.min_total_pages`; with a number they need not.
    """
    if draft_context == "all":
        return None
    if draft_context == "auto":
        return DraftBudget(math.ceil(AUTO_TOKENS / group_size), AUTO_FRACTION, math.ceil(AUTO_LENGTH / group_size))
    if isinstance(draft_context, int):
        return DraftBudget(math.ceil(draft_context / group_size), 0.0, 1)
    return DraftBudget(1, draft_context, 1)


OPTION_NAMES = tuple(f.name for f in fields(QuantSpecOptions))


def is_quantspec(speculative_config: Any) -> bool:
    """Whether a user's ``speculative_config`` (a name or a dict) asks for QuantSpec."""
    if isinstance(speculative_config, str):
        return speculative_config == METHOD
    return isinstance(speculative_config, dict) and speculative_config.get("method") == METHOD


def named_options(speculative_config: str | dict[str, Any]) -> tuple[str, ...]:
    """The options that a user's ``speculative_config`` names, as they are spelled here.

    What one of them asks for is refused where it cannot be had; a default then means the next best.
    """
    given = () if isinstance(speculative_config, str) else speculative_config
    return tuple(name for name in (key.replace("-", "_") for key in given) if name in OPTION_NAMES)


def parse_options(speculative_config: str | dict[str, Any]) -> tuple[QuantSpecOptions, dict[str, Any]]:
    """Split a user's ``speculative_config`` into QuantSpec's options and vLLM's own.

    Raises:
        ValueError: an unknown key (the nearest known one is named) or a value out of range.
    """
    given = {} if isinstance(speculative_config, str) else dict(speculative_config)
    given = {key.replace("-", "_"): value for key, value in given.items()}
    given.pop("method", None)
    known = OPTION_NAMES + VLLM_OPTIONS
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(OPTION_NAMES)}."
            raise ValueError(f"quantspec: unknown option {key!r} in the speculative config; {hint}")
    if given.get("use_local_argmax_reduction"):
        raise ValueError(
            "quantspec: use_local_argmax_reduction needs a draft model that finds its likeliest tokens rank by rank, but "
            "here the model drafts for itself, with all logits of its output layer; drop use_local_argmax_reduction."
        )
    ours = {k: v for k, v in given.items() if k in OPTION_NAMES}
    if ours.get("draft_weights") == "target":
        ours.setdefault("draft_experts", "target")  # such a draft has no weights of its own
    options = QuantSpecOptions(**ours)
    if options.chooses_number and given.get("num_speculative_tokens_per_batch_size") is not None:
        raise ValueError(
            "quantspec: num_speculative_tokens 'auto' chooses the number of drafts while running, and "
            "num_speculative_tokens_per_batch_size fixes it for each batch size; drop one of them."
        )
    return options, {k: v for k, v in given.items() if k in VLLM_OPTIONS}
