"""How many tokens to draft next: the number that yields most tokens per second. For ``num_speculative_tokens: auto``.

A step verifies some drafts of each request and brings, of a request whose i-th draft is accepted with a_i if those before
it were, 1 + a_1 + a_1 a_2 + ... tokens. `Acceptance` learns a_i, `StepTimes` learns what a step with so many drafts takes,
`DraftLength` divides one by the other for every number that may be chosen. One number holds for all requests of a step:
a verification reads weights and cache once, however many drafts a request has. No vLLM import; nothing here is random.

Where texts repeat themselves drafts may be n-grams (`NgramWatch`): of single requests beside the model's drafts of others,
at the model's numbers, where n-grams are more likely to be right; or of all requests, in a step that asks the model nothing
and therefore takes hardly more than one without drafts.

Steps that also compute parts of prompts are judged by what drafts add to them. A token that such a step does not bring has
to come from a later step at the usual price, where there is one; where prompts come without an end there is none, and
tokens that ride along with prompts are nearly free: drafts do not pay then. If answers fall behind, seats fill up, no
prompt is let in, and steps without prompts set the price again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean, median_low
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from vllm_quantspec.ngram_watch import NgramWatch

# Acceptance of a draft before anything is known, and how many observations that and the engine's mean are worth.
PRIOR, PRIOR_WEIGHT, MEAN_WEIGHT = 0.8, 8.0, 6.0
# What an observation leaves of those before it: a request's last 30 or so count, the engine's last 500.
REQUEST_MEMORY, MEAN_MEMORY = 0.97, 0.998
# Times of one number of drafts in batches alike that are kept. Their mean counts, for it is what steps cost: if one in five
# waits for the host that is part of it, and steps with drafts may wait more often. Times above so many medians are
# accidents.
TIMES_KEPT, ACCIDENT = 15, 3.0
# So many times, none older than so many steps, make a number's time known.
TIMES_NEEDED, STEPS_TO_STALE = 3, 2000
# How much it weighs, in measurements, that verification and drafts are as far from the model as one another; and how many
# times further one may be.
SAME_FACTOR, MOST_APART = 0.1, 20.0
# Another number must promise so much more before it is taken.
HYSTERESIS = 0.005
# The share of time that may be lost by trying numbers which do not look best, in steps at least PROBE_GAP apart; what was
# not lost may be saved up, to this many steps' time.
PROBE_SHARE, PROBE_GAP, PROBE_SAVINGS = 0.007, 8, 4
# Steps' time that probes may lose at once in batches of a size that has not been seen before.
PROBE_GRANT = 2
# A number is tried for its time alone if it looks no worse than this.
PROBE_LOSS = 0.3
# What one step tells of how often steps bring no prompts, and the share of such steps from which on they set the price.
PRICE_MEMORY, PRICE_SHARE = 1 / 64, 0.25


class Acceptance:
    """How often drafts are accepted, by position and request: smoothed, and drawn to the mean of all requests.

    Args:
        num_positions: most drafts of a request.
        prior: acceptance before anything is known, 0 to 1.
        memory: what an observation leaves of those before it in a request, 0 to 1.
        mean_weight: how many observations of a request the mean is worth.
    """

    def __init__(
        self,
        num_positions: int,
        prior: float = PRIOR,
        memory: float = REQUEST_MEMORY,
        mean_weight: float = MEAN_WEIGHT,
    ) -> None:
        self.num_positions = num_positions
        self._prior, self._memory, self._mean_weight = prior, memory, mean_weight
        self._rows: dict[str, int] = {}
        self._free = list(range(8))
        self._trials = np.zeros((8, num_positions))
        self._successes = np.zeros((8, num_positions))
        self._mean_trials = np.zeros(num_positions)
        self._mean_successes = np.zeros(num_positions)

    def observe(self, requests: Sequence[str], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """A verification: of ``drafted`` tokens of each request the first ``accepted`` were. Each name at most once."""
        rows = np.array([self._row(request) for request in requests], dtype=np.int64)
        position = np.arange(self.num_positions)
        num_accepted = np.asarray(accepted)[:, None]
        # Those after the first that was rejected tell nothing.
        tried = position < np.minimum(num_accepted + 1, np.asarray(drafted)[:, None])
        held = position < num_accepted
        kept = np.where(tried, self._memory, 1.0)
        self._trials[rows] = self._trials[rows] * kept + tried
        self._successes[rows] = self._successes[rows] * kept + held
        kept = MEAN_MEMORY ** tried.sum(0)
        self._mean_trials = self._mean_trials * kept + tried.sum(0)
        self._mean_successes = self._mean_successes * kept + held.sum(0)

    def mean_rates(self) -> np.ndarray:
        """Of all requests: acceptance of each position if those before it were accepted; [num_positions], 0 to 1."""
        rates, rate = np.empty(self.num_positions), self._prior
        for i in range(self.num_positions):
            # A position that is hardly known is taken to be as the one before it.
            rate = (self._mean_successes[i] + PRIOR_WEIGHT * rate) / (self._mean_trials[i] + PRIOR_WEIGHT)
            rates[i] = rate
        return rates

    def rates(self, requests: Sequence[str]) -> np.ndarray:
        """The same of each request; [num_requests, num_positions]."""
        # -1 stands for a request that is not known: no trials.
        rows = np.array([self._rows.get(request, -1) for request in requests], dtype=np.int64)
        known = (rows >= 0)[:, None]
        trials, successes = self._trials[rows] * known, self._successes[rows] * known
        mean = self.mean_rates()
        rates, lead = np.empty((len(rows), self.num_positions)), np.zeros(len(rows))
        for i in range(self.num_positions):
            # Who is better or worse than others at one position is expected to be so at the next.
            prior = np.clip(mean[i] + lead, 0.0, 1.0)
            rates[:, i] = (successes[:, i] + self._mean_weight * prior) / (trials[:, i] + self._mean_weight)
            lead = rates[:, i] - mean[i]
        return rates

    def expected_tokens(self, requests: Sequence[str]) -> np.ndarray:
        """Tokens that a step brings of each of ``requests``, by its number of drafts: [num_requests, num_positions + 1]."""
        tokens = np.ones((len(requests), self.num_positions + 1))
        tokens[:, 1:] += self.rates(requests).cumprod(1).cumsum(1)
        return tokens

    def forget(self, request: str) -> None:
        row = self._rows.pop(request, None)
        if row is not None:
            self._free.append(row)

    def _row(self, request: str) -> int:
        row = self._rows.get(request)
        if row is None:
            if not self._free:
                size = len(self._trials)
                self._free = list(range(size, 2 * size))
                self._trials = np.concatenate([self._trials, np.zeros_like(self._trials)])
                self._successes = np.concatenate([self._successes, np.zeros_like(self._successes)])
            row = self._rows[request] = self._free.pop()
            self._trials[row] = self._successes[row] = 0.0
        return row


class StepTimes:
    """What a step takes: a model's shape, corrected by what was measured in batches alike.

    Args:
        predict: of a number of requests and the tokens that each has on average, the seconds that a step with each number of
            drafts takes, drafting and verification together. Only ratios matter until times are measured.
        num_choices: how many numbers that are.
    """

    def __init__(self, predict: Callable[[int, float], Sequence[float]], num_choices: int) -> None:
        self.predict, self.num_choices = predict, num_choices
        # By batch size, rounded to powers of two: of each choice, measured over predicted seconds.
        self._ratios: dict[int, list[deque[float]]] = {}
        self._means: dict[int, list[float]] = {}
        self._last: dict[int, list[int]] = {}
        self._now = 0

    @staticmethod
    def kind(batch: int) -> int:
        """Batches of one kind are alike."""
        return (batch - 1).bit_length()

    def observe(self, batch: int, context: float, choice: int, seconds: float) -> None:
        """A step of ``batch`` requests with ``context`` tokens each and the drafts of ``choice`` took ``seconds``."""
        if seconds <= 0:
            return
        kind = self.kind(batch)
        if kind not in self._ratios:
            self._ratios[kind] = [deque(maxlen=TIMES_KEPT) for _ in range(self.num_choices)]
            self._means[kind] = [1.0] * self.num_choices
            self._last[kind] = [0] * self.num_choices
        self._now += 1
        ratios = self._ratios[kind][choice]
        if ratios and self._now - self._last[kind][choice] > STEPS_TO_STALE:
            ratios.clear()
        ratios.append(seconds / self.predict(batch, context)[choice])
        most = ACCIDENT * median_low(ratios)
        self._means[kind][choice] = fmean(ratio for ratio in ratios if ratio <= most)
        self._last[kind][choice] = self._now

    def seen(self, batch: int) -> bool:
        """Whether any choice was measured in batches of about this size."""
        return self.kind(batch) in self._ratios

    def known(self, batch: int, choice: int) -> bool:
        """Whether ``choice`` was measured often enough, and not too long ago, in batches of about this size."""
        ratios = self._ratios.get(self.kind(batch))
        if ratios is None or len(ratios[choice]) < TIMES_NEEDED:
            return False
        return self._now - self._last[self.kind(batch)][choice] <= STEPS_TO_STALE

    def estimate(self, batch: int, context: float) -> np.ndarray:
        """Seconds of a step by choice, [num_choices]."""
        predicted = np.asarray(self.predict(batch, context), dtype=float)
        kinds = [k for k in self._ratios if any(self._ratios[k])]
        if not kinds:
            return predicted
        kind = self.kind(batch)
        nearest = min(kinds, key=lambda k: (abs(k - kind), k))
        weights = np.minimum([len(ratios) for ratios in self._ratios[nearest]], TIMES_NEEDED) / TIMES_NEEDED
        measured = predicted * np.array(self._means[nearest])
        # Measured once or twice: half believed.
        return measured**weights * _fitted(predicted, measured, weights) ** (1 - weights)


def _fitted(predicted: np.ndarray, measured: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``predicted`` [num_choices] times one factor for a step without drafts, and another for what drafts add.

    Both follow ``measured`` by its ``weights``, 0 to 1, in relative terms; drawn, a little, to the factor of all.
    """
    common = np.exp((weights * np.log(measured / predicted)).sum() / weights.sum())
    without, added = predicted[0] / measured, (predicted - predicted[0]) / measured
    rest = SAME_FACTOR / common**2
    a, b, c = (weights * without**2).sum() + rest, (weights * without * added).sum(), (weights * added**2).sum() + rest
    x, y = (weights * without).sum() + SAME_FACTOR / common, (weights * added).sum() + SAME_FACTOR / common
    determinant = a * c - b * b
    factors = np.array([c * x - b * y, a * y - b * x]) / determinant
    least = common / MOST_APART
    return np.maximum(factors[0], least) * predicted[0] + np.maximum(factors[1], least) * (predicted - predicted[0])


class Drafts(NamedTuple):
    """What can be chosen: how many tokens each request drafts, by the model or, without it, by n-grams alone."""

    number: int
    by_ngrams: bool = False

    @property
    def by_model(self) -> bool:
        """Whether the model drafts anything."""
        return self.number > 0 and not self.by_ngrams


class Plan(NamedTuple):
    """What was chosen for a step; ``ngram_requests`` draft by n-grams where the others draft by the model."""

    drafts: Drafts
    ngram_requests: frozenset[str] = frozenset()


class DraftLength:
    """Chooses the drafts of every step.

    Args:
        predict: as of `StepTimes`, of `choices`: the ``numbers``, then the ``ngram_numbers``.
        numbers: of drafts by the model that can be chosen, ascending, the first one 0.
        probe_steps: steps in a row that another choice has to be tried for until one of them tells its time.
        idle_probe_steps: the same of a choice for which the model drafts nothing; None for as many.
        start_steps: so many more where the model has to begin to draft for it.
        ngrams: what n-grams would bring, where they may be drafted; its user keeps it up to date.
        ngram_numbers: of drafts by n-grams alone that can be chosen, none above ``ngrams.num_positions``.
    """

    def __init__(
        self,
        predict: Callable[[int, float], Sequence[float]],
        numbers: Sequence[int],
        probe_steps: int = 1,
        idle_probe_steps: int | None = None,
        start_steps: int = 0,
        ngrams: NgramWatch | None = None,
        ngram_numbers: Sequence[int] = (),
    ) -> None:
        if list(numbers) != sorted(set(numbers)) or numbers[0] != 0 or len(numbers) < 2:
            raise ValueError(f"numbers must ascend from 0, and be more than that, not {tuple(numbers)}.")
        self.numbers, self.ngram_numbers = tuple(numbers), tuple(ngram_numbers)
        self.choices = tuple(Drafts(n) for n in numbers) + tuple(Drafts(n, by_ngrams=True) for n in ngram_numbers)
        self.acceptance = Acceptance(self.numbers[-1])
        self.ngrams = ngrams
        self.times = StepTimes(predict, len(self.choices))
        self.num_probes = 0
        by_model, idle = [drafts.by_model for drafts in self.choices], idle_probe_steps or probe_steps
        # By whether the model drafts now.
        self._probe_steps = {
            True: np.where(by_model, probe_steps, idle),
            False: np.where(by_model, probe_steps + start_steps, idle),
        }
        self._current: dict[bool, int] = {}  # the choice in steps with and without prompts
        self._share_alone = 1.0  # of steps that compute no prompt
        self._savings = 0.0  # seconds that probes may lose
        self._granted: set[int] = set()  # kinds of batches
        self._since_probe = PROBE_GAP
        self._probe: tuple[int, int] | None = None  # the choice being tried, and for how many more steps

    def observe_acceptance(self, requests: Sequence[str], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """See `Acceptance.observe`; of drafts by the model."""
        self.acceptance.observe(requests, drafted, accepted)

    def observe_time(self, batch: int, context: float, drafts: Drafts, seconds: float) -> None:
        """A step that computed no prompt and in which ``batch`` requests had ``drafts`` each took ``seconds``.

        ``seconds`` are of drafting and verifying so many. What cannot be chosen is passed over.
        """
        if drafts in self.choices:
            self.times.observe(batch, context, self.choices.index(drafts), seconds)

    def forget(self, request: str) -> None:
        """``request`` is over."""
        self.acceptance.forget(request)
        if self.ngrams is not None:
            self.ngrams.forget(request)

    def choose(self, requests: Sequence[str], context: float, with_prompts: bool = False) -> Plan:
        """The drafts of each of ``requests`` in their next verification.

        Args:
            context: tokens that they have on average.
            with_prompts: whether steps around this one also compute parts of prompts.
        """
        if not requests:
            return Plan(Drafts(0))
        by_model = self.acceptance.expected_tokens(requests)[:, self.numbers]
        by_ngrams = None if self.ngrams is None else self.ngrams.expected_tokens(requests)
        seconds = self.times.estimate(len(requests), context)
        tokens = self._expected_tokens(by_model, by_ngrams, seconds)
        choice = self._choose(len(requests), tokens, seconds, with_prompts)
        drafts = self.choices[choice]
        if by_ngrams is None or drafts.by_ngrams:
            return Plan(drafts)
        better = by_ngrams[:, drafts.number] > by_model[:, choice]
        return Plan(drafts, frozenset(request for request, is_better in zip(requests, better, strict=True) if is_better))

    def _expected_tokens(self, by_model: np.ndarray, by_ngrams: np.ndarray | None, seconds: np.ndarray) -> np.ndarray:
        """Tokens that a step brings of all requests, [num_choices]; 0 where nothing could be drafted.

        Of n-grams alone, tokens of a fair kind: one request that copies would bring more by itself than a batch by the
        model's drafts, while the others have one token a step. So what counts is by how much, in the geometric mean,
        requests become faster than with the best number of the model's drafts.

        Args:
            by_model: of each request and of ``numbers``, [num_requests, len(numbers)].
            by_ngrams: of each request and any number, [num_requests, num_positions + 1]; None where nothing repeats itself.
        """
        if by_ngrams is None:
            return np.concatenate([by_model.sum(0), np.zeros(len(self.ngram_numbers))])
        mixed = np.maximum(by_model, by_ngrams[:, self.numbers])
        best = int((mixed.sum(0) / seconds[: len(self.numbers)]).argmax())
        gain = np.exp(np.log(by_ngrams[:, self.ngram_numbers] / mixed[:, best : best + 1]).mean(0))
        return np.concatenate([mixed.sum(0), mixed[:, best].sum() * gain])

    def _choose(self, batch: int, tokens: np.ndarray, seconds: np.ndarray, with_prompts: bool) -> int:
        """The choice for a step of ``batch`` requests that brings ``tokens`` in ``seconds``, both [num_choices]."""
        can = tokens > 0
        price = float((seconds[can] / tokens[can]).min())
        self._share_alone += PRICE_MEMORY * ((not with_prompts) - self._share_alone)
        if with_prompts:
            price *= min(1.0, self._share_alone / PRICE_SHARE)
        losses = np.where(can, seconds - price * tokens, np.inf)  # seconds, up to what all have in common
        losses -= losses.min()
        best = int(losses.argmin())
        current = self._current.get(with_prompts, best)
        if losses[current] > HYSTERESIS * seconds[current]:
            current = best
        self._current[with_prompts] = current
        if with_prompts:
            self._probe = None
            return current
        return self._tried_instead_of(current, batch, losses, seconds)

    def _tried_instead_of(self, current: int, batch: int, losses: np.ndarray, seconds: np.ndarray) -> int:
        """``current``, or now and then another choice of which too little is known."""
        if self._probe is not None:
            choice, left = self._probe
            is_possible = losses[choice] < np.inf  # else it was by n-grams, and nothing repeats itself any more
            self._probe = (choice, left - 1) if left > 1 and is_possible else None
            if is_possible:
                return choice
        self._since_probe += 1
        steps = self._probe_steps[self.choices[current].by_model]
        most = max(PROBE_SAVINGS, *steps) * seconds[current]  # else some could never be tried
        grown = self._savings + PROBE_SHARE * seconds[current]
        if self.times.seen(batch) and self.times.kind(batch) not in self._granted:
            self._granted.add(self.times.kind(batch))
            grown += PROBE_GRANT * seconds[current]
        self._savings = min(grown, most)
        if self._since_probe < PROBE_GAP:
            return current
        costs = losses * steps
        wanted = [
            choice
            for choice in range(len(self.choices))
            if choice != current
            and costs[choice] <= self._savings
            and not self.times.known(batch, choice)
            and (choice == 0 or losses[choice] <= PROBE_LOSS * seconds[choice])
        ]
        if current == 0 and not wanted:
            # Without drafts nothing says that the model's would be accepted by now.
            wanted = [1 + int(losses[1 : len(self.numbers)].argmin())]
        wanted = [choice for choice in wanted if costs[choice] <= self._savings]
        if not wanted:
            return current
        # What a step takes without drafts says most: it is the yardstick for all others.
        choice = min(wanted, key=lambda c: (c != 0, losses[c]))
        self._savings -= costs[choice]
        self._since_probe = 0
        self.num_probes += 1
        if steps[choice] > 1:
            self._probe = (choice, int(steps[choice]) - 1)
        return choice
