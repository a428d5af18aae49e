# SPDX-License-Identifier: Apache-2.0
"""Compile the device code of `kernels/` with NVRTC and read what the compiler made of it. Needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@dataclass(frozen=True)
class ForwardConfig:
    """One forward kernel; the fields mirror `ForwardTile` and the policies of `kernels/`."""

    element: str = "bf16"
    head_dim: int = 128
    head_dim_v: int = 128
    block_m: int = 128
    block_n: int = 128
    query_stages: int = 2
    key_stages: int = 2
    value_stages: int = 2
    private_values: bool = False
    left: bool = False
    right: bool = False
    mask: str = "window"  # window (left, right), band, list
    gate_bits: bool = False
    logit: tuple[str, ...] = ()
    skip: str = "Never"
    sink: bool = False
    defines: tuple[str, ...] = field(default=())

    @property
    def key_scalars(self) -> bool:
        return any("PairGate" in stage for stage in self.logit)

    @property
    def gate_terms(self) -> bool:
        return any(stage.startswith("FoldedPairGate") for stage in self.logit)

    @property
    def rounded_sums(self) -> bool:
        return self.logit[-1:] == ("SoftcapBounded",)

    @property
    def name(self) -> str:
        window = {(False, False): "full", (False, True): "causal"}.get((self.left, self.right), "window")
        parts = [window if self.mask == "window" else self.mask]
        parts += ["gatebits"] * self.gate_bits
        parts += [re.sub(r"\W", "", stage).lower() for stage in self.logit]
        parts += ["threshold"] * (self.skip != "Never") + ["sink"] * self.sink
        extra = "".join(f"_{d}" for d in self.defines)
        return (
            f"forward_sm90_{self.element}_d{self.head_dim}x{self.head_dim_v}_{'_'.join(parts)}"
            f"_{self.block_m}x{self.block_n}s{self.key_stages}{extra}"
        )

    @property
    def threads(self) -> int:
        return 128 * (self.block_m // 64 + 1)

    @property
    def shared_bytes(self) -> int:
        dim, dim_v = (-(-d // 64) * 64 for d in (self.head_dim, self.head_dim_v))
        tiles = self.query_stages * self.block_m * dim * 2
        tiles += self.block_n * (self.key_stages * dim + self.value_stages * dim_v) * 2
        scalars = self.key_scalars * self.key_stages * self.block_n * 4 + self.rounded_sums * 128
        if self.gate_terms:
            scalars += (
                self.key_stages * (self.block_n * 64 + 128) + 128 + self.block_m // 64 * (64 * 64 + 128)
            )
        barriers = 8 * 2 * (self.query_stages + self.key_stages + self.value_stages + 2)
        barriers += 8 * self.private_values * self.value_stages
        votes = self.private_values * (self.block_m // 64 * 64 + 2 * 4)
        infos = 2 * (144 + 12) + self.key_stages * 12
        return -(-(tiles + scalars + infos + votes + barriers) // 1024) * 1024

    @property
    def mask_type(self) -> str:
        bools = ", ".join(str(b).lower() for b in (self.left, self.right))
        return {"window": f"WindowMask<{bools}>", "band": "BandMask", "list": "ListMask"}[self.mask]

    def tiles_type(self, block_m: int) -> str:
        shape = f"{block_m}, {self.block_n}"
        return {
            "window": f"RangeTiles<{self.mask_type}, {shape}>", "band": f"BandTiles<{shape}>",
            "list": f"ListTiles<{shape}>",
        }[self.mask]  # fmt: skip

    def source(self) -> str:
        tiles = self.tiles_type(self.block_m)
        if self.gate_bits:
            tiles = f"BitmapTiles<{tiles}, {self.block_m}>"
        listed = self.mask == "list"
        schedule = f"LongestListFirst<{tiles}, {self.block_m}>" if listed else f"LongestFirst<{self.block_m}>"
        return f"""#include "policy/band_mask.cuh"
#include "policy/bitmap_tiles.cuh"
#include "policy/contiguous_tma.cuh"
#include "policy/list_schedule.cuh"
#include "policy/list_tiles.cuh"
#include "policy/logit.cuh"
#include "policy/mask.cuh"
#include "policy/range_tiles.cuh"
#include "policy/schedule.cuh"
#include "policy/skip.cuh"
#include "policy/store_output.cuh"
#include "sm90/forward.cuh"

namespace fsa::kernels {{
struct Config {{
  static constexpr ElementType kElement = ElementType::{self.element};
  static constexpr ForwardTile kTile = {{
      .head_dim = {self.head_dim}, .head_dim_v = {self.head_dim_v}, .block_m = {self.block_m},
      .block_n = {self.block_n}, .query_stages = {self.query_stages}, .key_stages = {self.key_stages},
      .value_stages = {self.value_stages}, .private_values = {int(self.private_values)},
      .key_scalars = {int(self.key_scalars)}, .gate_terms = {int(self.gate_terms)},
      .rounded_sums = {int(self.rounded_sums)}}};
  using KvSource = ContiguousTma;
  using Mask = {self.mask_type};
  using TileIterator = {tiles};
  using Schedule = {schedule};
  using LogitChain = Logit<{", ".join(self.logit)}>;
  using Skip = {self.skip};
  using Epilogue = StoreOutput<{"LearnableSink" if self.sink else "NoSink"}>;
}};
}}  // namespace fsa::kernels

extern "C" __global__ void __launch_bounds__({self.threads}, 1)
fsa_forward(const __grid_constant__ fsa::kernels::ForwardParams params) {{
  fsa::kernels::sm90::forward<fsa::kernels::Config>(params);
}}
"""


@dataclass(frozen=True)
class GateConfig:
    """The two kernels in front of gated attention, and the skip map of dense attention."""

    block_n: int = 128
    left: bool = False
    right: bool = False
    mask: str = "window"
    defines: tuple[str, ...] = ()
    shared_bytes: int = 0

    @property
    def name(self) -> str:
        return f"gate_{self.mask}_{self.left:d}{self.right:d}_{self.block_n}"

    def source(self) -> str:
        tiles = replace(
            ForwardConfig(), block_n=self.block_n, left=self.left, right=self.right, mask=self.mask
        )
        return f"""#include "common/gate_bitmap.cuh"
#include "policy/band_mask.cuh"
#include "policy/range_tiles.cuh"

using namespace fsa::kernels;
extern "C" __global__ void __launch_bounds__({self.block_n})
fsa_gate_prepare(const __grid_constant__ ForwardParams params) {{
  gate_prepare<{self.block_n}>(params);
}}
extern "C" __global__ void __launch_bounds__(32 * kBitmapWarps)
fsa_gate_bitmap(const __grid_constant__ ForwardParams params) {{
  gate_bitmap<{tiles.tiles_type(64)}, {self.block_n}>(params);
}}
"""


def with_checks(config: ForwardConfig) -> ForwardConfig:
    return replace(config, defines=(*config.defines, "FSA_DEVICE_CHECKS"))


@functools.cache
def _library() -> ctypes.CDLL:
    patterns = [os.environ.get("FSA_NVRTC_PATH", "")]
    for root in [*site.getsitepackages(), *sys.path]:
        patterns += [f"{root}/nvidia/cu13/lib/libnvrtc.so.*", f"{root}/nvidia/cuda_nvrtc/lib/libnvrtc.so.*"]
    patterns += ["/usr/local/cuda*/lib64/libnvrtc.so.*"]
    for pattern in filter(None, patterns):
        for path in sorted(glob.glob(pattern)):
            # NVRTC opens its builtins by bare name, which finds them only once they are loaded.
            for builtins in glob.glob(f"{Path(path).parent}/libnvrtc-builtins.so.*"):
                ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(path)
    raise RuntimeError(
        "libnvrtc not found: pip install nvidia-cuda-nvrtc, or set FSA_NVRTC_PATH to the library"
    )


@dataclass
class Compiled:
    cubin: bytes
    log: str
    seconds: float


def compile_config(config: ForwardConfig, options: tuple[str, ...] = ()) -> Compiled:
    """NVRTC to a cubin for sm_90a; raises with the whole log on an error."""
    lib = _library()
    headers = {str(p.relative_to(KERNELS)): p.read_bytes() for p in sorted(KERNELS.rglob("*")) if p.is_file()}
    names = (ctypes.c_char_p * len(headers))(*[n.encode() for n in headers])
    texts = (ctypes.c_char_p * len(headers))(*headers.values())
    program = ctypes.c_void_p()
    lib.nvrtcCreateProgram(
        ctypes.byref(program),
        config.source().encode(),
        (config.name + ".cu").encode(),
        len(headers),
        texts,
        names,
    )
    flags = ["--gpu-architecture=sm_90a", "--std=c++20", "-default-device", "-lineinfo", "--ptxas-options=-v"]
    flags += [f"-D{d}" for d in config.defines] + list(options)
    array = (ctypes.c_char_p * len(flags))(*[f.encode() for f in flags])
    start = time.time()
    code = lib.nvrtcCompileProgram(program, len(flags), array)
    seconds = time.time() - start
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    text = log.value.decode()
    if code != 0:
        raise RuntimeError(f"{config.name}: NVRTC error {code}\n{text}")
    lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetCUBIN(program, cubin)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return Compiled(cubin.raw[: size.value], text, seconds)


def _tool(name: str) -> str | None:
    found = shutil.which(name)
    if found:
        return found
    for root in [*site.getsitepackages(), *sys.path]:
        candidate = Path(root) / "nvidia/cu13/bin" / name
        if candidate.exists():
            return str(candidate)
    return None


def disassemble(cubin: bytes) -> str:
    """SASS text, or "" where nvdisasm is not installed."""
    tool = _tool("nvdisasm")
    if tool is None:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def summary(config: ForwardConfig, compiled: Compiled) -> str:
    """One line: registers, spills, instruction counts, compiler warnings."""
    registers = re.search(r"Used (\d+) registers", compiled.log)
    stack = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log
    )
    spills = "/".join(stack.groups()) if stack else "?"
    sass = disassemble(compiled.cubin)
    count = {
        op: len(re.findall(rf"\b{op}\b", sass)) for op in ("HGMMA", "WARPGROUP", "LDL", "STL", "MUFU", "BAR")
    }
    total = len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", sass, re.M))
    warnings = " SERIALIZED" if "serializ" in compiled.log.lower() else ""
    if "setmaxnreg" in compiled.log.lower():
        warnings += " SETMAXNREG IGNORED"
    counts = " ".join(f"{k} {v}" for k, v in count.items())
    return (
        f"{config.name:58s} {compiled.seconds:4.1f}s regs {registers.group(1) if registers else '?'} "
        f"stack/spill {spills} sass {total} {counts} smem {config.shared_bytes}{warnings}"
    )
