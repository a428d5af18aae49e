# SPDX-License-Identifier: Apache-2.0
"""Check and time the Hopper forward kernel on its own: NVRTC, the driver API and torch, without the library.

python3 tools/gpu/forward.py compile          # no GPU: registers, spills, instruction counts
python3 tools/gpu/forward.py check            # against float64, with NaN-poisoned outputs and tails
python3 tools/gpu/forward.py bench --head-dim 128 --kernel 128x128 128x176
python3 tools/gpu/forward.py check-threshold
python3 tools/gpu/forward.py bench-threshold
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace

from forward_launch import (
    DEFAULT_TILE,
    THRESHOLD_TILE,
    TILES,
    Driver,
    Kernel,
    Problem,
    compile_all,
    config_for,
    interleaved_ms,
    threshold_config,
)
from forward_problems import (
    check_cases,
    judge,
    judge_threshold,
    new_skip_map,
    topics,
)
from nvrtc import with_checks


def check(args: argparse.Namespace) -> bool:
    """Every case on every chosen kernel; True when all are right."""
    import torch

    guard = with_checks if args.watchdog else lambda config: config
    masks = [(False, False), (False, True), (True, True)]
    chosen = [(d, t) for d in args.head_dim for t in (args.kernel or [DEFAULT_TILE[d]]) if (d, t) in TILES]
    configs = {
        (d, tile, element, mask): guard(config_for(d, tile, element, *mask))
        for d, tile in chosen for element in args.element for mask in masks
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver, good = Driver(), True
    torch.zeros(1, device="cuda")
    kernels = {key: Kernel(driver, config, cubins[config]) for key, config in configs.items()}
    for d, tile in chosen:
        for element in args.element:
            torch.manual_seed(0)
            failures, worst, worst_lse, count = [], 0.0, 0.0, 0
            for name, p in check_cases(d, torch.bfloat16 if element == "bf16" else torch.float16):
                kernel = kernels[d, tile, element, (p.window_left >= 0, p.window_right >= 0)]
                out, lse = kernel.run(p)
                ratio, lse_error, wrong = judge(p, out, lse)
                again, lse_again = kernel.run(p)
                if not (
                    torch.equal(out.view(torch.int16), again.view(torch.int16))
                    and torch.equal(lse.view(torch.int32), lse_again.view(torch.int32))
                ):
                    wrong = wrong or "not the same twice"
                worst, worst_lse, count = max(worst, ratio), max(worst_lse, lse_error), count + 1
                if wrong:
                    failures.append(f"    {name}: {wrong} (error ratio {ratio:.3g}, lse {lse_error:.2g})")
            good = good and not failures
            print(f"d{d} {tile} {element}: {count - len(failures)}/{count} right, error ratio {worst:.2f}, "
                  f"lse error {worst_lse:.1e}", *failures, sep="\n")  # fmt: skip
    return good


def check_threshold(args: argparse.Namespace) -> bool:
    """The vote, its skip map, and the output given the map."""
    import torch

    guard = with_checks if args.watchdog else lambda config: config
    masks = {"full": (False, False), "causal": (False, True)}
    configs = {
        (d, name): guard(threshold_config(d, "bf16", *mask))
        for d in args.head_dim if d in THRESHOLD_TILE for name, mask in masks.items()
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver, good = Driver(), True
    torch.zeros(1, device="cuda")
    for (d, name), config in configs.items():
        kernel = Kernel(driver, config, cubins[config])
        causal = {"window_right": 0, "causal_lengths": True} if name == "causal" else {}
        torch.manual_seed(0)
        packed = topics(1, 1700, 2, 1, d, torch.bfloat16)
        cu = torch.tensor([0, 700, 700, 1030, 1700], dtype=torch.int32, device="cuda")
        cases = [
            ("topics", Problem(*topics(1, 1500, 4, 2, d, torch.bfloat16), threshold=1.0, **causal)),
            ("nothing skipped", Problem(*topics(1, 700, 2, 2, d, torch.bfloat16), threshold=1e-30, **causal)),
            ("packed", Problem(*(x[0] for x in packed), threshold=0.5, cu_seqlens_q=cu, cu_seqlens_k=cu,
                               max_seqlen_q=700, max_seqlen_k=700, **causal)),
        ]  # fmt: skip
        for case, p in cases:
            p.skip_map = new_skip_map(p, config.block_n)
            out, lse = kernel.run(p)
            ratio, lse_error, kept, wrong = judge_threshold(p, out, lse, config.block_n)
            good = good and not wrong
            errors = f"error ratio {ratio:.2f}, lse {lse_error:.1e}"
            print(f"threshold d{d} {name} {case}: kept {kept:.3f}, {errors} {wrong}")
    return good


def bench_threshold(args: argparse.Namespace) -> bool:
    """Causal, 16 query and 8 key-value heads, topic inputs: dense, the vote's price, and what skipping gains."""
    import torch

    configs = {}
    for d in set(args.head_dim) & set(THRESHOLD_TILE):
        configs[d, "Never"] = config_for(d, DEFAULT_TILE[d], "bf16", False, True)
        configs[d, "ThresholdSkip"] = threshold_config(d, "bf16", False, True)
        for name in args.define:
            fields = dict(x.split("=") for x in name.split(",") if "=" in x)
            macros = tuple(x for x in name.split(",") if "=" not in x)
            configs[d, name] = replace(
                configs[d, "ThresholdSkip"], defines=macros, **{k: int(v) for k, v in fields.items()}
            )
    cubins = compile_all(list(configs.values()), args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    kernels = {key: Kernel(driver, config, cubins[config]) for key, config in configs.items()}
    for d, seqlen in itertools.product(sorted(set(args.head_dim) & set(THRESHOLD_TILE)), args.seqlen):
        torch.manual_seed(0)
        q, k, v = topics(1, seqlen, 16, 8, d, torch.bfloat16)
        out, lse = torch.empty_like(q), torch.empty(1, 16, seqlen, device="cuda")
        dense = Problem(q, k, v, window_right=0)
        one = replace(dense, threshold=1.0, causal_lengths=True)
        with_map = replace(one, skip_map=new_skip_map(one, kernels[d, "ThresholdSkip"].config.block_n))
        vote = kernels[d, "ThresholdSkip"]
        times = interleaved_ms(
            [kernels[d, "Never"].prepare(dense, out, lse), vote.prepare(replace(one, threshold=1e-30), out, lse),
             vote.prepare(one, out, lse), vote.prepare(with_map, out, lse),
             *(kernels[d, name].prepare(replace(one, threshold=t), out, lse)
               for name in args.define for t in (1e-30, 1.0, 1e9))], args.samples,
        )  # fmt: skip
        for i, name in enumerate(args.define):
            none, one_ms, most = times[4 + 3 * i : 7 + 3 * i]
            print(f"    {name}: price {none / times[0]:.3f}, threshold 1 {one_ms:.3f} ms "
                  f"({times[0] / one_ms:.2f} x dense), threshold 1e9 {most:.3f} ms")  # fmt: skip
        tiles = vote.config.block_n
        visible = sum(-(-64 * (t + 1) // tiles) for t in range(-(-seqlen // 64))) * 16
        kept = (
            sum(bin(int(w) & 0xFFFFFFFF).count("1") for w in with_map.skip_map.flatten().tolist()) / visible
        )
        price, gain = times[1] / times[0], times[0] / times[2]
        print(
            f"d{d} {seqlen}: dense {times[0]:.3f} ms, vote without skipping {times[1]:.3f} ({price:.3f}), "
            f"threshold 1 {times[2]:.3f} ms ({gain:.2f} x dense, kept {kept:.3f}), with map {times[3]:.3f}",
            flush=True,
        )
    return True


def bench(args: argparse.Namespace) -> bool:
    """Our kernels and cuDNN attention in turn: 16k tokens in all (or one longer sequence), hidden size 2048."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    chosen = [(d, t) for d in args.head_dim for t in (args.kernel or [DEFAULT_TILE[d]]) if (d, t) in TILES]
    masks = {"full": (False, False), "causal": (False, True)}
    configs = {
        (d, tile, element, name): config_for(d, tile, element, *mask)
        for d, tile in chosen for element in args.element for name, mask in masks.items()
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    kernels = {key: Kernel(driver, config, cubins[config]) for key, config in configs.items()}
    print(torch.cuda.get_device_name())
    for d, element, name, seqlen in itertools.product(args.head_dim, args.element, masks, args.seqlen):
        tiles = [t for dd, t in chosen if dd == d]
        dtype = torch.bfloat16 if element == "bf16" else torch.float16
        batch, heads = max(1, 16384 // seqlen), 2048 // d
        q, k, v = (torch.randn(batch, seqlen, heads, d, device="cuda", dtype=dtype) for _ in range(3))
        problem = Problem(q, k, v, window_right=0 if name == "causal" else -1)
        out = torch.empty_like(q)
        lse = torch.empty(batch, heads, seqlen, device="cuda")
        ours = [kernels[d, tile, element, name].prepare(problem, out, lse) for tile in tiles]
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))

        def cudnn(qt=qt, kt=kt, vt=vt, causal=name == "causal") -> None:
            scaled_dot_product_attention(qt, kt, vt, is_causal=causal)

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            times = interleaved_ms([cudnn, *ours], args.samples)
        flop = 4 * batch * heads * seqlen * seqlen * d / (2 if name == "causal" else 1)
        rates = [flop / ms / 1e9 for ms in times]
        pairs = zip(tiles, rates[1:], strict=True)
        line = "  ".join(f"{tile} {rate:5.0f} ({rate / rates[0]:.3f})" for tile, rate in pairs)
        print(f"{element} d{d} {name:6s} {seqlen:6d}  cuDNN {rates[0]:5.0f}  {line}", flush=True)
    return True


def compile_only(args: argparse.Namespace) -> bool:
    chosen = [(d, t) for d in args.head_dim for t in (args.kernel or [DEFAULT_TILE[d]]) if (d, t) in TILES]
    masks = [(False, False), (False, True), (True, True)]
    dense = [config_for(d, t, e, *m) for d, t in chosen for e in args.element for m in masks]
    threshold = [
        threshold_config(d, e, *m)
        for d in args.head_dim if d in THRESHOLD_TILE for e in args.element for m in masks
    ]  # fmt: skip
    compile_all(dense + threshold, args.jobs)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["compile", "check", "bench", "check-threshold", "bench-threshold"])
    parser.add_argument("--head-dim", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--kernel", nargs="*", help="block_m x block_n; default: the best of each head_dim")
    parser.add_argument("--element", nargs="*", default=["bf16"], choices=["bf16", "fp16"])
    parser.add_argument("--seqlen", type=int, nargs="*", default=[2048, 8192, 16384])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument(
        "--watchdog", action="store_true", help="checks: trap instead of hanging; slower code"
    )
    parser.add_argument(
        "--define", nargs="*", default=[], help="bench-threshold: variants to compare, as MACRO,field=value"
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    actions = {
        "compile": compile_only, "check": check, "bench": bench,
        "check-threshold": check_threshold, "bench-threshold": bench_threshold,
    }  # fmt: skip
    return 0 if actions[args.action](args) else 1


if __name__ == "__main__":
    sys.exit(main())
