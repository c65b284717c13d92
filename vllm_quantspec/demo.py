"""The demo: one passage, three engines, one after the other, and a comparison.

Each engine lives in a child process (`demo_worker`), so that its memory is free before the next one starts and a crash
is one sentence; this module starts them, shows their progress and compares what they did.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vllm_quantspec.demo_worker import Job, Result

ENGINES = {
    "quantspec": "QuantSpec",
    "cache": "QuantSpec's cache, no speculation",
    "plain": "plain vLLM",
}


# Longest silence of an engine's process before it is taken for stuck: starting may load, and download, a large model.
SILENT_SECONDS = 1800


class EngineFailed(Exception):
    """An engine did not finish; the message is one sentence for the person who ran the demo."""


def run(job: Job, verbose: bool = False, console: Console | None = None) -> int:
    """Run the three engines and print the comparison; returns the exit status."""
    console = console or Console(highlight=False)
    model = f"{Path(job.model).name}, the model that ships with this package" if is_shipped(job) else job.model
    console.print(f"Continuing a passage of {len(job.prompt.split()):,} words with {model}", soft_wrap=True, markup=False)
    results: dict[str, Result] = {}
    for engine, title in ENGINES.items():
        try:
            results[engine] = watch(engine, title, job, verbose, console)
        except EngineFailed as error:
            console.print(f"[red]{title} failed.[/red] ", Text(str(error)), sep="", soft_wrap=True)
            return 1
    console.print(report(job, results))
    return 0


def watch(engine: str, title: str, job: Job, verbose: bool, console: Console) -> Result:
    """Run one engine in a child process and show its progress."""
    started = time.monotonic()
    animate = console.is_terminal and not verbose
    with Live(console=console, transient=True, refresh_per_second=8, auto_refresh=animate) as live:
        for event in events(engine, job, verbose):
            if "error" in event:
                raise EngineFailed(event["error"])
            if "stage" in event:
                if animate:
                    live.update(Spinner("dots", f"{title}: {event['stage']}"))
                else:
                    console.print(f"{title}: {event['stage']}")
            elif "text" in event and animate:
                live.update(Group(Spinner("dots", f"{title}: decoding"), Panel(Text(event["text"].strip("\n")))))
            elif "result" in event:
                result = Result(**event["result"])
    console.print(f"[green]done[/green]  {title} [dim]({time.monotonic() - started:.0f} s)[/dim]")
    return result


def events(engine: str, job: Job, verbose: bool) -> Iterator[dict]:
    """The events of a child process. Its own output goes to the screen with ``verbose``, else to a file that is kept
    (and named) if it fails."""
    receive, send = os.pipe()
    log_descriptor, log = tempfile.mkstemp(prefix="vllm-quantspec-", suffix=".log")
    output = None if verbose else log_descriptor
    where = "" if verbose else f"\nIts log: {log}"
    child = subprocess.Popen(
        [sys.executable, "-m", "vllm_quantspec.demo_worker", engine, str(send)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[send],
        env=environment(job),
        text=True,
    )
    os.close(send)
    os.close(log_descriptor)
    last: dict = {}
    try:
        child.stdin.write(json.dumps(asdict(job)))
        child.stdin.close()
        for line in lines_of(receive):
            event = json.loads(line)
            if "computing" in event:  # a sign of life
                continue
            last = event
            yield last if "error" not in last else {"error": last["error"] + where}
        child.wait(SILENT_SECONDS)
    except (Silent, subprocess.TimeoutExpired):
        stage, last = last.get("stage", "decoding"), {}
        child.kill()
        child.wait()
        yield {"error": f"its process said nothing for {SILENT_SECONDS:,} s while {stage}, and was ended.{where}"}
        return
    except KeyboardInterrupt:
        Path(log).unlink()
        raise
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        if verbose or "result" in last:
            Path(log).unlink(missing_ok=True)
    if "result" not in last and "error" not in last:
        yield {"error": f"its process {how_it_ended(child.returncode)} while {last.get('stage', 'decoding')}.{where}"}


class Silent(Exception):
    """Nothing came from an engine's process for `SILENT_SECONDS`."""


def lines_of(descriptor: int) -> Iterator[str]:
    """The lines of a pipe until its other end is closed, which closes this one.

    Raises:
        Silent: no byte came for `SILENT_SECONDS`.
    """
    rest = b""
    try:
        while True:
            if not select.select([descriptor], [], [], SILENT_SECONDS)[0]:
                raise Silent
            read = os.read(descriptor, 1 << 16)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from (line.decode() for line in lines)
    finally:
        os.close(descriptor)


def environment(job: Job) -> dict[str, str]:
    """Settings of the child, where the person has not made them: one process, so that errors arrive as they are; a
    thread per physical core (more of them wait for each other on a busy machine); no network for a local model."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if Path(job.model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    return {**defaults, **os.environ}


def how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def report(job: Job, results: dict[str, Result]) -> RenderableType:
    """The comparison of the engines' results, by engine name: "quantspec", "cache", "plain"."""
    speculative, cache, plain = (results[engine] for engine in ENGINES)
    parts: list[RenderableType] = [Panel(Text(speculative.text.strip("\n")), title="the continuation, by QuantSpec")]
    if is_shipped(job):
        parts.append(
            "[dim]A model this small soon repeats itself, which is easy to draft; --model takes a larger one.[/dim]"
        )
    if speculative.num_prompt_tokens_cut:
        parts.append(
            f"The first {speculative.num_prompt_tokens_cut:,} tokens of the prompt do not fit the model and were cut."
        )

    same = common_prefix(speculative.token_ids, cache.token_ids)
    total = len(speculative.token_ids)
    if speculative.token_ids == cache.token_ids:
        parts.append(f"[green]Identical:[/green] all {total} tokens are the same with and without speculation.")
    else:
        parts.append(
            f"[yellow]Not identical:[/yellow] with and without speculation the first {same} of {total} tokens are the "
            "same; only a numerical near-tie between two tokens may cause that."
        )
    close = common_prefix(cache.token_ids, plain.token_ids)
    parts.append(
        f"Plain vLLM, with an exact cache, writes the same first {close} of {len(plain.token_ids)} tokens."
        if close < len(plain.token_ids)
        else "Plain vLLM, with an exact cache, writes the same text too."
    )
    parts += [Text(), acceptance(speculative), Text(), speed(job, results), Text(), kv_cache(results)]
    if plain.device == "cpu":
        parts.append("[dim]The CPU engine is for running and checking everything without a GPU; it gains no speed.[/dim]")
    return Group(*parts)


def is_shipped(job: Job) -> bool:
    return Path(job.model) == Path(__file__).parent / "assets" / "books-4m"


def acceptance(result: Result) -> RenderableType:
    drafts = max(result.num_drafts, 1)
    table = comparison(f"Draft tokens accepted, of {result.num_drafts} drafts", "position")
    for position in range(len(result.accepted_per_position)):
        table.add_column(str(position + 1), justify="right")
    table.add_column("tokens per step", justify="right")
    rates = [f"{accepted / drafts:.0%}" for accepted in result.accepted_per_position]
    table.add_row("accepted", *rates, f"{1 + sum(result.accepted_per_position) / drafts:.2f}")
    return table


def speed(job: Job, results: dict[str, Result]) -> RenderableType:
    context = results["plain"].num_prompt_tokens
    table = comparison(
        f"Speed, one request, {context:,} tokens of context", "engine", "decode, tokens/s", "prefill, s", "start, s"
    )
    for engine, result in results.items():
        drafted = f", {job.num_speculative_tokens} draft tokens" if engine == "quantspec" else ""
        times = (result.decode_tokens_per_second, result.prefill_seconds, result.startup_seconds)
        table.add_row(ENGINES[engine] + drafted, *(f"{value:,.1f}" for value in times))
    return table


def kv_cache(results: dict[str, Result]) -> RenderableType:
    ours, plain = results["quantspec"], results["plain"]
    exact = plain.kv_bytes["exact"]
    table = comparison("KV cache, all layers", "what", "bytes per token", "ratio", "tokens that fit")
    table.add_row(f"plain vLLM, {plain.kv_dtype}", f"{exact:,.0f}", "1", f"{plain.kv_capacity:,}")
    rows = (
        ("target", "QuantSpec, stored", f"{ours.kv_capacity:,}"),
        ("draft", "  read by the draft", ""),
    )
    for key, name, capacity in rows:
        table.add_row(name, f"{ours.kv_bytes[key]:,.0f}", f"1/{exact / ours.kv_bytes[key]:.2f}", capacity)
    return table


def comparison(title: str, *headings: str) -> Table:
    """A table whose first column is text and the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if table.columns else "left")
    return table


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
