"""The command line and the demo's screen, without an engine."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from vllm_quantspec import __version__, cli, demo, demo_worker

JOB = demo.Job(model="owner/name", prompt="It was", max_tokens=8, num_speculative_tokens=3)
PLAIN = demo.Result(
    token_ids=[5, 7, 11, 13, 17, 19, 23, 29],
    text="the best of [times], it was",
    num_prompt_tokens=8180,
    num_prompt_tokens_cut=0,
    startup_seconds=9.0,
    prefill_seconds=1.25,
    decode_tokens_per_second=187.5,
    kv_bytes={"exact": 2560, "target": 1340.0, "draft": 700.0},
    kv_dtype="bfloat16",
    kv_capacity=415_749,
    device="cpu",
)
SPECULATIVE = replace(PLAIN, num_drafts=200, accepted_per_position=[190, 171, 150], kv_capacity=790_000)
RESULTS = {"quantspec": SPECULATIVE, "cache": replace(PLAIN, kv_capacity=790_000), "plain": PLAIN}


def screen(renderable, width=120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_help_and_version_need_no_vllm():
    code = "import sys; from vllm_quantspec.cli import main; main(sys.argv[1:])"
    for argument, expected in (("--help", "demo"), ("--version", __version__)):
        command = [sys.executable, "-X", "importtime", "-c", code, argument]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and expected in done.stdout
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert imported.isdisjoint({"vllm", "torch", "transformers"})


def test_help_of_demo_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["demo", "--help"])
    text = capsys.readouterr().out
    for option in ("--model", "--prompt-file", "--max-tokens", "--num-speculative-tokens", "--verbose"):
        assert option in text


def test_arguments_become_a_job(monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(demo, "run", lambda job, verbose: jobs.append((job, verbose)) or 0)
    (tmp_path / "text").write_text("It was a dark night.\n")
    arguments = ["--model", "owner/name", "--prompt-file", str(tmp_path / "text"), "--max-tokens", "9", "-v"]
    assert cli.main(["demo", *arguments, "--num-speculative-tokens", "6"]) == 0
    assert cli.main(["demo"]) == 0
    assert jobs[0] == (demo.Job("owner/name", "It was a dark night.", 9, 6), True)
    shipped, verbose = jobs[1]
    assert shipped.model.endswith("books-4m") and len(shipped.prompt) > 20_000 and not verbose
    assert shipped.num_speculative_tokens == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/no/such/model"], "--model /no/such/model: no such directory"),
        (["--model", "{tmp}"], "has no config.json"),
        (["--prompt-file", "{tmp}/missing"], "missing: cannot be read (No such file or directory)."),
        (["--prompt-file", "{tmp}/empty"], "empty: the file is empty."),
        (["--prompt-file", "{tmp}/binary"], "binary: cannot be read (not UTF-8 text)."),
    ],
)
def test_a_wrong_path_is_one_sentence(arguments, sentence, tmp_path, capsys):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["demo", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--max-tokens", "0"], ["--num-speculative-tokens", "x"], ["--unknown"]])
def test_a_wrong_option_stops_before_any_engine(arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *arguments])


def test_report_of_identical_outputs():
    text = screen(demo.report(JOB, RESULTS))
    assert "the best of [times], it was" in text  # brackets in the text are not markup
    assert "Identical: all 8 tokens" in text and "writes the same text too" in text
    for number in ("95%", "86%", "75%", "3.56", "187.5", "8,180", "2,560", "1,340", "1/1.91", "1/3.66", "790,000"):
        assert number in text, number


def test_report_of_different_outputs_says_where():
    different = replace(SPECULATIVE, token_ids=[5, 7, 12, 13, 17, 19, 23, 29], num_prompt_tokens_cut=1200)
    text = screen(demo.report(JOB, {**RESULTS, "quantspec": different}))
    assert "Not identical" in text and "first 2 of 8 tokens" in text and "first 1,200 tokens of the prompt" in text


def fake_child(monkeypatch, script: str) -> None:
    """Let the demo start ``script`` in place of an engine; in it, ``fd`` is where events go."""
    real = demo.subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, "-c", f"import os, sys; fd = {command[-1]}; {script}"], **options)

    monkeypatch.setattr(demo.subprocess, "Popen", popen)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ('os.write(fd, b\'{"error": "No GPU kernels yet."}\\n\')', "QuantSpec failed. No GPU kernels yet.\nIts log: "),
        ("os.kill(os.getpid(), 9)", "its process was killed by SIGKILL (out of memory?)"),
        ("sys.exit(3)", "its process ended with status 3"),
    ],
)
def test_a_failing_engine_is_one_sentence(monkeypatch, tmp_path, script, sentence):
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    fake_child(monkeypatch, f"sys.stdin.read(); {script}")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert demo.run(JOB, console=console) == 1
    assert sentence in console.export_text()
    assert len(list(tmp_path.iterdir())) == 1  # its log


@pytest.mark.parametrize(
    ("script", "doing"),
    [
        ('os.write(fd, b\'{"stage": "warming up"}\\n{"computing": true}\\n\')', "warming up"),
        ('os.write(fd, b\'{"stage": "warming up"}\\n{"text": "half a li\')', "warming up"),  # in the middle of a line
        ("os.close(fd)", "decoding"),  # as if it had all been said
    ],
)
def test_a_stuck_engine_is_one_sentence(monkeypatch, tmp_path, script, doing):
    monkeypatch.setattr(demo, "SILENT_SECONDS", 2)
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    fake_child(monkeypatch, f"import time; sys.stdin.read(); {script}; time.sleep(100)")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert demo.run(JOB, console=console) == 1
    assert f"QuantSpec failed. its process said nothing for 2 s while {doing}, and was ended." in console.export_text()
    assert len(list(tmp_path.iterdir())) == 1  # its log


def test_engines_run_one_after_the_other_and_leave_no_log(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    result = json.dumps({"result": demo.asdict(SPECULATIVE)})
    fake_child(monkeypatch, f"sys.stdin.read(); print('noise'); os.write(fd, {(result + chr(10)).encode()!r})")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert demo.run(JOB, console=console) == 0
    text = console.export_text()
    assert "noise" not in text and all(f"done  {title}" in text for title in demo.ENGINES.values())
    assert not list(tmp_path.iterdir())


def test_an_error_loses_its_frame():
    framed = "1 validation error for VllmConfig\n  Value error, quantspec: no MLA. [type=value_error, x=1]"
    assert demo_worker.one_sentence(ValueError(framed)) == "quantspec: no MLA."
    assert demo_worker.one_sentence(RuntimeError("first\nsecond")) == "first"
    assert demo_worker.one_sentence(KeyError()) == "KeyError"
