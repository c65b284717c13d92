"""``int4_linear.py --tune``: launch configurations of INT4 and INT8 linears, timed shape by shape. Needs a CUDA GPU."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import torch
from int4_linear import GROUP, LM_HEAD, SHAPES, Int8, Ours, time_shape, weights_of


def tune(names, tokens, bits, fp8_products=False):
    """Times of launch configurations, the best first; those of many tokens one choice after the other."""
    from vllm_quantspec.kernels.device import device_properties
    from vllm_quantspec.kernels.int4_linear import MAX_NARROW, narrow_plan
    from vllm_quantspec.kernels.int4_linear_wide import choose_wide_plan

    device = device_properties(0)
    ours = Ours if bits == 4 else Int8
    for name, shape in (SHAPES | LM_HEAD).items():
        if names and name not in names:
            continue
        weights = weights_of(ours(), {name: shape})[name]
        tiles, chunks = weights[0][0].shape[:2]
        for count in tokens:
            narrow = count <= MAX_NARROW or bits == 8
            sizes = tiles, chunks, 1, count, device
            times, default = {}, narrow_plan(*sizes, bits) if narrow else choose_wide_plan(*sizes)
            if fp8_products:
                time_plans(ours, [default, *fp8_shares(tiles, chunks, count, device)], weights, shape, count, times)
                best = sorted((p for p in times if hasattr(p, "ready")), key=times.get)[:2]
                time_plans(ours, [o for plan in best for o in fp8_layouts(plan, device)], weights, shape, count, times)
            elif narrow:
                time_plans(ours, narrow_options(tiles, default), weights, shape, count, times)
            else:
                time_plans(ours, wide_shares(tiles, chunks, count, default, device), weights, shape, count, times)
                best = sorted((p for p in times if hasattr(p, "x_stages")), key=times.get)[:2]
                time_plans(ours, [o for plan in best for o in wide_layouts(plan, device)], weights, shape, count, times)
            floor = shape[0] * shape[1] * ours.bytes_per_weight / 4.3e6
            print(f"{name} M={count} floor {floor:.2f} default {times.get(default, float('nan')):.2f} {default}")
            for plan in sorted(times, key=times.get)[:8]:
                print(f"   {times[plan]:.2f}", plan)
            for what in ("wgmma", "cluster", "splits", "min_ctas", "tiles", "warps", "ready", "depth", "turns"):
                values = sorted({getattr(plan, what, None) for plan in times} - {None})
                least = {v: min(t for p, t in times.items() if getattr(p, what, None) == v) for v in values}
                print(f"   {what}:", ", ".join(f"{v} {t:.2f}" for v, t in least.items()), flush=True)


def time_plans(ours, options, weights, shape, count, times):
    """Put the time of each plan that is not in ``times`` there."""
    from vllm_quantspec.kernels.nvrtc import compile_source

    options = [plan for plan in dict.fromkeys(options) if plan not in times]
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())

    def compiled(plan):
        return compile_source(plan.source, tuple(plan.macros(GROUP, True).items()), architecture + plan.features)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compiled, options))
    for plan in options:
        try:
            times[plan] = time_shape(ours(plan), weights, shape, count, 4)
        except RuntimeError as error:
            print("failed", plan, str(error)[:300])


def fp8_shares(tiles, chunks, count, device):
    """How CTAs and warps share rows and channels, and whether x is converted by a launch of its own."""
    from vllm_quantspec.kernels.int4_linear_fp8 import TOKEN_TILES, Share, plan_of

    token_tiles, options = next(n for n in TOKEN_TILES if 8 * n >= count), []
    for warps, per_warp in ((4, 1), (4, 2), (8, 1), (8, 2), (8, 3), (12, 1), (12, 2), (16, 1)):
        for producers, depth, min_ctas in itertools.product((4, 1, 0), (1, 2), (1, 2)):  # 1 and 0: x is there already
            share = Share(warps, per_warp, producers < 4, depth, min_ctas, producers)
            for splits in range(1, min(8, -(-chunks // 2)) + 1):
                options.append(plan_of(share, tiles, splits, token_tiles, GROUP, device))
    # A CTA's work for all its slots, at most half more than an even share.
    even = 1.5 * tiles * -(-chunks // 2) / device.num_multiprocessors
    return [o for o in options if o is not None and fp8_fits(o, device) and o.work(chunks, device) <= even]


def fp8_fits(plan, device):
    """Shared memory, and registers for its sums but for some 20; registers are given to four warps at a time."""
    registers = 65536 // (128 * -(-plan.threads // 128) * plan.min_ctas) // 8 * 8
    fits = (plan.shared_bytes(GROUP) + 1024) * plan.min_ctas <= device.shared_memory_per_multiprocessor
    return fits and registers + 24 >= 56 + 4 * plan.token_tiles * (plan.tiles + plan.depth)


def fp8_layouts(plan, device):
    """The same shares with other rings, numbers of warps that convert x, and without turns."""
    options = [plan._replace(turns=not plan.turns), plan._replace(overlap=False)]
    room = min(device.shared_memory_per_block, device.shared_memory_per_multiprocessor // plan.min_ctas) - 1024
    for x_stages in (2, 3, 4):
        for producers in (0, 1) if plan.ready else (2, 4, 8):
            one = plan._replace(x_stages=x_stages, producers=producers)
            options += [one._replace(stages=s) for s in (2, 3, 5) if s <= one.most_stages(room, GROUP)]
    return [o for o in options if fp8_fits(o, device)]


def narrow_options(tiles, default):
    """Two or three CTAs per multiprocessor, of one launch or of consecutive ones."""
    from vllm_quantspec.kernels.int4_linear import Plan

    options = [default, default._replace(overlap=False)]
    for warps, resident, blocks in ((8, 2, 132), (8, 2, 264), (8, 3, 132), (12, 2, 132)):
        per_block = -(-tiles // blocks)
        for passes in range(-(-per_block // 8), -(-per_block // 3) + 1):
            per_pass = -(-per_block // passes)
            plan = Plan(warps, 0, per_pass, 1, default.token_tiles, 1, blocks, resident, bits=default.bits)
            stages = min(16, (233472 // resident - 2048 - plan.shared_bytes(GROUP)) // (warps * (256 * default.bits + 64)))
            options += [plan._replace(stages=stages)] if stages >= 2 else []
    return options


def wide_shares(tiles, chunks, count, default, device):
    """How CTAs and warps share rows and channels; up to 16 tokens the kernel for few tokens too."""
    from vllm_quantspec.kernels.int4_linear import narrow_plan
    from vllm_quantspec.kernels.int4_linear_wide import plan_of

    options = [default, default._replace(overlap=False), default._replace(wgmma=False)]
    if count <= 16:
        options.append(narrow_plan(tiles, chunks, 1, count, device))
    token_blocks = -(-count // (8 * default.token_tiles))
    for warps, per_warp in ((4, 2), (8, 1), (8, 2), (8, 3), (8, 4), (12, 1), (12, 2), (16, 1)):
        for splits in range(1, min(8, chunks) + 1):
            if warps * per_warp * default.token_tiles <= 256:  # what registers can hold
                shares = (tiles, splits, warps, per_warp, default.token_tiles, token_blocks, GROUP, device)
                options += [plan_of(*shares), plan_of(*shares, cluster=False)]
    return [plan for plan in options if plan is not None]


def wide_layouts(plan, device):
    """The same shares with other rings, other numbers of warps that bring x, and the other kind of products."""
    options = []
    for min_ctas in (1, 2):
        room = min(device.shared_memory_per_block, device.shared_memory_per_multiprocessor // min_ctas) - 1024
        for x_stages in (2, 4, 8):
            for producers in (2, 4):
                one = plan._replace(x_stages=x_stages, producers=producers, min_ctas=min_ctas)
                most = min(10, one.most_stages(room, GROUP))
                if producers <= x_stages and 65536 // (one.threads * min_ctas) >= 72:  # registers of a thread
                    options += [one._replace(stages=s) for s in sorted({most, (most + 3) // 2}) if s >= 2]
    options = [o for o in options if o.shared_bytes(GROUP) * o.min_ctas <= device.shared_memory_per_multiprocessor]
    return options + ([plan._replace(wgmma=False)] if plan.wgmma else [])
