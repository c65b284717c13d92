"""The batch example on Ray Data: killed in the middle and started again, it writes every row once, as plain engines do."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from engine_tools import Answer, assert_same_or_tied, engine, generate, quantspec
from vllm.platforms import current_platform

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'vllm-quantspec[ray]'")
pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="written for the CPU engine")

LIMIT_SECONDS = 300  # a guard against hanging
ENGINE = {"enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 4}
SAMPLING = {"max_tokens": 48, "temperature": 0, "ignore_eos": True}
TIE = 0.125
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def rows(passage):
    """24 prompts; ids of both types, some rows with sampling parameters of their own; and one that is too long."""
    rows = []
    for i in range(24):
        row = {"id": i if i % 2 else f"row {i}", "prompt": passage[300 * i : 300 * i + 300 + 40 * i]}
        rows.append({**row, "max_tokens": 20} if i % 3 == 0 else row)
    return [*rows, {"id": "too long", "prompt": passage[:20000]}]


def start(input_path: Path, output_path: Path, model: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), str(input_path), str(output_path), "--model", model]
    command += ["--batch-size", str(BATCH_SIZE), "--return-token-ids"]
    command += ["--sampling-params", json.dumps(SAMPLING), "--engine-kwargs", json.dumps(ENGINE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # no file in the home directory
    with output_path.with_suffix(".log").open("a") as log:
        # A session of its own: what belongs to this run can be told apart, and killed, by it.
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def processes_of(session: int) -> list[str]:
    """Names of the processes of a session that have not ended."""
    names = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().rsplit(")", 1)
        except OSError:
            continue  # it ended meanwhile
        state, _, _, its_session = fields.split()[:4]
        if int(its_session) == session and state not in "ZX":
            names.append(name.partition("(")[2])
    return names


def wait_for(condition, what: str, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen; the log ends:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def test_killed_and_resumed(books_4m, rows, tmp_path):
    input_path, output_path, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.log"
    input_path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    run = start(input_path, output_path, books_4m)
    try:
        written = lambda: output_path.read_bytes().count(b"\n") if output_path.exists() else 0  # noqa: E731
        wait_for(lambda: written() or run.poll() is not None, "the first block", log)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    before = written()
    assert 0 < before < len(rows), log.read_text()[-3000:]
    # Ray's workers and vLLM's notice that their driver is gone: nothing keeps the memory.
    wait_for(lambda: not processes_of(run.pid), "the end of the killed run's processes", log)
    with output_path.open("ab") as output:
        output.write(b'{"id": "row 22", "text": "half a li')  # as if the kill had come while a line was written
    kept = output_path.read_bytes().splitlines()[:before]

    run = start(input_path, output_path, books_4m)
    try:
        wait_for(lambda: run.poll() is not None, "the second run's end", log)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    text = log.read_text()
    assert run.returncode == 0, text[-3000:]
    assert f"25 rows, {before} of them done before" in text and "cutting off an unfinished line of 35 bytes" in text
    lines = output_path.read_bytes().splitlines()
    assert lines[:before] == kept
    completions = {line["id"]: line for line in map(json.loads, lines)}
    assert len(lines) == len(rows) and completions.keys() == {row["id"] for row in rows}

    error = completions.pop("too long")
    assert "2048" in error["error"] and "text" not in error
    with engine(books_4m, **ENGINE, **quantspec()) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [tokenizer.encode(row["prompt"]) for row in rows[:-1]]
        expected = generate(llm, prompts, [row.get("max_tokens", SAMPLING["max_tokens"]) for row in rows[:-1]])
    actual = [completions[row["id"]] for row in rows[:-1]]
    assert_same_or_tied(expected, [Answer(c["token_ids"], "length", []) for c in actual], TIE, "batch")
    for prompt, answer in zip(prompts, actual, strict=True):
        assert answer["num_prompt_tokens"] == len(prompt)
        assert answer["num_generated_tokens"] == len(answer["token_ids"])
        assert answer["text"] == tokenizer.decode(answer["token_ids"])


@pytest.mark.parametrize(
    ("lines", "output", "sentence"),
    [
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "", "in.jsonl:2: the id 1 is there twice"),
        ('{"id": 1, "prompt": "a", "temprature": 0}\n', "", "in.jsonl:1: unknown sampling parameters temprature; known are"),
        ('{"id": 1, "prompt": "a"}\n{"id": 2, "pro\n', "", "in.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n', "", 'in.jsonl:1: needs "id"'),
        ('{"id": 1, "prompt": "a"}\n', "notes\nmore notes\n", "the line at byte 0 is not a completion"),
    ],
)
def test_mistakes(lines, output, sentence, tmp_path):
    (tmp_path / "in.jsonl").write_text(lines)
    (tmp_path / "out.jsonl").write_text(output)
    command = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), "in.jsonl", "out.jsonl", "--model", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode != 0 and sentence in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == output
