"""The server as a person starts it: processes of its own, nothing imported, the plugin found by its entry point."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT

START_SECONDS = 240


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(books_4m, tmp_path_factory):
    """Address of `vllm serve MODEL --speculative-config quantspec`, and its log."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", books_4m]
    command += ["--speculative-config", "quantspec", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT.parent, env=environment, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"the server did not start:\n{log.read_text()[-3000:]}"
                time.sleep(1)
        yield address, log
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def complete(address: str, **body) -> dict:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_completion_and_metrics(server, books_4m, passage):
    address, log = server
    answer = complete(address, model=books_4m, prompt=passage[:2500], max_tokens=48, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 48 and answer["choices"][0]["finish_reason"] == "length"
    metrics = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    accepted = [line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total")]
    assert accepted and float(accepted[0].split()[-1]) > 20
    text = log.read_text()
    assert "INT4 draft weights" in text and "method='quantspec'" in text


def test_a_mistake_ends_the_server_with_its_sentence(books_4m):
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", books_4m, "--speculative-config"]
    mistake = '{"method": "quantspec", "draft_wieghts": "int4"}'
    done = subprocess.run([*command, mistake], capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode != 0
    assert "unknown option 'draft_wieghts' in the speculative config; did you mean 'draft_weights'?" in done.stderr
