"""The server as a person starts it: processes of its own, nothing imported, the plugin found by its entry point.

What it answers is what the same server answers without speculation, up to near-ties, or obeys what the request demands.
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from engine_tools import Answer, assert_same_or_tied
from server_tools import ANSWER_SECONDS, MODEL, START_SECONDS, VLLM, Server, command_line, environment, free_port, wait_for
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

sys.path.insert(0, str(ROOT / "benchmarks"))

TIE = 0.125  # see test_lossless.py
FROM_CACHE = 0.25  # where one of the two may have read recent tokens from the prefix cache, in 8 bits
LIMIT = 4096
SEATS = 16
SIZE = ["--max-model-len", str(LIMIT), "--max-num-seqs", str(SEATS)]
SIZE += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
# Not even the requests that have seats fit into this pool at full length; and acceptance is part of each answer.
SPECULATION = ["--speculative-config", "quantspec", "--num-gpu-blocks-override", "80"]
SPECULATION += ["--per-request-spec-decode-metrics", "detailed"]
LOGPROBS = {"logprobs": 5, "return_tokens_as_token_ids": True}
CHAT_LOGPROBS = {"logprobs": True, "top_logprobs": 5, "return_tokens_as_token_ids": True}
MESSAGES = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "Who came to the castle?"}]


@pytest.fixture(scope="module")
def servers(books_4m, tmp_path_factory):
    """`vllm serve` with speculation, and without it on the same cache: started together."""
    folder = tmp_path_factory.mktemp("serve")
    on = Server(books_4m, [*SPECULATION, *SIZE], folder / "on.log")
    off = Server(books_4m, ["--attention-backend", "QUANTSPEC", *SIZE], folder / "off.log")
    try:
        on.wait_until_ready()
        off.wait_until_ready()
        yield on, off
    finally:
        on.stop()
        off.stop()


@pytest.fixture(scope="module")
def server(servers):
    return servers[0]


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


def usage(response: dict) -> list[int]:
    return [response["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")]


def token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def answers(response: dict) -> list[Answer]:
    """The choices of a completion that was asked for with LOGPROBS."""
    found = []
    for choice in sorted(response["choices"], key=lambda c: c["index"]):
        logprobs = choice["logprobs"]
        top = [{token_id(t): p for t, p in step.items()} for step in logprobs["top_logprobs"]]
        found.append(Answer([token_id(t) for t in logprobs["tokens"]], choice["finish_reason"], top))
    return found


def chat_answer(response: dict) -> Answer:
    content = response["choices"][0]["logprobs"]["content"]
    top = [{token_id(t["token"]): t["logprob"] for t in step["top_logprobs"]} for step in content]
    return Answer([token_id(step["token"]) for step in content], response["choices"][0]["finish_reason"], top)


# --- The same answers as without speculation ----------------------------------------------------------------------------

GREEDY = {
    "plain": {},
    "max_tokens 1": {"max_tokens": 1},
    "ends by itself": {"ignore_eos": False, "max_tokens": 100},
    "penalties": {"presence_penalty": 1.2, "frequency_penalty": 0.6, "repetition_penalty": 1.3},
    "min_tokens": {"ignore_eos": False, "min_tokens": 30},
    "allowed_token_ids": {"allowed_token_ids": list(range(0, 4096, 3))},
    "bad_words": {"bad_words": ["the", "and", "was"]},
    "top_k, top_p": {"top_k": 3, "top_p": 0.5},
    "stop_token_ids": {"stop_token_ids": [12, 14]},
    "two that must be the same": {"n": 2, "temperature": 1.0, "top_k": 1},
    "prompt repeated": {"echo": True, "max_tokens": 5},
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_completion(servers, tokens, name):
    """One request for three prompts: short, inside the window, over several pages."""
    body = {"max_tokens": 40, "ignore_eos": True, **LOGPROBS, **GREEDY[name]}
    prompts = [tokens[900:907], tokens[7:250], tokens[300:1200]]
    on, off = (server.complete(prompts, **body) for server in servers)
    assert usage(on) == usage(off) or name in ("ends by itself", "stop_token_ids")
    if name == "prompt repeated":
        for response in (on, off):
            for choice in response["choices"]:  # the first token has no log-probability
                choice["logprobs"]["top_logprobs"][0] = {choice["logprobs"]["tokens"][0]: 0.0}
    assert_same_or_tied(answers(off), answers(on), FROM_CACHE, name)
    if name in ("plain", "max_tokens 1"):
        assert on["usage"]["completion_tokens"] == 3 * body["max_tokens"]


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 33])
def test_stream(server, tokens, max_tokens):
    """The pieces are the answer, once; a piece may be several tokens, because a verification yields several."""
    body = {"prompt": tokens[50:333], "max_tokens": max_tokens, "ignore_eos": True, **LOGPROBS}
    server.complete(**body)  # the next two both read the prompt from the prefix cache
    whole = server.complete(**body)
    *pieces, last = server.stream("/v1/completions", **body)
    assert last["choices"] == [] and usage(last) == usage(whole)
    choices = [piece["choices"][0] for piece in pieces]
    tops = [{token_id(t): p for t, p in step.items()} for c in choices for step in c["logprobs"]["top_logprobs"]]
    streamed = Answer([token_id(t) for c in choices for t in c["logprobs"]["tokens"]], choices[-1]["finish_reason"], tops)
    assert len(streamed.tokens) == max_tokens and streamed.finish_reason == "length"
    assert all(c["finish_reason"] is None for c in choices[:-1])
    if not assert_same_or_tied(answers(whole), [streamed], TIE):
        assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]


def test_stop_string(servers, tokens):
    """Wherever a stop string ends inside a draft, nothing of it and nothing after it is answered."""
    prompt = tokens[200:420]
    text = servers[0].complete(prompt, max_tokens=40, ignore_eos=True)["choices"][0]["text"]
    for word in dict.fromkeys(text.split()[2:6]):
        body = {"max_tokens": 40, "ignore_eos": True, "stop": [word]}
        (on,), (off,) = (server.complete(prompt, **body)["choices"] for server in servers)
        assert on["finish_reason"] == "stop" and on["stop_reason"] == word
        assert text.startswith(on["text"]) and word not in on["text"]
        assert on["text"] == off["text"] or not text.startswith(off["text"])  # the latter: parted at a tie
        kept = servers[0].complete(prompt, **body, include_stop_str_in_output=True)["choices"][0]["text"]
        assert kept == on["text"] + word


def test_chat(servers):
    body = {"max_tokens": 40, "ignore_eos": True, **CHAT_LOGPROBS}
    on, off = (server.chat(MESSAGES, **body) for server in servers)
    assert_same_or_tied([chat_answer(off)], [chat_answer(on)], TIE)
    assert usage(on) == usage(off) and usage(on)[1] == 40
    pieces = list(servers[0].stream("/v1/chat/completions", messages=MESSAGES, **body))
    content = [step for p in pieces for c in p["choices"] for step in (c.get("logprobs") or {}).get("content") or []]
    assert usage(pieces[-1]) == usage(on) and len(content) == 40
    text = "".join(c["delta"].get("content") or "" for p in pieces for c in p["choices"])
    if [step["token"] for step in content] == [s["token"] for s in on["choices"][0]["logprobs"]["content"]]:
        assert text == on["choices"][0]["message"]["content"]


def test_several_samples(server, tokens):
    """n samples of one prompt: all of them, all of full length, different; the same seed gives them again."""
    body = {"n": 4, "seed": 11, "temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    server.complete(tokens[:300], **body)  # what follows starts from the prefix cache
    first, again = (server.complete(tokens[:300], **body) for _ in range(2))
    texts = [c["text"] for c in first["choices"]]
    assert len(set(texts)) == 4 and first["usage"]["completion_tokens"] == 4 * 24
    assert texts == [c["text"] for c in again["choices"]]
    indices = set()
    num_tokens = 0
    for event in server.stream("/v1/completions", prompt=tokens[:300], **body):
        indices |= {c["index"] for c in event["choices"] if c["finish_reason"] == "length"}
        num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    assert indices == {0, 1, 2, 3} and num_tokens == 4 * 24


def test_up_to_the_models_length(servers, tokens):
    """Prompts at the limit, one before and one over it: the same status and the same words as without speculation."""
    for length, max_tokens, expected in (
        (LIMIT - 1, 1, 200),
        (LIMIT - 1, 50, 200),  # shortened
        (LIMIT - 7, None, 200),
        (LIMIT, None, 400),
        (LIMIT, 1, 400),
        (LIMIT + 1, 1, 400),
    ):
        body = {"model": MODEL, "prompt": tokens[:length], "temperature": 0, "ignore_eos": True, **LOGPROBS}
        body |= {} if max_tokens is None else {"max_tokens": max_tokens}
        (status, on), (status_off, off) = (server.post("/v1/completions", body) for server in servers)
        assert status == status_off == expected
        if status == 200:
            assert_same_or_tied(answers(off), answers(on), FROM_CACHE)
            assert usage(on) == usage(off) == [length, LIMIT - length, LIMIT]
        else:
            assert on == off


# --- Answers that obey --------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Jonathan", "Mina", "Lucy"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PHRASE = "(yes|no|perhaps)( and| or) (yes|no|perhaps)( but| so) [0-9]{3}-[0-9]{4}"
WORDS = ["Transylvania", "Whitby", "London and back"]
GRAMMAR = 'root ::= "the " ("count" | "castle" | "wolves") (" and " root | ".")'


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        set(person) == {"name", "age"}
        and person["name"] in SCHEMA["properties"]["name"]["enum"]
        and 1 <= person["age"] <= 99
    )


STRUCTURED = {
    "json": ({"json": SCHEMA}, is_person),
    "regex": ({"regex": PHRASE}, lambda text: re.fullmatch(PHRASE, text) is not None),
    "choice": ({"choice": WORDS}, lambda text: text in WORDS),
    "grammar": (
        {"grammar": GRAMMAR},
        lambda text: re.fullmatch(r"(the (count|castle|wolves)( and |\.$))*", text) is not None,
    ),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_output(servers, tokens, name):
    """Alone and greedy, as without speculation; in company that is sampled without constraint, still in its language.

    The prompts are cached but for one token: such a request joins a batch with placeholders for drafts.
    """
    constraint, obeys = STRUCTURED[name]
    prompts = [tokens[40 * i : 40 * i + 257] for i in range(3)]
    body = {"max_tokens": 60, "structured_outputs": constraint}
    for prompt in prompts:
        on, off = (server.complete(prompt, **body, **LOGPROBS) for server in servers)
        (choice,) = on["choices"]  # a small model may repeat itself until max_tokens, here as without speculation
        assert choice["finish_reason"] == "length" or obeys(choice["text"]), choice["text"]
        assert_same_or_tied(answers(off), answers(on), FROM_CACHE, name)
    server = servers[0]
    with ThreadPoolExecutor(8) as pool:
        free = [pool.submit(server.complete, p, max_tokens=40, temperature=1.0, ignore_eos=True) for p in prompts]
        bound = [pool.submit(server.complete, p, temperature=1.0, **body) for p in prompts for _ in range(3)]
        for future in bound:
            (choice,) = future.result()["choices"]
            assert choice["finish_reason"] == "length" or obeys(choice["text"]), choice["text"]
        assert [f.result()["usage"]["completion_tokens"] for f in free] == [40] * 3


def test_json_in_a_chat(server):
    kind = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = server.chat(MESSAGES, max_tokens=60, response_format=kind)
    assert is_person(answer["choices"][0]["message"]["content"])


# --- What vLLM refuses beside other drafts ------------------------------------------------------------------------------


@pytest.mark.parametrize("parameter", [{"min_p": 0.1}, {"logit_bias": {"77": 5.0}}])
def test_min_p_and_logit_bias_are_served(servers, parameter):
    """Other drafts' engines answer with status 400."""
    on, off = servers
    body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0, "ignore_eos": True, **parameter}
    (status, answer), (status_off, answer_off) = (server.post("/v1/completions", body) for server in (on, off))
    assert status == status_off == 200
    assert answer["choices"][0]["text"] == answer_off["choices"][0]["text"]
    assert on.post("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **parameter})[0] == 200
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        SamplingParams(**{"min_p": 0.1})._validate_spec_decode(object())


# --- Metrics ------------------------------------------------------------------------------------------------------------

COUNTERS = ["num_drafts_total", "num_draft_tokens_total", "num_accepted_tokens_total"]
COUNTERS += [f"num_accepted_tokens_per_pos_total[{i}]" for i in range(4)]


def test_metrics(server, tokens):
    """Drafts, drafted and accepted tokens, by position: those of the requests, and what the tokens they got imply."""
    before = server.metrics()
    lengths = [1, 2, 7, 40, 63]
    expected = dict.fromkeys(COUNTERS, 0)
    for i, max_tokens in enumerate(lengths):
        prompt = tokens[60 * i : 60 * i + 130 * i + 5]
        answer = server.complete(prompt, max_tokens=max_tokens, ignore_eos=True, temperature=float(i % 2))
        seen = (answer["metrics"] or {}).get("speculative_decoding") or {}
        accepted = seen.get("per_step_accepted") or []
        # A step yields what it accepted and one token more; of the last step, those over max_tokens are dropped.
        generated = 1 + sum(accepted) + len(accepted)
        assert answer["usage"]["completion_tokens"] == max_tokens
        assert 0 <= generated - max_tokens <= (accepted[-1] if accepted else 0)
        expected["num_drafts_total"] += len(accepted)
        expected["num_draft_tokens_total"] += sum(seen.get("per_step_drafted") or [])
        expected["num_accepted_tokens_total"] += sum(accepted)
        for position in range(4):
            expected[f"num_accepted_tokens_per_pos_total[{position}]"] += sum(a > position for a in accepted)
    after = server.metrics()
    assert {name: after[f"vllm:spec_decode_{name}"] - before[f"vllm:spec_decode_{name}"] for name in COUNTERS} == expected
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == sum(lengths)


LINE = re.compile(
    r"SpecDecoding metrics: Mean acceptance length: ([\d.]+), .*Accepted: (\d+) tokens, Drafted: (\d+) tokens, "
    r"Per-position acceptance rate: ([\d., ]+), Avg Draft acceptance rate: ([\d.]+)%"
)


def test_periodic_log_line(server, tokens):
    """vLLM's line about speculation is in the log, and all of them together say what the metrics say."""
    server.complete(tokens[:400], max_tokens=50, ignore_eos=True)
    accepted, drafted = (server.metrics()[f"vllm:spec_decode_num_{kind}_tokens_total"] for kind in ("accepted", "draft"))

    def logged() -> bool:
        lines = LINE.findall(server.log)
        return (sum(int(line[1]) for line in lines), sum(int(line[2]) for line in lines)) == (accepted, drafted)

    wait_for(
        logged, ANSWER_SECONDS, lambda: f"the log does not add up to {accepted} of {drafted}: {LINE.findall(server.log)}"
    )
    for length, _, _, per_position, _ in LINE.findall(server.log):
        rates = [float(rate) for rate in per_position.split(", ")]
        assert len(rates) == 4 and rates == sorted(rates, reverse=True)
        assert abs(float(length) - 1 - sum(rates)) < 0.02
    assert " draft weights: " in server.log and "method='quantspec'" in server.log


# --- Load ---------------------------------------------------------------------------------------------------------------


def test_load(server, passage):
    """Some seconds of benchmarks/serve_load.py: 32 clients, prompts of 1 token up to the limit, streams left half-way."""
    from serve_load import Load

    load = Load(
        server.address, passage, clients=32, seconds=12, max_prompt=LIMIT - 96, tie=FROM_CACHE, pid=server.process.pid
    )
    summary = load.run(progress=False)
    assert summary["errors"] == []
    assert summary["streams_compared"] > 8 and summary["streams_left"] > 1
    assert summary["kv_cache_usage_afterwards"] == 0
    for name, memory in summary["memory_mib"].items():  # the script run for minutes shows whether it is flat
        assert memory["end"] < 1.1 * memory["after_warm_up"], (name, summary["memory_mib"])


def test_more_than_fits(server, tokens):
    """More clients than seats, more tokens than blocks: some wait, some are preempted, all are answered in full."""
    clients = SEATS + 8
    # Most that are admitted need another page soon, all at about the same time.
    prompts = [tokens[20 * i : 20 * i + 240 - 7 * (i % 5)] for i in range(clients)]
    lengths = [160 + 7 * (i % 5) for i in range(clients)]
    most, before = {"running": 0.0, "waiting": 0.0}, server.metrics()["vllm:num_preemptions_total"]
    with ThreadPoolExecutor(clients) as pool:
        futures = [
            pool.submit(server.complete, p, max_tokens=n, ignore_eos=True) for p, n in zip(prompts, lengths, strict=True)
        ]
        deadline = time.monotonic() + ANSWER_SECONDS
        while not all(f.done() for f in futures):
            assert time.monotonic() < deadline, f"not all are answered: {server.metrics()}"
            metrics = server.metrics()
            most = {name: max(value, metrics[f"vllm:num_requests_{name}"]) for name, value in most.items()}
            time.sleep(0.2)
    usages = [f.result()["usage"] for f in futures]
    assert [u["completion_tokens"] for u in usages] == lengths
    assert [u["prompt_tokens"] for u in usages] == [len(p) for p in prompts]
    assert 1 < most["running"] <= SEATS and most["waiting"] > 0
    assert server.metrics()["vllm:num_preemptions_total"] > before
    server.wait_until_idle()


def test_clients_that_hang_up(server, tokens):
    """Streams left in the middle: their blocks are free again, for a request that needs most of them."""
    for _ in range(3):
        streams = [server.stream("/v1/completions", prompt=tokens[i : i + 700], max_tokens=1200) for i in range(4)]
        for events in streams:
            next(events)
        for events in streams:
            events.close()
    server.wait_until_idle()
    answer = server.complete(tokens[:2000], max_tokens=40, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 40


# --- Faults -----------------------------------------------------------------------------------------------------------

HOSTILE = {
    "no JSON": b"{",
    "nothing": b"",
    "a list": [],
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "very deep": b"[" * 100_000,
    "no prompt": {},
    "another model": {"prompt": "a", "model": "no-such-model"},
    "prompt of a wrong type": {"prompt": {"a": 1}},
    "empty prompt": {"prompt": []},
    "tokens that do not exist": {"prompt": [4096, 10**9]},
    "negative tokens": {"prompt": [-1, -2]},
    "huge tokens": {"prompt": [2**70]},
    "too long": {"prompt": "a b c " * 20_000},
    "max_tokens 0": {"prompt": "a", "max_tokens": 0},
    "max_tokens -1": {"prompt": "a", "max_tokens": -1},
    "max_tokens huge": {"prompt": "a", "max_tokens": 10**30},
    "max_tokens a word": {"prompt": "a", "max_tokens": "many"},
    "temperature -1": {"prompt": "a", "temperature": -1},
    "temperature infinite": b'{"model": "books", "prompt": "a", "temperature": Infinity}',
    "temperature NaN": b'{"model": "books", "prompt": "a", "temperature": NaN}',
    "top_p 2": {"prompt": "a", "top_p": 2},
    "top_k -7": {"prompt": "a", "top_k": -7},
    "n 0": {"prompt": "a", "n": 0},
    "n huge": {"prompt": "a", "n": 10**9},
    "logprobs huge": {"prompt": "a", "logprobs": 10**6},
    "logprobs -5": {"prompt": "a", "logprobs": -5},
    "penalty 9": {"prompt": "a", "presence_penalty": 9},
    "repetition penalty 0": {"prompt": "a", "repetition_penalty": 0},
    "bad regex": {"prompt": "a", "structured_outputs": {"regex": "(((("}},
    "bad schema": {"prompt": "a", "structured_outputs": {"json": {"type": "no-such-type"}}},
    "bad grammar": {"prompt": "a", "structured_outputs": {"grammar": "root = = ="}},
    "two constraints": {"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["a"]}},
    "allowed tokens that do not exist": {"prompt": "a", "allowed_token_ids": [10**7]},
    "no allowed tokens": {"prompt": "a", "allowed_token_ids": []},
    "stop of a wrong type": {"prompt": "a", "stop": [1, 2]},
    "echo streamed with bad options": {"prompt": "a", "stream": False, "stream_options": {"include_usage": True}},
}


def test_hostile_bodies(server, tokens):
    """Each gets 4xx while others are answered as if nothing had happened."""
    body = {"max_tokens": 60, "ignore_eos": True}
    prompts = [tokens[30 * i : 30 * i + 200] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.complete, p, **body) for p in prompts * 3]
        statuses = {}
        for name, hostile in HOSTILE.items():
            if isinstance(hostile, dict):
                hostile = {"model": MODEL, "max_tokens": 4, **hostile}
            statuses[name] = server.post("/v1/completions", hostile)
        assert [f.result()["usage"]["completion_tokens"] for f in others] == [60] * 12
    assert {name: status for name, (status, _) in statuses.items() if not 400 <= status < 500} == {}
    assert server.post("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user"}] * 3, "n": "x"})[0] == 400
    server.wait_until_idle()


@pytest.mark.parametrize("which", ["Worker", "EngineCore"])
def test_z_killed(servers, tokens, which):
    """Last, because each ends a server: a process of its engine dies in the middle of an answer. An error, and no hang."""
    server = servers[0] if which == "Worker" else servers[1]
    (victim,) = server.children(which)
    engine = server.children("EngineCore") + server.children("Worker")
    events = server.stream("/v1/completions", prompt=tokens[:500], max_tokens=3000, ignore_eos=True)
    next(events)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises((OSError, http.client.HTTPException, StreamError)):
        for event in events:
            if "error" in event:
                raise StreamError(event["error"]["message"])
    server.process.wait(ANSWER_SECONDS)  # vLLM's status is 0 then
    assert "EngineDeadError" in server.log
    wait_for(lambda: not any(command_line(pid) for pid in engine), ANSWER_SECONDS, lambda: f"left behind: {engine}")


class StreamError(Exception):
    """An error that the server sent as an event."""


# --- Starts that end in a sentence --------------------------------------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 512, "torch_dtype": "bfloat16"}


def test_what_cannot_work_ends_before_weights_are_read(books_4m, tmp_path):
    """Over the command line: one sentence each, a status not zero, no weights (one model has none)."""
    folder = tmp_path / "mistral"
    folder.mkdir()
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024}
    (folder / "config.json").write_text(json.dumps(mistral))
    cases = {
        (books_4m, "--speculative-config", '{"method": "quantspec", "draft_wieghts": "int4"}'): (
            "quantspec: unknown option 'draft_wieghts' in the speculative config; did you mean 'draft_weights'?"
        ),
        (str(folder), "--speculative-config", "quantspec", "--skip-tokenizer-init"): (
            f"quantspec: {folder} has sliding-window attention in every layer, which the hierarchical KV cache does not"
        ),
    }
    with ThreadPoolExecutor(len(cases)) as pool:
        done = list(pool.map(try_to_serve, cases))
    for process, sentence in zip(done, cases.values(), strict=True):
        assert process.returncode != 0 and sentence in process.stdout, process.stdout
        assert "Starting to load model" not in process.stdout


def try_to_serve(arguments: tuple[str, ...]) -> subprocess.CompletedProcess:
    command = [*VLLM, "serve", *arguments, "--host", "127.0.0.1", "--port", str(free_port())]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, env=environment(), timeout=START_SECONDS, **streams)
