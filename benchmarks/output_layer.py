"""What an output layer in fewer bits does to a draft's distribution, and what exact largest logits give back.

    python benchmarks/output_layer.py [--model DIR] [--text DIR] [--json OUT]

Hidden states are the exact model's, over excerpts of novels; only the output layer is replaced, in plain PyTorch (no vLLM,
runs on a CPU). Greedy agreement, and the acceptance that speculative sampling would have, sum(min(p, q)), with the exact
output layer's distribution.
"""

import argparse
import json
from pathlib import Path
from unittest import mock

import torch
from ablations import compare
from common import TEXT_HELP, excerpts, read_texts, write_json

from vllm_quantspec.kernels import rescore_logits
from vllm_quantspec.weights import quantize_weight

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TEMPERATURES = (0.7, 1.0)


@torch.inference_mode()
def hidden_states(model, tokens: list[int], context: int) -> torch.Tensor:
    """Of the positions from ``context`` on, [len(tokens) - context, hidden_size]."""
    return model.model(torch.tensor([tokens]))[0][0, context:]


def acceptance(exact: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    row = {}
    for temperature in TEMPERATURES:
        agreed, common, _ = compare(*((x / temperature).log_softmax(-1) for x in (exact, logits))) / len(exact)
        row |= {"greedy": agreed.item(), f"sampling_{temperature}": common.item()}
    return row


def variants(exact: torch.Tensor, x: torch.Tensor, weight: torch.Tensor):
    """(name, logits) of each way to compute them."""
    int4 = x @ quantize_weight(weight.bfloat16(), scale_dtype=torch.bfloat16).dequantize().float().t()
    yield "int4", int4
    scale = weight.abs().amax(1, keepdim=True) / 127
    yield "int8, a scale per row", x @ ((weight / scale).round() * scale).t()
    for number in (16, 64, 256):
        best = int4.topk(number, -1).indices
        yield f"int4, best {number} of all again", int4.scatter(-1, best, exact.gather(-1, best))
    for groups in (16, 64, rescore_logits.GROUPS):
        with mock.patch.object(rescore_logits, "GROUPS", groups):
            yield f"int4, best 2 of {groups} groups again", rescore_logits.reference(int4.clone(), x, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/books-30m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--context", type=int, default=1024, help="tokens before the first position that counts")
    parser.add_argument("--positions", type=int, default=1024, help="of each text")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/output_layer-MODEL.json")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    weight = model.get_output_embeddings().weight.detach()
    states = []
    for text in read_texts(args.text).values():
        (tokens,) = excerpts(tokenizer.encode(text), args.context + args.positions, 1)
        states.append(hidden_states(model, tokens, args.context))
    x = torch.cat(states)
    exact, rows = x @ weight.t(), []
    for name, logits in variants(exact, x, weight):
        rows.append({"output_layer": name, **{k: round(v, 4) for k, v in acceptance(exact, logits).items()}})
        print(json.dumps(rows[-1]), flush=True)
    path = args.json or ROOT / f"benchmarks/results/output_layer-{args.model.name}.json"
    write_json(path, rows, model=args.model.name, positions=len(x))


if __name__ == "__main__":
    main()
