"""The command line, ``vllm-quantspec``."""

import argparse
import sys
from pathlib import Path

from vllm_quantspec import __version__

ASSETS = Path(__file__).parent / "assets"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-quantspec", description="QuantSpec for vLLM.")
    parser.add_argument("--version", action="version", version=f"vllm-quantspec {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="continue a long passage with and without QuantSpec, and compare",
        description="Continue a long passage with QuantSpec, with its cache alone and with plain vLLM, one engine "
        "after the other, and compare text, speed, acceptance and the size of the KV cache.",
    )
    demo.add_argument("--model", metavar="PATH_OR_HUB_ID", help="default: the small model that ships with the package")
    demo.add_argument("--prompt-file", type=Path, metavar="FILE", help="text to continue; default: a passage from Dracula")
    demo.add_argument("--max-tokens", type=positive, default=128, metavar="N", help="tokens to write; default: 128")
    demo.add_argument(
        "--num-speculative-tokens", type=positive, default=4, metavar="N", help="tokens drafted per step; default: 4"
    )
    demo.add_argument("-v", "--verbose", action="store_true", help="show vLLM's own log")
    add_estimate(commands)
    return parser


def add_estimate(commands) -> None:
    estimate = commands.add_parser(
        "estimate",
        help="memory and speed to expect of a model, from its config.json",
        description="Say what a model needs on a GPU with and without QuantSpec, how many requests fit, and what speed "
        "to expect. Speeds come from a cost model that was fitted to measurements on an H200.",
    )
    add = estimate.add_argument
    add("model", metavar="MODEL", help="a config.json, the folder of one, or a hub id")
    add("--gpu-memory", type=float, default=139.8, metavar="GIB", help="of one GPU; default: 139.8 (an H200)")
    add("--bandwidth", type=float, default=4.26, metavar="TB/S", help="of a copy on it; default: 4.26 (an H200)")
    add("--gpu-memory-utilization", type=float, default=0.92, metavar="F", help="as in vLLM; default: 0.92")
    add("--tensor-parallel-size", type=positive, default=1, metavar="N", help="number of GPUs; default: 1")
    add("--overhead", type=float, default=2.5, metavar="GIB", help="activations, CUDA graphs and so on; default: 2.5")
    add("--context", type=positive, default=32768, metavar="N", help="tokens per request; default: 32768")
    add("--batch", type=positive, default=1, metavar="N", help="requests at the same time; default: 1")
    add("--max-num-seqs", type=positive, metavar="N", help="as in vLLM; default: vLLM's, 1024 from 70 GiB on, below 256")
    names = ("quantspec_int8", "quantspec_int4")  # config.CACHE_DTYPES, which --help need not import torch for
    add("--kv-cache-dtype", choices=names, default=names[0], help=f"default: {names[0]}")
    add("--group-size", type=int, choices=(64, 128), default=128, help="default: 128")
    add(
        "--acceptance",
        type=probability,
        metavar="P",
        help="accepted drafts per token; default: 0.93, or 0.90 of drafts that read a part of the cache",
    )
    add(
        "--draft-context",
        default="auto",
        metavar="D",
        help="as in the speculative config: auto, all, tokens or a fraction; default: auto",
    )
    add(
        "--draft-experts",
        choices=("target", "int4"),
        help="as in the speculative config; default: int4 where an engine would have them by default",
    )
    add("--weight-bits", type=float, metavar="B", help="of the draft's linears on average; default: 4.25, all in 4 bits")
    add("--one-copy", action="store_true", help="of a 4-bit checkpoint, as in --additional-config")
    add("--num-speculative-tokens", type=positive, nargs="+", metavar="N", help="default: the best of 1 to 8")


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def resolve_model(model: str | None) -> str:
    """The directory of the shipped model, a model directory that exists, or a hub id as it is.

    Raises ValueError, in one sentence, for a path at which there is no model."""
    if model is None:
        return str(ASSETS / "books-4m")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model {model}: the directory has no config.json, so it is not a Hugging Face model.")
        return str(path)
    if path.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ValueError(f"--model {model}: no such directory; give a model directory or a hub id such as owner/name.")
    return model


def read_prompt(path: Path | None) -> str:
    """The text of ``path``, or the shipped passage. Raises ValueError, in one sentence, if there is no text."""
    try:
        text = (path or ASSETS / "passage.txt").read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"--prompt-file {path}: cannot be read ({reason}).") from error
    if not text:
        raise ValueError(f"--prompt-file {path}: the file is empty.")
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its status: 0 done, 1 an engine failed, 2 wrong arguments, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "estimate":
        return run_estimate(arguments)
    try:
        model, prompt = resolve_model(arguments.model), read_prompt(arguments.prompt_file)
    except ValueError as error:
        print(f"vllm-quantspec: {error}", file=sys.stderr)
        return 2
    from vllm_quantspec import demo  # rich is not needed for --help

    job = demo.Job(model, prompt, arguments.max_tokens, arguments.num_speculative_tokens)
    try:
        return demo.run(job, verbose=arguments.verbose)
    except KeyboardInterrupt:
        return 130


def run_estimate(arguments: argparse.Namespace) -> int:
    from vllm_quantspec.estimate.report import report  # torch is not needed for --help

    try:
        print(report(arguments))
    except ValueError as error:
        print(f"vllm-quantspec: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
