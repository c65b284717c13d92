#!/usr/bin/env python3
"""Many clients at once against `vllm serve`: is every token of every answer there, once, and does memory stay flat?

Each client asks, in turn, for greedy continuations of excerpts of 1 to --max-prompt tokens. It streams the answer, asks for
the same answer in one piece, and compares: streamed pieces against streamed tokens, both against the usage that the server
states, and one answer against the other (up to near-ties: other requests in the batch change the order of sums). One stream
in eight is left in the middle. At the end nothing may be running, and no block of the KV cache in use.

    python benchmarks/serve_load.py [--url URL] [--model DIR] [--clients 32] [--minutes 3] [--max-prompt 8000] [--json OUT]

Without --url it starts its own server, with --speculative-config quantspec, and follows its processes' memory and, where
there is one, the GPU's. serve_bench.py does the same to a model of 8B parameters, with random weights.
"""

import argparse
import http.client
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "vllm_quantspec" / "assets"
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
QUANTSPEC = ("--speculative-config", "quantspec")
TIMEOUT = 300


class Client:
    """HTTP to one server."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = parts.hostname, parts.port or 80

    def _open(self, method: str, path: str, body: dict | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", "Connection": "close"})
        response = connection.getresponse()
        if response.status != 200:
            with response:
                raise OSError(f"{path} answered {response.status}: {response.read().decode()[:300]}")
        return response

    def get(self, path: str) -> str:
        with self._open("GET", path) as response:
            return response.read().decode()

    def post(self, path: str, body: dict) -> dict:
        with self._open("POST", path, body) as response:
            return json.load(response)

    def stream(self, path: str, body: dict):
        """The events of a streamed answer; closing the generator hangs up."""
        with self._open("POST", path, {**body, "stream": True, "stream_options": {"include_usage": True}}) as response:
            for line in response:
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[len(b"data: ") :])
            raise OSError("the stream ended without [DONE]")

    def metrics(self) -> Counter[str]:
        """vLLM's samples by name; those that differ in labels only are summed."""
        values: Counter[str] = Counter()
        for line in self.get("/metrics").splitlines():
            if line.startswith("vllm:"):
                name, value = line.rsplit(" ", 1)
                values[name.split("{")[0]] += float(value)
        return values


# --- One request ------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)  # the likeliest tokens at each step
    finish_reasons: list[str] = field(default_factory=list)
    num_tokens: int | None = None  # as the server's usage says

    def add(self, event: dict) -> None:
        """Take in a whole answer, or one event of a stream."""
        for choice in event["choices"]:
            self.text += choice["text"]
            logprobs = choice["logprobs"] or {"tokens": [], "top_logprobs": []}
            self.tokens += map(token_id, logprobs["tokens"])
            self.top += [{token_id(t): p for t, p in step.items()} for step in logprobs["top_logprobs"]]
            self.finish_reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        if event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]


def token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def mistakes(answer: Answer, max_tokens: int, text: str | None) -> list[str]:
    """What is wrong with an answer on its own; ``text`` is what its tokens decode to, if that can be compared."""
    wrong = []
    if not len(answer.tokens) == answer.num_tokens == max_tokens:
        wrong.append(f"{len(answer.tokens)} tokens, usage says {answer.num_tokens}, asked for {max_tokens}")
    if answer.finish_reasons != ["length"]:
        wrong.append(f"finish reasons {answer.finish_reasons}")
    if text is not None and answer.text != text:
        wrong.append(f"text {answer.text[-80:]!r}, its tokens are {text[-80:]!r}")
    return wrong


def gap(a: Answer, b: Answer) -> float | None:
    """None if the tokens are the same; else by how much (nats) the first answer preferred its token where they part."""
    for x, y, top in zip(a.tokens, b.tokens, a.top, strict=False):
        if x != y:
            return top[x] - top[y] if y in top else math.inf
    return None


# --- Many ---------------------------------------------------------------------------------------------------------------


class Load:
    """``clients`` threads that ask until the time is up; what they saw.

    Args:
        text: what prompts are cut from, as text or as tokens.
        tie: nats up to which two tokens count as tied; with infinity, streamed and whole answers may differ.
        pid: the server's process, to follow its memory.
    """

    def __init__(
        self,
        url: str,
        text: str | list[int],
        clients: int,
        seconds: float,
        max_prompt: int,
        tie: float,
        pid: int | None = None,
    ):
        self.client = Client(url)
        self.model = json.loads(self.client.get("/v1/models"))["data"][0]["id"]
        if isinstance(text, str):
            text = self.client.post("/tokenize", {"model": self.model, "prompt": text})["tokens"]
        self.tokens = text
        self.tokens = self.tokens * math.ceil((max_prompt + 1) / len(self.tokens))
        self.clients, self.seconds, self.max_prompt, self.tie, self.pid = clients, seconds, max_prompt, tie, pid
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.gaps: list[float] = []
        self.samples: list[dict] = []

    def run(self, progress: bool = True) -> dict:
        """Run it all; the summary."""
        before = self.client.metrics()
        started = time.monotonic()
        self.deadline = started + self.seconds
        threads = [threading.Thread(target=self.ask, args=(i,), daemon=True) for i in range(self.clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            waited = time.monotonic() - self.deadline
            if waited > 2 * TIMEOUT:  # a client gives up after TIMEOUT without a byte
                raise TimeoutError(f"the server still answers {waited:.0f} s after the last request")
            self.sample(time.monotonic() - started, progress)
            threads[0].join(5)
            if not threads[0].is_alive():
                time.sleep(0.5)
        elapsed = time.monotonic() - started
        idle = self.wait_until_idle()
        self.sample(time.monotonic() - started, progress)
        spent = Counter({name: value - before[name] for name, value in self.client.metrics().items()})
        drafts = spent["vllm:spec_decode_num_drafts_total"]
        return {
            "clients": self.clients,
            "seconds": round(elapsed, 1),
            "requests": self.counts["answers"],
            "prompt_tokens": self.counts["prompt_tokens"],
            "generated_tokens": self.counts["tokens"],
            "streams_compared": self.counts["compared"],
            "streams_left": self.counts["left"],
            "errors": self.errors,
            "parted_at_a_tie": len(self.gaps),
            "largest_tie_nats": round(max(self.gaps, default=0.0), 4),
            "preemptions": int(spent["vllm:num_preemptions_total"]),
            # Of requests' verifications that had drafts.
            "mean_acceptance_length": round(1 + spent["vllm:spec_decode_num_accepted_tokens_total"] / drafts, 2)
            if drafts
            else None,
            "mean_drafts": round(spent["vllm:spec_decode_num_draft_tokens_total"] / drafts, 2) if drafts else None,
            "kv_cache_usage_afterwards": idle,
            "memory_mib": self.memory_summary(),
        }

    def ask(self, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.deadline:
            length = round(math.exp(chance.uniform(0, math.log(self.max_prompt))))
            start = chance.randrange(len(self.tokens) - length + 1)
            body = {
                "model": self.model,
                "prompt": self.tokens[start : start + length],
                "max_tokens": chance.randint(1, 96),
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 5,
                "return_tokens_as_token_ids": True,
            }
            if chance.random() < 0.5:  # not from the prefix cache
                body["cache_salt"] = f"{number}-{chance.random()}"
            try:
                if chance.random() < 1 / 8:
                    self.leave(body, after=chance.randint(1, 10))
                else:
                    self.compare(body)
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                with self.lock:
                    self.errors.append(f"{type(error).__name__}: {error}")

    def leave(self, body: dict, after: int) -> None:
        events = self.client.stream("/v1/completions", body)
        seen = sum(1 for _, _ in zip(range(after), events, strict=False))
        events.close()
        with self.lock:
            self.counts.update(left=1, answers=1, events=seen)

    def compare(self, body: dict) -> None:
        streamed, whole = Answer(), Answer()
        for event in self.client.stream("/v1/completions", body):
            streamed.add(event)
        whole.add(self.client.post("/v1/completions", body))
        wrong = []
        # Where a prompt ends inside a character, vLLM's detokenizer begins the answer's text with the prompt's.
        splits_character = self.detokenize(body["prompt"][-4:]).endswith("\ufffd")
        for name, answer in (("streamed", streamed), ("whole", whole)):
            text = None if splits_character else self.detokenize(answer.tokens).rstrip("\ufffd")
            wrong += [f"{name}: {mistake}" for mistake in mistakes(answer, body["max_tokens"], text)]
        difference = gap(whole, streamed) if self.tie < math.inf else None
        if difference is not None and difference > self.tie:
            wrong.append(f"streamed and whole part by {difference:.3f} nats, prompt of {len(body['prompt'])} tokens")
        with self.lock:
            self.errors += wrong
            self.gaps += [] if difference is None else [difference]
            tokens = len(streamed.tokens) + len(whole.tokens)
            self.counts.update(compared=1, answers=2, tokens=tokens, prompt_tokens=2 * len(body["prompt"]))

    def detokenize(self, tokens: list[int]) -> str:
        return self.client.post("/detokenize", {"model": self.model, "tokens": tokens})["prompt"]

    def wait_until_idle(self) -> float:
        """Wait for requests that were left to end; the share of the KV cache in use then."""
        for _ in range(60):
            # The gauges are those of the engine's last step: make it take one.
            self.client.post("/v1/completions", {"model": self.model, "prompt": [1], "max_tokens": 1})
            metrics = self.client.metrics()
            if not (metrics["vllm:num_requests_running"] or metrics["vllm:num_requests_waiting"]):
                break
            time.sleep(0.5)
        return metrics["vllm:kv_cache_usage_perc"]

    # --- Memory of the server's processes

    def sample(self, seconds: float, progress: bool) -> None:
        memory = {} if self.pid is None else {name: rss(pid) for pid, name in processes(self.pid)} | gpu_memory()
        with self.lock:
            row = {"seconds": round(seconds, 1), "requests": self.counts["answers"], "tokens": self.counts["tokens"]}
            row |= {"errors": len(self.errors), "memory_mib": memory}
        self.samples.append(row)
        if progress:
            used = ", ".join(f"{name} {mib:.0f}" for name, mib in memory.items())
            print(
                f"{row['seconds']:6.0f} s  {row['requests']:5d} answers  {row['tokens']:7d} tokens  {row['errors']} errors"
                + (f"  MiB: {used}" if used else ""),
                flush=True,
            )

    def memory_summary(self) -> dict[str, dict[str, float]]:
        """Of each process: after a third of the time (warm-up), and at the end."""
        warm = next((s for s in self.samples if s["seconds"] >= self.seconds / 3), self.samples[-1])["memory_mib"]
        end = self.samples[-1]["memory_mib"]
        # Compilers that a server starts at first are gone by then.
        return {name: {"after_warm_up": warm[name], "end": end[name]} for name in warm if name in end}


def processes(pid: int) -> list[tuple[int, str]]:
    """A process and those below it, with their names."""
    try:
        found = [(pid, Path(f"/proc/{pid}/comm").read_text().strip())]
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                found += processes(int(child))
    except OSError:  # it ended meanwhile
        return []
    return [(p, name) for p, name in found if "python" not in name or p == pid]  # not Python's resource tracker


def rss(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return 0.0
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmRSS")), 0.0)


def gpu_memory() -> dict[str, float]:
    """{"GPU 0": MiB in use, by whatever process} of the visible ones; nothing without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    command += [f"--id={ids}"] if (ids := os.environ.get("CUDA_VISIBLE_DEVICES")) else []
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    return {f"GPU {index}": float(mib) for index, mib in (line.split(",") for line in lines)}


# --- A server of its own ------------------------------------------------------------------------------------------------


def start_server(
    model: str, max_model_len: int, max_num_seqs: int, log: Path, arguments: Sequence[str] = QUANTSPEC
) -> tuple[subprocess.Popen, str]:
    """A `vllm serve` and its address, ready; with CUDA graphs where there is a GPU."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [*VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(port), *arguments]
    command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
    command += [] if gpu_memory() else ["--enforce-eager"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    print(f"starting {' '.join(command[2:])} (log: {log})", flush=True)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            Client(url).get("/health")
            return process, url
        except OSError:
            if process.poll() is not None:
                sys.exit(f"the server ended with {process.returncode}: see {log}")
            time.sleep(1)
    stop_server(process)
    sys.exit(f"the server did not start within {TIMEOUT} s: see {log}")


def stop_server(process: subprocess.Popen) -> None:
    """Ask it to end, and end it if it does not within a minute."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="a running server; without it one is started")
    parser.add_argument("--pid", type=int, help="process of the running server, to follow its memory")
    parser.add_argument("--model", default=str(ASSETS / "books-4m"))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--max-prompt", type=int, default=8000, help="tokens of the longest prompt")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="of the server that is started")
    parser.add_argument("--tie", type=float, default=0.25, help="nats up to which two tokens count as tied")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()

    process, url, pid = None, args.url, args.pid
    if url is None:
        log = Path(os.environ.get("TMPDIR", "/tmp")) / f"serve_load-{os.getpid()}.log"
        process, url = start_server(args.model, args.max_prompt + 128, args.max_num_seqs, log)
        pid = process.pid
    try:
        text = (ASSETS / "passage.txt").read_text(encoding="utf-8")
        load = Load(url, text, args.clients, 60 * args.minutes, args.max_prompt, args.tie, pid)
        summary = load.run()
    finally:
        if process is not None:
            stop_server(process)
    print(json.dumps(summary, indent=1))
    if args.json:
        from common import write_json

        server = {"model": Path(args.model).name, "max_prompt": args.max_prompt, "max_num_seqs": args.max_num_seqs}
        write_json(args.json, load.samples, server=server, summary=summary)
    sys.exit(bool(summary["errors"]))


if __name__ == "__main__":
    main()
