"""What n-grams would bring, as the scheduler learns it from the texts alone; and what the policy makes of it."""

import random

import numpy as np
import pytest

from vllm_quantspec.config import AUTO_NUMBERS, NGRAM_NUMBERS
from vllm_quantspec.draft_length import DraftLength, Drafts
from vllm_quantspec.kernels.ngram_index import LONGEST_MATCH, NgramIndex
from vllm_quantspec.ngram_watch import NgramWatch

MOST = NGRAM_NUMBERS[-1]


def last_match(text: list[int], shortest: int, longest: int) -> tuple[int, int] | None:
    """`NgramIndex.find`, by looking everywhere."""
    for n in range(longest, shortest - 1, -1):
        for end in range(len(text) - 2, n - 2, -1):
            if text[end - n + 1 : end + 1] == text[len(text) - n :]:
                length = n
                while length < min(LONGEST_MATCH, end + 1) and text[end - length] == text[len(text) - 1 - length]:
                    length += 1
                return end + 1, length
    return None


@pytest.mark.parametrize("lengths", [(1, 1), (2, 4), (3, 5)])
@pytest.mark.parametrize("vocabulary", [2, 7, 60])
def test_the_last_place_of_the_longest_n_gram(lengths, vocabulary):
    rng = random.Random(vocabulary)
    text = rng.choices(range(vocabulary), k=rng.randrange(300))
    index = NgramIndex(text, *lengths)
    for _ in range(120):
        found = index.find()
        assert (None if found is None else tuple(found)) == last_match(text, *lengths)
        new = rng.choices(range(vocabulary), k=rng.randrange(40))  # grows beyond its first room
        text += new
        index.extend(new)
        assert index.tokens.tolist() == text and index.length == len(text)


def test_lengths_ascend():
    for lengths in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="must ascend from 1"):
            NgramIndex([1], *lengths)


def edited(words: int, every: int, rng: random.Random, vocabulary: int = 50_000) -> tuple[list[int], list[int]]:
    """A text, and the same with a token changed every so many or so."""
    text = rng.choices(range(vocabulary), k=words)
    return text, [rng.randrange(vocabulary) if rng.random() < 1 / every else token for token in text]


def follow(watch: NgramWatch, prompt: list[int], answer: list[int], per_step: int) -> None:
    """One request from its prompt to its end, ``per_step`` tokens at a time."""
    watch.follow("a", prompt)
    for start in range(0, len(answer), per_step):
        watch.observe(["a"], [answer[start : start + per_step]])


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_a_copy_is_expected_to_go_on(steps_ahead):
    rng = random.Random(0)
    text, copy = edited(1000, 100, rng)
    watch = NgramWatch(3, 5, MOST, steps_ahead)
    follow(watch, text + copy[:20], copy[20:900], 5)
    (tokens,) = watch.expected_tokens(["a"])
    assert tokens[0] == 1 and (np.diff(tokens) > 0).all() and tokens[MOST] > 6
    assert watch.length("a") == 1000 + 900
    watch.forget("a")
    assert watch.length("a") == 0 and watch.expected_tokens(["a"]) is None


def test_a_text_of_its_own_expects_nothing():
    """Its n-grams come again by chance, of few words, and are followed by others."""
    rng = random.Random(1)
    text = rng.choices(range(12), k=3000)
    watch = NgramWatch(3, 5, MOST)
    follow(watch, text[:500], text[500:], 4)
    tokens = watch.expected_tokens(["a"])
    assert tokens is None or tokens[0, MOST] < 1.3
    assert watch.mean_rates()[0][0] < 0.2


def test_what_is_gone_when_it_is_drafted_counts_as_rejected():
    """A text of passages of a dozen tokens that come again, with others between: what is seen is over two steps later."""
    rng = random.Random(2)
    passages = [rng.choices(range(50_000), k=12) for _ in range(20)]
    text = [token for _ in range(150) for token in rng.choice(passages) + rng.choices(range(50_000), k=12)]
    first = []
    for steps_ahead in (0, 2):
        watch = NgramWatch(3, 5, MOST, steps_ahead)
        follow(watch, text[:1200], text[1200:], 4)
        first.append(watch.mean_rates()[0][0])
    assert first[1] < first[0] - 0.3, first


def test_each_request_has_its_own():
    rng = random.Random(3)
    text, copy = edited(600, 200, rng)
    watch = NgramWatch(3, 5, MOST)
    watch.follow("copies", text)
    watch.follow("writes", text)
    for start in range(0, 500, 5):
        watch.observe(["copies", "writes"], [copy[start : start + 5], rng.choices(range(50_000), k=5)])
    tokens = watch.expected_tokens(["writes", "copies", "unknown"])
    assert tokens[1, 4] > 4 and (tokens[[0, 2]] == 1).all()


class Copying:
    """Requests that copy with edits, or write freely; a draft of the model takes a third of a step, 0.9 are accepted."""

    def __init__(self, copies: list[bool], every: int = 40, seed: int = 0, steps_ahead: int = 2, ngrams: bool = True):
        rng = self.rng = random.Random(seed)
        self.texts, self.watch = {}, NgramWatch(3, 5, MOST, steps_ahead) if ngrams else None
        for i, is_copy in enumerate(copies):
            text, copy = edited(9000, every, rng)
            self.texts[f"r{i}"] = (text, copy if is_copy else rng.choices(range(50_000), k=9000))
            if ngrams:
                self.watch.follow(f"r{i}", text)
        seconds = [1 + n / 3 for n in AUTO_NUMBERS] + [1 + n / 100 for n in NGRAM_NUMBERS]
        numbers = {"ngrams": self.watch, "ngram_numbers": NGRAM_NUMBERS} if ngrams else {}
        self.policy = DraftLength(lambda batch, context: seconds[: len(self.policy.choices)], AUTO_NUMBERS, **numbers)
        self.seconds = dict(zip(self.policy.choices, seconds, strict=False))
        self.written = dict.fromkeys(self.texts, 0)
        self.plans = []

    def step(self) -> tuple[int, float]:
        """Tokens that it brought, and what it took."""
        names, brought = list(self.texts), 0
        plan = self.policy.choose(names, 1000.0)
        self.plans.append(plan)
        new, by_model = [], []
        for name in names:
            text, answer = self.texts[name]
            done, number = self.written[name], plan.drafts.number
            found = last_match_in_copy(text, answer, done) if plan.drafts.by_ngrams or name in plan.ngram_requests else []
            accepted = 0
            if found or plan.drafts.by_ngrams:
                while accepted < min(number, len(found)) and found[accepted] == answer[done + accepted]:
                    accepted += 1
            else:
                while accepted < number and self.rng.random() < 0.9:
                    accepted += 1
                by_model.append((name, number, accepted))
            new.append(answer[done : done + accepted + 1])
            self.written[name] += accepted + 1
            brought += accepted + 1
        if by_model and plan.drafts.number:
            self.policy.observe_acceptance(*zip(*by_model, strict=True))
        if self.watch:
            self.watch.observe(names, new)
        self.policy.observe_time(len(names), 1000.0, plan.drafts, self.seconds[plan.drafts])
        return brought, self.seconds[plan.drafts]

    def run(self, steps: int) -> float:
        """Tokens per second."""
        tokens, seconds = zip(*(self.step() for _ in range(steps)), strict=True)
        return sum(tokens) / sum(seconds)


def last_match_in_copy(text: list[int], answer: list[int], done: int) -> list[int]:
    """What follows the last three tokens of the answer, where the text has them: at the same place, if nowhere else."""
    if done >= 3 and answer[done - 3 : done] == text[done - 3 : done]:
        return text[done : done + MOST]
    return []


def test_a_text_that_copies_is_twice_as_fast():
    fast, slow = (Copying([True], ngrams=ngrams).run(400) for ngrams in (True, False))
    assert fast > 2 * slow, (fast, slow)


def test_a_text_that_never_repeats_loses_nothing():
    copying, plain = Copying([False, False]), Copying([False, False], ngrams=False)
    assert copying.run(600) > 0.99 * plain.run(600)
    assert not any(plan.drafts.by_ngrams or plan.ngram_requests for plan in copying.plans)


def test_beside_others_a_copy_drafts_by_n_grams_at_the_model_s_numbers():
    """One of eight copies: a step without the model's drafts would leave the others with none, which is not fair."""
    copying = Copying([True] + [False] * 7)
    copying.run(300)
    late = copying.plans[100:]
    assert sum(plan.drafts.by_ngrams for plan in late) < 20
    assert sum(plan.ngram_requests == {"r0"} for plan in late) > 100
    assert {plan.ngram_requests for plan in late} <= {frozenset(), frozenset({"r0"})}


def test_most_of_a_batch_copies():
    copying = Copying([True] * 7 + [False])
    copying.run(300)
    assert sum(plan.drafts.by_ngrams for plan in copying.plans[50:]) > 100


def test_nothing_is_drafted_by_n_grams_where_nothing_matches():
    policy = Copying([False]).policy
    for _ in range(200):
        plan = policy.choose(["r0"], 100.0)
        policy.observe_time(1, 100.0, plan.drafts, 1.0)
        assert not plan.drafts.by_ngrams and not plan.ngram_requests
    assert Drafts(MOST, by_ngrams=True) in policy.choices
