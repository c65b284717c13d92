"""Random verification steps and what their attention leaves, to choose pages by; and kernels that are only compiled."""

import random
from collections import defaultdict
from contextlib import contextmanager

import torch
from interpreter import DEVICE, INTERPRETED

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import cpu_page_selection as twin
from vllm_quantspec.kernels.page_selection import select_pages
from vllm_quantspec.kernels.reduce_scores import reduce_scores

LARGE = DEVICE == "cuda" and not INTERPRETED
FMT = PageFormat(1, 64, 64)
BF16, FP32 = torch.bfloat16, torch.float32
NAN = float("nan")
LIMITS = {"pages": 3, "fraction": 0.125, "min_pages": 8, "min_total_pages": 12}


def ints(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def longer(x, more=3, filler=99):
    """The same with entries behind it, as persistent tensors have them, on the device."""
    return torch.cat((x, x.new_full((more,), filler))).to(DEVICE)


def leave(mass, generator):
    """What readers leave of pages with ``mass`` fp64 [L, count, H, M], rows in tiles of 8: raw and flags.

    A reader begins anywhere, in the middle of a page too, where it has nothing summed yet; `top` is any number.
    """
    layers, count, heads, rows = mass.shape

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    raw = torch.full((layers, count, heads, 2, rows, 2), NAN)
    fresh, whole = (rand(2, layers, count, heads, rows // 8) < torch.tensor([0.2, 0.7]).view(2, 1, 1, 1, 1)).unbind()
    fresh[:, 0] = True
    had = torch.zeros(layers, heads, rows, dtype=torch.float64)

    def leave_part(page, part, where):
        top = had.clamp_min(1e-30).log2() + rand(had.shape) * 4 - 2
        pairs = torch.stack((had * torch.exp2(-top), top), dim=-1).float()
        raw[:, page, :, part] = torch.where(where[..., None], pairs, NAN)

    for page in range(count):
        is_fresh, is_whole = (x[:, page].repeat_interleave(8, -1) for x in (fresh, whole))
        here = mass[:, page] * torch.where(is_whole, 1.0, rand(had.shape))
        had = torch.where(is_fresh, 0, had) + here
        leave_part(page, 0, torch.ones_like(is_whole))
        had = torch.where(is_whole, had, mass[:, page] - here)
        leave_part(page, 1, ~is_whole)
    return raw, fresh.byte() + 2 * whole.byte()


class Step:
    """A verification step of requests that have `pages` scored pages each, and what its attention leaves.

    What no request owns is NaN: slots, rows and tokens. A request with 0 pages may be one of a prompt.
    """

    def __init__(self, seed, pages, heads=2, layers=1, queries=5, group=4, num_slots=None, more_rows=3):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.layers, self.queries, self.group = heads, layers, queries, group
        tokens = [rng.randrange(1, queries + 1) if n else rng.choice([0, 1, queries, 3 * queries]) for n in pages]
        first = [(n + 1) * 64 + rng.randrange(64) if n else rng.randrange(128) for n in pages]
        self.seq_lens = ints(first) + ints(tokens)
        self.query_start_loc = ints([2, *tokens]).cumsum(0).int()
        self.slots = sum(pages) + rng.randrange(1, 40) if num_slots is None else num_slots
        self.begin, self.num_scored = twin.scored_pages(FMT, self.query_start_loc, self.seq_lens, self.slots)
        self.max_pages = max(1, *pages) + rng.randrange(3)
        self.num_rows = ints([rng.randrange(0, max(n, 1) + 1) for n in tokens])
        self.width = self.max_pages + 3
        self.block_table = torch.randperm(len(pages) * self.width, generator=generator).int().view(len(pages), -1)[:, :-1]
        rows, all_tokens = -(-(queries * group + more_rows) // 8) * 8, int(self.query_start_loc[-1]) + 1
        self.mass = torch.full((layers, self.slots, heads, rows), NAN, dtype=torch.float64)
        self.raw = torch.full((layers, self.slots, heads, 2, rows, 2), NAN)
        self.flags = torch.full((layers, self.slots, heads, rows // 8), 77, dtype=torch.uint8)
        self.lse = torch.full((layers, all_tokens, heads, group), NAN)
        for start, n, begin, count in zip(
            self.query_start_loc.tolist(), tokens, self.begin.tolist(), self.num_scored.tolist(), strict=False
        ):
            if count:
                mass = (torch.randn(layers, count, heads, rows, generator=generator).double() * 4 + 3).exp2()
                slots = slice(begin, begin + count)
                self.mass[:, slots] = mass
                self.raw[:, slots], self.flags[:, slots] = leave(mass, generator)
                whole = (mass[..., : n * group].sum(1) + 0.1).log2().float()  # and something in the window
                self.lse[:, start : start + n] = whole.unflatten(2, (n, group)).transpose(1, 2)
        self.lse = self.lse.flatten(2)

    def expected_scores(self, layer, out):
        """`reduce_scores` in float64, into out [H, C, Q]."""
        for r, (begin, count) in enumerate(zip(self.begin.tolist(), self.num_scored.tolist(), strict=True)):
            start, end = self.query_start_loc[r : r + 2].tolist()
            if count:
                x = self.mass[layer, begin : begin + count, :, : (end - start) * self.group]
                x = x.unflatten(2, (end - start, self.group))  # [pages, H, q, g]
                norm = self.lse[layer, start:end].double().view(end - start, self.heads, self.group).transpose(0, 1)
                mass = (x * (-norm).exp2()).sum(3)
                out[:, begin : begin + count, : end - start] = mass.transpose(0, 1)
        return out

    def reduce(self, layer, scores_of_layer):
        reduce_scores(
            self.raw[layer].to(DEVICE),
            self.flags[layer].to(DEVICE),
            self.lse[layer].to(DEVICE),
            longer(self.query_start_loc, 0),
            longer(self.begin),
            longer(self.num_scored),
            scores_of_layer,
            max_pages=self.max_pages,
        )

    def random_scores(self, seed, kind, dtype=BF16):
        """[L, H, C, Q]; NaN where nothing is to be read."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.layers, self.heads, self.slots, self.queries)
        scores = (torch.randn(shape, generator=generator) * 3 - 4).exp()
        if kind == "ties":
            scores = torch.randint(0, 3, shape, generator=generator) / 4
        elif kind == "zeros":
            scores[torch.rand(shape[:3], generator=generator) < 0.8] = 0
        owned = torch.zeros(shape[2:], dtype=torch.bool)
        for begin, count, n in zip(self.begin.tolist(), self.num_scored.tolist(), self.num_rows.tolist(), strict=True):
            owned[begin : begin + count, : max(n, 1)] = True
        return scores.masked_fill(~owned, NAN).to(dtype)

    def random_counts(self, seed):
        rng = random.Random(seed)
        count = ints([rng.choice([0, 1, n, n - 1, rng.randrange(n + 1)]) for n in self.num_scored.tolist()])
        count = count.clamp_min(0).minimum(self.num_scored)
        return count, self.num_scored * (count > 0)

    def select(self, scores, count, dense_from, fresh_page_list):
        table = torch.full((len(count), self.width + 2), -5, dtype=torch.int32, device=DEVICE)[:, 1 : self.width]
        table.copy_(self.block_table)
        select_pages(
            scores,
            longer(self.begin),
            longer(self.num_rows, 0),
            longer(count),
            longer(dense_from),
            table,
            fresh_page_list,
            max_pages=self.max_pages,
        )
        return fresh_page_list.cpu()

    def page_list(self):
        return torch.full((self.layers, self.heads, self.slots), -7, dtype=torch.int32)


def random_step(seed, most_programs):
    """Of 1 to 17 requests with 0 to 600 pages, some of which do not fit."""
    rng = random.Random(seed)
    requests = rng.choice([1, 2, 3, 5, 9, 16, 17])
    heads = max(1, min(rng.randrange(1, 9), most_programs // requests))
    layers = max(1, min(rng.randrange(1, 4), most_programs // (requests * heads)))
    pages = [rng.choice([0, 1, 2, 31, 32, 33, rng.randrange(601), rng.randrange(100)]) for _ in range(requests)]
    shape = {"heads": heads, "layers": layers, "queries": rng.randrange(1, 10), "group": rng.randrange(1, 9)}
    if rng.random() < 0.4 and sum(pages) > 1:
        shape["num_slots"] = rng.randrange(1, sum(pages))
    return Step(seed, pages, more_rows=rng.randrange(4), **shape)


def plan_arguments(step):
    """By name, that fit."""
    count, dense_from = (torch.zeros_like(step.num_scored) for _ in range(2))
    return {"num_scored": step.num_scored, "count": count, "dense_from": dense_from, **LIMITS}


def selection_arguments(step):
    """By name, that fit."""
    count, dense_from = step.random_counts(0)
    return {
        "scores": step.random_scores(0, "random"),
        "begin": step.begin,
        "num_rows": step.num_rows,
        "count": count,
        "dense_from": dense_from,
        "block_table": step.block_table,
        "page_list": step.page_list(),
        "max_pages": 32,
    }


@contextmanager
def compile_only(monkeypatch, modules, kernels):
    """The names of ``kernels`` that launches on Hopper compile, one for every variant: really, but nothing runs."""
    import triton
    from test_warm_up import NoGpu, NoKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    names = []

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        source = self.ASTSource(self, signature, constexprs, attrs)
        triton.compile(source, target=NoGpu().get_current_target(), options=options.__dict__)
        names.append(self.__name__)
        self.device_caches[0][0][key] = NoKernel()
        return self.device_caches[0][0][key]

    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    for module in modules:
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction) and kernel.__name__ in kernels:
                monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        monkeypatch.setattr(module, "check_device", lambda x: None)
        monkeypatch.setattr(module, "overlap", lambda x: {"OVERLAP": True, "launch_pdl": True})
    driver.set_active(NoGpu())
    yield names
    driver.set_active(None)  # whatever there is
