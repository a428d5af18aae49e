# SPDX-License-Identifier: Apache-2.0
"""Check and time the Hopper backward kernels on their own: NVRTC, the driver API and torch, without the library.

python3 tools/gpu/backward.py compile [name ..]  # no GPU: registers, spills, instruction counts
python3 tools/gpu/backward.py check [name ..]    # against float64, with NaN-poisoned outputs and tails
python3 tools/gpu/backward.py bench
python3 tools/gpu/backward.py bench-features
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import replace

from backward_launch import (
    LEAST_PART,
    Backward,
    BackwardConfig,
    Gradients,
    compile_all,
    config_of,
)
from backward_problems import (
    batched,
    cases,
    given_for,
    judge,
)
from features import BlockMask, pair_gate
from forward_launch import Driver, Problem, interleaved_ms
from nvrtc import with_checks


def check(args: argparse.Namespace) -> bool:
    """Every case of every chosen configuration; True when all are right."""
    import torch

    chosen = {n: c for n, c in cases(args.element).items() if not args.name or any(x in n for x in args.name)}
    guard = with_checks if args.watchdog else lambda config: config
    configs = {name: guard(variant(config, args.define)) for name, (config, _) in chosen.items()}
    cubins = compile_all(list(configs.values()), args.jobs)
    driver, good = Driver(), True
    torch.zeros(1, device="cuda")
    for name, (_, problems) in chosen.items():
        config = configs[name]
        kernel = Backward(driver, config, cubins[config])
        kernel.least_part = args.least_part
        torch.manual_seed(0)
        failures, worst, count = [], 0.0, 0
        for i, (case, p) in enumerate(problems()):
            given = given_for(p, config.block_n, with_lse=i % 2 == 0)
            got = kernel.run(p, given)
            ratio, wrong = judge(p, given, got, config.block_n)
            for _ in range(args.repeats):
                again = kernel.run(p, given)
                for key, value in got.items():
                    if (config.deterministic or key in ("k", "v")) and not torch.equal(
                        value.view(torch.int16), again[key].view(torch.int16)
                    ):
                        wrong = wrong or f"{key} is not the same twice"
            worst, count = max(worst, ratio), count + 1
            if wrong:
                failures.append(f"    {case}: {wrong} (error ratio {ratio:.3g})")
        good = good and not failures
        print(f"{name}: {count - len(failures)}/{count} right, error ratio {worst:.2f}", *failures, sep="\n",
              flush=True)  # fmt: skip
    print("all right" if good else "WRONG")
    return good


def variant(config: BackwardConfig, parts: list[str]) -> BackwardConfig:
    """With fields (`block_m=64`) replaced and macros defined."""
    pairs = [part.split("=") for part in parts if part]
    fields = {pair[0]: int(pair[1]) for pair in pairs if hasattr(config, pair[0])}
    macros = tuple("=".join(pair) for pair in pairs if not hasattr(config, pair[0]))
    return replace(config, defines=macros, **fields)


def bench(args: argparse.Namespace) -> bool:
    """Our kernels and cuDNN's backward in turn: 16k tokens in all, hidden size 2048."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    masks = {"full": (False, False), "causal": (False, True)}
    options = [{"deterministic": x} for x in ([False, True] if args.deterministic else [False])]
    configs = {
        (d, name, i, text): variant(config_of((d, d), left=mask[0], right=mask[1], **option), text.split(","))
        for d in args.head_dim for name, mask in masks.items()
        for i, option in enumerate(options) for text in args.variant
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    kernels = {key: Backward(driver, config, cubins[config]) for key, config in configs.items()}
    print(torch.cuda.get_device_name())
    for d, name, seqlen in itertools.product(args.head_dim, masks, args.seqlen):
        batch, heads = max(1, 16384 // seqlen), 2048 // d
        p = batched(batch, seqlen, seqlen, heads, heads, (d, d), torch.bfloat16,
                    window_right=0 if name == "causal" else -1)  # fmt: skip
        qt, kt, vt = (x.transpose(1, 2).detach().requires_grad_() for x in (p.q, p.k, p.v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(qt, kt, vt, is_causal=name == "causal")
        grad_out = torch.randn_like(p.q)
        # The rates do not depend on lse; a plausible one keeps P finite.
        lse = torch.full((batch, heads, seqlen), math.log(seqlen) + 0.5, device="cuda")
        given = Gradients(out.detach().transpose(1, 2), lse, grad_out)

        def cudnn(out=out, inputs=(qt, kt, vt), gradient=grad_out) -> None:
            torch.autograd.grad(out, inputs, gradient.transpose(1, 2), retain_graph=True)

        chosen = {key: kernel for key, kernel in kernels.items() if key[:2] == (d, name)}
        launches = []
        for kernel in chosen.values():
            outputs = {"q": torch.empty_like(p.q), "k": torch.empty_like(p.k), "v": torch.empty_like(p.v)}
            launches.append(kernel.prepare(p, given, outputs))

        def whole(kernels: list):
            def launch() -> None:
                for kernel in kernels:
                    kernel()

            return launch

        alone = [launches[0][1]] if args.parts else []
        parts = [launches[0][0], launches[0][-1]] if args.parts else []
        times = interleaved_ms([cudnn, *map(whole, launches), *alone, *parts], args.samples)
        flop = 10 * batch * heads * seqlen * seqlen * d / (2 if name == "causal" else 1)
        rates = [flop / ms / 1e9 for ms in times]
        labels = [f"{key[3] or 'plain'}{' det' * key[2]}" for key in chosen]
        line = "  ".join(f"{label} {rate:5.0f} ({rate / rates[0]:.3f})"
                         for label, rate in zip(labels, rates[1:], strict=False))  # fmt: skip
        if args.parts:
            line += (
                f"  main {rates[-3]:.0f} TF, before {times[-2] * 1e3:.0f} us, after {times[-1] * 1e3:.0f} us"
            )
        print(f"d{d} {name:6s} {seqlen:6d}  cuDNN {rates[0]:5.0f}  {line}", flush=True)
    return True


def sparse_bits(heads: int, row_tiles: int, key_tiles: int, density: float):
    """A causal skip map [1, heads, row tiles, words] at head_dim 128: random tiles and the diagonal."""
    import torch

    rows, keys = (torch.arange(n, device="cuda") for n in (row_tiles, key_tiles))
    diagonal = rows[:, None] // 2 - keys[None]
    kept = (torch.rand(heads, row_tiles, key_tiles, device="cuda") < density) & (diagonal > 0) | (
        diagonal == 0
    )
    words = torch.nn.functional.pad(kept, (0, -key_tiles % 32)).reshape(heads, row_tiles, -1, 32).long()
    bits = (words << torch.arange(32, device="cuda")).sum(-1)
    share = kept.sum().item() / (heads * (diagonal >= 0).sum().item())
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()[None].contiguous(), share


def bench_features(args: argparse.Namespace) -> bool:
    """What each feature costs against the dense kernel of the same run: bf16, head_dim 128, 16k, causal."""
    import torch

    n, d, dims = 16384, 128, (128, 128)
    gate = (pair_gate(d),)
    configs = {
        "causal": config_of(dims, right=True), "deterministic": config_of(dims, right=True, deterministic=True),
        "full": config_of(dims), "full deterministic": config_of(dims, deterministic=True),
        "softcap": config_of(dims, right=True, logit=("Softcap",)),
        "alibi": config_of(dims, right=True, logit=("Alibi",)),
        "window": config_of(dims, left=True, right=True), "band": config_of(dims, mask="band"),
        "map": config_of(dims, right=True, bits=True), "gate": config_of(dims, right=True, logit=gate),
        "map gate": config_of(dims, right=True, bits=True, logit=gate),
        "map deterministic": config_of(dims, right=True, bits=True, deterministic=True),
        "fp16": config_of(dims, "fp16", right=True), "list": config_of(dims, mask="list"),
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    kernels = {name: Backward(driver, c, cubins[c]) for name, c in configs.items()}
    print(torch.cuda.get_device_name())

    def problem(heads: int, kv_heads: int, dtype: object = torch.bfloat16, **options: object) -> Problem:
        return batched(1, n, n, heads, kv_heads, (d, d), dtype, **options)

    def launch(name: str, p: Problem):
        lse = torch.full((1, p.q.shape[2], n), math.log(n) + 0.5, device="cuda")
        given = Gradients(torch.randn_like(p.q), lse, torch.randn_like(p.q))
        outputs = {"q": torch.empty_like(p.q), "k": torch.empty_like(p.k), "v": torch.empty_like(p.v)}
        for key in ("alpha", "delta"):
            if getattr(p, key) is not None:
                outputs[key] = torch.empty_like(getattr(p, key))
        parts = kernels[name].prepare(p, given, outputs)

        def whole() -> None:
            for part in parts:
                part()

        return whole

    causal = problem(16, 16, window_right=0)
    half = problem(16, 8, window_right=0)
    bits, kept = sparse_bits(16, n // 64, n // 128, 0.12)
    sparse = replace(half, gate_bits=bits)
    gates = {"alpha": torch.randn(1, n, 16, device="cuda"), "delta": torch.randn(1, n, 8, device="cuda")}
    densities, masks = (0.5, 0.25, 0.1, 0.05), []
    for density in densities:
        blocks = torch.rand(1, n // 128, n // 128, device="cuda") < density
        blocks[:, :, 0] = True
        masks.append(BlockMask.of_full_blocks(blocks, 128, 128))
    sizes = torch.tensor([[64, 1024, 2048, 512]] * 16, dtype=torch.int32, device="cuda")
    rows = {
        "causal": launch("causal", causal), "full": launch("full", replace(causal, window_right=-1)),
        "deterministic": launch("deterministic", causal),
        "full deterministic": launch("full deterministic", replace(causal, window_right=-1)),
        "fp16": launch("fp16", problem(16, 16, torch.float16, window_right=0)),
        "softcap": launch("softcap", replace(causal, softcap=30.0)),
        "alibi": launch("alibi", replace(causal, alibi=torch.rand(16, device="cuda"))),
        "window 1024": launch("window", replace(causal, window_left=1024)),
        "window 512": launch("window", replace(causal, window_left=512)),
        "bands 64, 1024, 2048, 512": launch("band", replace(causal, window_sizes=sizes)),
        **{f"blocks {x}": launch("list", replace(causal, window_right=-1, blocks=m))
           for x, m in zip(densities, masks, strict=True)},
        "causal 16/8": launch("causal", half), "map": launch("map", sparse),
        "map deterministic": launch("map deterministic", sparse),
        "gate 16/8": launch("gate", replace(half, **gates)), "map gate": launch("map gate", replace(sparse, **gates)),
        "GQA 32/4": launch("causal", problem(32, 4, window_right=0)),
        "MHA 32/32": launch("causal", problem(32, 32, window_right=0)),
    }  # fmt: skip
    times = dict(zip(rows, interleaved_ms(list(rows.values()), args.samples), strict=True))
    rate = 5 * 16 * n * n * d / times["causal"]
    for name, ms in times.items():
        note = f"{times['causal'] / ms:.3f} of causal's speed"
        if name.startswith("window"):
            w = int(name.split()[1])
            note = f"{10 * 16 * (n * (w + 1) - w * (w + 1) / 2) * d / ms / rate:.3f} of causal's rate"
        elif name.startswith("blocks"):
            share = masks[densities.index(float(name.split()[1]))].lists[2].sum().item() / (n // 128) ** 2
            note = f"density {share:.3f}: {share * times['full'] / ms:.3f} of full's rate"
        elif name.startswith("map"):
            note = f"{times['causal 16/8'] / ms:.2f} x dense, {kept:.3f} of tiles kept"
        elif name == "full deterministic":
            note = f"{times['full'] / ms:.3f} of full's speed"
        elif name.startswith("GQA"):
            note = f"{times['MHA 32/32'] / ms:.3f} of MHA's speed"
        print(f"{name:28s} {ms:8.4f} ms  {note}")
    return True


def compile_only(args: argparse.Namespace) -> bool:
    found = [
        c for n, (c, _) in cases(args.element).items() if not args.name or any(x in n for x in args.name)
    ]
    compile_all([variant(c, args.define) for c in found], args.jobs)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["compile", "check", "bench", "bench-features"])
    parser.add_argument("name", nargs="*", help="parts of case names")
    parser.add_argument("--head-dim", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="*", default=[2048, 8192, 16384])
    parser.add_argument("--element", nargs="*", default=["bf16", "fp16"])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--least-part", type=int, default=LEAST_PART, help="check: row tiles of a part of a column"
    )
    parser.add_argument("--deterministic", action="store_true", help="bench: that mode too")
    parser.add_argument("--parts", action="store_true", help="bench: each kernel on its own")
    parser.add_argument("--watchdog", action="store_true", help="trap instead of hanging; slower code")
    parser.add_argument("--define", nargs="*", default=[], help="fields and macros, as `block_m=64`")
    parser.add_argument(
        "--variant", nargs="*", default=[""], help="bench: kernels to compare, as MACRO,MACRO"
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    actions = {"compile": compile_only, "check": check, "bench": bench, "bench-features": bench_features}
    return 0 if actions[args.action](args) else 1


if __name__ == "__main__":
    sys.exit(main())
