"""Start `vllm serve` as a person does, talk to it over HTTP, read its metrics and its log."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT
from vllm.platforms import current_platform

START_SECONDS = 240
ANSWER_SECONDS = 120
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
MODEL = "books"


def environment(**more: str) -> dict[str, str]:
    """What a server gets: small, and with the log that the tests read; it is processes of its own."""
    server = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOG_STATS_INTERVAL": "1"}
    server |= {"KMP_BLOCKTIME": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, **server, **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """One `vllm serve` on this machine."""

    def __init__(self, model: str, arguments: Sequence[str], log: Path, **variables: str):
        self.log_path, self.port = log, free_port()
        command = [*VLLM, "serve", model, "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--chat-template", CHAT_TEMPLATE, *arguments]
        if current_platform.is_cpu():  # compiling takes longer than the test, as in engine_tools.py
            command.append("--enforce-eager")
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT.parent, env=environment(**variables), stdout=output, stderr=output, start_new_session=True
            )

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log[-3000:]}"
            try:
                return self.get("/health")[0] == 200
            except OSError:
                return False

        wait_for(ready, START_SECONDS, lambda: f"the server did not start:\n{self.log[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine too: a group of its own
            self.process.wait(60)

    def get(self, path: str) -> tuple[int, str]:
        return send(urllib.request.Request(self.address + path))

    def post(self, path: str, body: object) -> tuple[int, dict | str]:
        """Status and answer of a request; ``body`` is sent as JSON, or as it is if it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text = send(urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}))
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def complete(self, prompt, **body) -> dict:
        """The answer of /v1/completions, which must succeed; greedy unless told otherwise."""
        status, answer = self.post("/v1/completions", {"model": MODEL, "prompt": prompt, "temperature": 0, **body})
        assert status == 200, answer
        return answer

    def chat(self, messages: list[dict], **body) -> dict:
        status, answer = self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, "temperature": 0, **body})
        assert status == 200, answer
        return answer

    def stream(self, path: str, **body) -> Iterator[dict]:
        """The events of a streamed answer; closing the iterator hangs up."""
        body = {"model": MODEL, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read().decode()
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    return
                yield json.loads(line[len(b"data: ") :])
            raise ConnectionError("the stream ended without [DONE]")
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Every vllm: sample by name, and per-position counters by ``name[position]``; samples of a name are summed."""
        values: dict[str, float] = {}
        for line in self.get("/metrics")[1].splitlines():
            match = re.match(r"(vllm:\w+)(\{.*\})? (\S+)$", line)
            if match:
                position = re.search(r'position="(\d+)"', match[2] or "")
                name = match[1] + (f"[{position[1]}]" if position else "")
                values[name] = values.get(name, 0.0) + float(match[3])
        return values

    def wait_until_idle(self) -> None:
        """Nothing runs or waits, and no block is in use."""

        def idle() -> bool:
            # The gauges are those of the engine's last step: make it take one, in case the last was before an abort.
            self.complete([1], max_tokens=1)
            m = self.metrics()
            return not (m["vllm:num_requests_running"] or m["vllm:num_requests_waiting"] or m["vllm:kv_cache_usage_perc"])

        wait_for(idle, ANSWER_SECONDS, lambda: f"requests are left: {self.metrics()}")

    def children(self, name: str) -> list[int]:
        """Process ids below the server whose title contains ``name`` (vLLM's: EngineCore, Worker)."""
        return [pid for pid in descendants(self.process.pid) if name in command_line(pid)]


@contextmanager
def serve(model: str, arguments: Sequence[str], log: Path, **variables: str) -> Iterator[Server]:
    server = Server(model, arguments, log, **variables)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def send(request: urllib.request.Request) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def wait_for(condition: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [d for child in children for d in (child, *descendants(child))]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
