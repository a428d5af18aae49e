// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/kernel_config.h"

#include <locale>
#include <sstream>

namespace fsa::cuda {
namespace {

using kernels::ElementType;
using kernels::ForwardTile;

constexpr unsigned kBitmapThreads = 128;
constexpr unsigned kCopyThreads = 256;

std::ostringstream text_stream() {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  return text;
}

const char* boolean(bool value) { return value ? "true" : "false"; }

std::string mask_name(const KernelConfig& config) {
  if (config.mask == MaskKind::bands) return "bands";
  if (config.mask == MaskKind::blocks) return "blocks";
  return config.window_left ? "window" : config.window_right ? "causal" : "full";
}

std::string mask_type(const KernelConfig& config) {
  if (config.mask == MaskKind::bands) return "BandMask";
  if (config.mask == MaskKind::blocks) return "ListMask";
  return std::string("WindowMask<") + boolean(config.window_left) + ", " + boolean(config.window_right) + ">";
}

// The iterator over visible tiles of block_m rows.
std::string tiles_type(const KernelConfig& config, int block_m) {
  const std::string shape = std::to_string(block_m) + ", " + std::to_string(config.tile.block_n) + ">";
  if (config.mask == MaskKind::bands) return "BandTiles<" + shape;
  if (config.mask == MaskKind::blocks) return "ListTiles<" + shape;
  return "RangeTiles<" + mask_type(config) + ", " + shape;
}

// The stages of the logit, in the order of the formula.
std::string logit_stages(const KernelConfig& config) {
  std::string stages;
  const auto add = [&](bool present, const char* stage) {
    if (present) stages += (stages.empty() ? "" : ", ") + std::string(stage);
  };
  add(config.gate == GateKind::linear, "PairGate<false>");
  add(config.gate == GateKind::log_sigmoid, "PairGate<true>");
  add(config.softcap == SoftcapKind::fast, "Softcap");
  add(config.softcap == SoftcapKind::exact, "SoftcapExact");
  add(config.alibi, "Alibi");
  return stages;
}

std::string forward_name(const KernelConfig& config) {
  const ForwardTile& t = config.tile;
  std::ostringstream name = text_stream();
  name << "forward_sm90_" << (config.element == ElementType::bf16 ? "bf16" : "fp16") << "_d" << t.head_dim;
  if (t.head_dim_v != t.head_dim) name << "x" << t.head_dim_v;
  name << "_" << mask_name(config);
  if (config.gate != GateKind::none) name << (config.gate == GateKind::linear ? "_gate" : "_loggate");
  if (config.gate_bits) name << "_test";
  if (config.softcap != SoftcapKind::none) name << "_softcap";
  if (config.alibi) name << "_alibi";
  if (config.sink) name << "_sink";
  if (config.threshold) name << "_threshold";
  name << "_" << t.block_m << "x" << t.block_n;
  return name.str();
}

std::string forward_text(const KernelConfig& config) {
  const ForwardTile& t = config.tile;
  std::string tiles = tiles_type(config, t.block_m);
  if (config.gate_bits) tiles = "BitmapTiles<" + tiles + ", " + std::to_string(t.block_m) + ">";
  std::ostringstream text = text_stream();
  for (const char* policy : {"band_mask", "bitmap_tiles", "contiguous_tma", "list_tiles", "logit", "mask",
                             "range_tiles", "schedule", "skip", "store_output"})
    text << "#include \"policy/" << policy << ".cuh\"\n";
  text << "#include \"sm90/forward.cuh\"\n\n"
       << "namespace fsa::kernels {\n"
       << "struct Config {\n"
       << "  static constexpr ElementType kElement = ElementType::"
       << (config.element == ElementType::bf16 ? "bf16" : "fp16") << ";\n"
       << "  static constexpr ForwardTile kTile = {.head_dim = " << t.head_dim
       << ", .head_dim_v = " << t.head_dim_v << ", .block_m = " << t.block_m << ", .block_n = " << t.block_n
       << ",\n    .query_stages = " << t.query_stages << ", .key_stages = " << t.key_stages
       << ", .value_stages = " << t.value_stages << ", .private_values = " << t.private_values
       << ", .key_scalars = " << t.key_scalars << "};\n"
       << "  using KvSource = ContiguousTma;\n"
       << "  using Mask = " << mask_type(config) << ";\n"
       << "  using TileIterator = " << tiles << ";\n"
       << "  using Schedule = LongestFirst<" << t.block_m << ">;\n"
       << "  using LogitChain = Logit<" << logit_stages(config) << ">;\n"
       << "  using Skip = " << (config.threshold ? "ThresholdSkip" : "Never") << ";\n"
       << "  using Epilogue = StoreOutput<" << (config.sink ? "LearnableSink" : "NoSink") << ">;\n"
       << "};\n"
       << "}  // namespace fsa::kernels\n\n"
       << "extern \"C\" __global__ void __launch_bounds__(" << threads_of(config) << ", 1)\n"
       << "fsa_forward(const __grid_constant__ fsa::kernels::ForwardParams params) {\n"
       << "  fsa::kernels::sm90::forward<fsa::kernels::Config>(params);\n"
       << "}\n";
  return text.str();
}

std::string gate_prepare_text(const KernelConfig& config) {
  std::ostringstream text = text_stream();
  text << "#include \"common/gate_prepare.cuh\"\n\n"
       << "extern \"C\" __global__ void __launch_bounds__(" << threads_of(config) << ")\n"
       << "fsa_gate_prepare(const __grid_constant__ fsa::kernels::ForwardParams params) {\n"
       << "  fsa::kernels::gate_prepare<" << config.tile.block_n << ">(params);\n"
       << "}\n";
  return text.str();
}

std::string gate_bitmap_text(const KernelConfig& config) {
  std::ostringstream text = text_stream();
  text << "#include \"common/gate_bitmap.cuh\"\n"
       << "#include \"policy/band_mask.cuh\"\n"
       << "#include \"policy/range_tiles.cuh\"\n\n"
       << "using namespace fsa::kernels;\n"
       << "static_assert(32 * kBitmapWarps == " << threads_of(config)
       << ", \"the host launches that many\");\n"
       << "extern \"C\" __global__ void __launch_bounds__(" << threads_of(config) << ")\n"
       << "fsa_gate_bitmap(const __grid_constant__ ForwardParams params) {\n"
       << "  gate_bitmap<" << tiles_type(config, kernels::kRowsPerWarpgroup) << ", " << config.tile.block_n
       << ">(params);\n"
       << "}\n";
  return text.str();
}

std::string copy_rows_text(const KernelConfig& config) {
  std::ostringstream text = text_stream();
  text << "#include \"common/copy_rows.cuh\"\n\n"
       << "extern \"C\" __global__ void __launch_bounds__(" << threads_of(config) << ")\n"
       << "fsa_copy_rows(const __grid_constant__ fsa::kernels::CopyRowsParams params) {\n"
       << "  fsa::kernels::copy_rows(params);\n"
       << "}\n";
  return text.str();
}

}  // namespace

std::string name_of(const KernelConfig& config) {
  const std::string keys = std::to_string(config.tile.block_n);
  switch (config.kind) {
    case KernelKind::gate_prepare:
      return "gate_prepare_sm90_" + keys;
    case KernelKind::gate_bitmap:
      return "gate_bitmap_sm90_" + mask_name(config) + "_" + keys;
    case KernelKind::copy_rows:
      return "copy_rows_sm90";
    case KernelKind::forward:
      break;
  }
  return forward_name(config);
}

jit::KernelSource source_of(const KernelConfig& config) {
  const std::string name = name_of(config), arch = "sm_90a";
  switch (config.kind) {
    case KernelKind::gate_prepare:
      return {name, arch, "fsa_gate_prepare", gate_prepare_text(config)};
    case KernelKind::gate_bitmap:
      return {name, arch, "fsa_gate_bitmap", gate_bitmap_text(config)};
    case KernelKind::copy_rows:
      return {name, arch, "fsa_copy_rows", copy_rows_text(config)};
    case KernelKind::forward:
      break;
  }
  return {name, arch, "fsa_forward", forward_text(config)};
}

unsigned threads_of(const KernelConfig& config) {
  switch (config.kind) {
    case KernelKind::gate_prepare:
      return static_cast<unsigned>(config.tile.block_n);
    case KernelKind::gate_bitmap:
      return kBitmapThreads;
    case KernelKind::copy_rows:
      return kCopyThreads;
    case KernelKind::forward:
      break;
  }
  return static_cast<unsigned>(kernels::forward_threads(config.tile));
}

unsigned shared_bytes_of(const KernelConfig& config) {
  if (config.kind != KernelKind::forward) return 0;
  return static_cast<unsigned>(kernels::forward_shared_bytes(config.tile));
}

}  // namespace fsa::cuda
