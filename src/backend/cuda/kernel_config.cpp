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
constexpr unsigned kClearThreads = 32;
constexpr unsigned kPrepareThreads = 256, kSumSinkThreads = 256, kColumnThreads = 128;
constexpr unsigned kListThreads = 512, kSplitThreads = 512, kSumThreads = 128;

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
  const bool folded = config.tile.gate_terms != 0 || config.backward.gate_terms != 0;
  add(config.gate == GateKind::linear, folded ? "FoldedPairGate<false>" : "PairGate<false>");
  add(config.gate == GateKind::log_sigmoid, folded ? "FoldedPairGate<true>" : "PairGate<true>");
  add(config.softcap == SoftcapKind::fast, "Softcap");
  add(config.softcap == SoftcapKind::exact, "SoftcapExact");
  add(config.softcap == SoftcapKind::bounded, "SoftcapBounded");
  add(config.alibi, "Alibi");
  return stages;
}

const char* element_name(const KernelConfig& config) {
  return config.element == ElementType::bf16 ? "bf16" : "fp16";
}

std::string dims_name(int head_dim, int head_dim_v) {
  std::ostringstream text = text_stream();
  text << "_d" << head_dim;
  if (head_dim_v != head_dim) text << "x" << head_dim_v;
  return text.str();
}

std::string gate_name(const KernelConfig& config) {
  return config.gate == GateKind::none ? "" : config.gate == GateKind::linear ? "_gate" : "_loggate";
}

std::string forward_name(const KernelConfig& config) {
  const ForwardTile& t = config.tile;
  std::ostringstream name = text_stream();
  name << "forward_sm90_" << element_name(config) << dims_name(t.head_dim, t.head_dim_v);
  name << "_" << mask_name(config) << gate_name(config);
  if (config.gate_bits) name << "_test";
  if (config.softcap == SoftcapKind::bounded)
    name << "_boundedcap";
  else if (config.softcap != SoftcapKind::none)
    name << "_softcap";
  if (config.alibi) name << "_alibi";
  if (config.sink) name << "_sink";
  if (config.threshold) name << "_threshold";
  name << "_" << t.block_m << "x" << t.block_n;
  return name.str();
}

const char* backward_kind_name(KernelKind kind) {
  switch (kind) {
    case KernelKind::backward_prepare:
      return "backward_prepare";
    case KernelKind::backward_finish:
      return "backward_finish";
    case KernelKind::sum_sink:
      return "sum_sink";
    case KernelKind::split_columns:
      return "split_columns";
    case KernelKind::sum_parts:
      return "sum_parts";
    default:
      return "backward";
  }
}

// Of the main kernel and of those around it that know its tile.
std::string backward_name(const KernelConfig& config) {
  const kernels::BackwardTile& t = config.backward;
  std::ostringstream name = text_stream();
  name << backward_kind_name(config.kind) << "_sm90_" << element_name(config)
       << dims_name(t.head_dim, t.head_dim_v);
  if (config.kind == KernelKind::backward || config.kind == KernelKind::split_columns)
    name << "_" << mask_name(config);
  name << gate_name(config);
  if (config.gate_bits) name << "_bits";
  if (config.softcap == SoftcapKind::fast) name << "_softcap";
  if (config.softcap == SoftcapKind::exact) name << "_exactcap";
  if (config.alibi) name << "_alibi";
  if (config.sink) name << "_sink";
  if (config.deterministic) name << "_deterministic";
  name << "_" << t.block_m << "x" << t.block_n;
  return name.str();
}

// The constant of common/ that says how many threads a block has.
const char* backward_threads_name(KernelKind kind) {
  switch (kind) {
    case KernelKind::backward_prepare:
      return "kPrepareThreads";
    case KernelKind::sum_sink:
      return "kSumSinkThreads";
    case KernelKind::split_columns:
      return "kSplitThreads";
    case KernelKind::sum_parts:
      return "kSumThreads";
    default:
      return nullptr;
  }
}

// Where the device knows their number by a name.
std::string thread_check(const char* threads, const KernelConfig& config) {
  if (threads == nullptr) return {};
  return std::string("static_assert(") + threads + " == " + std::to_string(threads_of(config)) +
         ", \"the host launches that many\");\n";
}

std::string backward_text(const KernelConfig& config) {
  const kernels::BackwardTile& t = config.backward;
  const std::string shape = std::to_string(t.block_m) + ", " + std::to_string(t.block_n) + ">";
  std::string rows = config.mask == MaskKind::bands    ? "BandRows<" + shape
                     : config.mask == MaskKind::blocks ? "ListRows<" + shape
                                                       : "RangeRows<" + mask_type(config) + ", " + shape;
  if (config.gate_bits) rows = "BitmapRows<" + rows + ", " + std::to_string(t.block_n) + ">";
  std::ostringstream text = text_stream();
  text << "#include \"common/backward_finish.cuh\"\n"
       << "#include \"common/backward_prepare.cuh\"\n"
       << "#include \"common/split_columns.cuh\"\n"
       << "#include \"common/sum_parts.cuh\"\n"
       << "#include \"policy/row_tiles.cuh\"\n"
       << "#include \"sm90/backward.cuh\"\n\n"
       << "namespace fsa::kernels {\n"
       << "struct Config {\n"
       << "  static constexpr ElementType kElement = ElementType::" << element_name(config) << ";\n"
       << "  static constexpr BackwardTile kTile = {.head_dim = " << t.head_dim
       << ", .head_dim_v = " << t.head_dim_v << ", .block_m = " << t.block_m << ", .block_n = " << t.block_n
       << ",\n    .query_stages = " << t.query_stages << ", .grad_out_stages = " << t.grad_out_stages
       << ", .score_stages = " << t.score_stages << ",\n    .stage_grad_query = " << t.stage_grad_query
       << ", .row_vectors = " << t.row_vectors << ", .gate_terms = " << t.gate_terms << "};\n"
       << "  static constexpr bool kDeterministic = " << boolean(config.deterministic) << ";\n"
       << "  static constexpr bool kSink = " << boolean(config.sink) << ";\n"
       << "  using Mask = " << mask_type(config) << ";\n"
       << "  using RowIterator = " << rows << ";\n"
       << "  using LogitChain = Logit<" << logit_stages(config) << ">;\n"
       << "};\n"
       << "using Types = sm90::BackwardTypes<Config>;\n"
       << "}  // namespace fsa::kernels\n\n"
       << "using namespace fsa::kernels;\n"
       << thread_check(backward_threads_name(config.kind), config)
       << "extern \"C\" __global__ void __launch_bounds__(" << threads_of(config) << ", "
       << (config.kind == KernelKind::backward_prepare ? "kPrepareBlocks<Types>" : "1") << ")\n"
       << "fsa_" << backward_kind_name(config.kind) << "(const __grid_constant__ BackwardParams params) {\n"
       << (config.kind == KernelKind::backward
               ? "  sm90::backward<Config>(params);\n"
               : std::string("  ") + backward_kind_name(config.kind) + "<Types>(params);\n")
       << "}\n";
  return text.str();
}

// `function` of common/, which makes columns of rows with so many threads a block.
std::string columns_text(const KernelConfig& config, const char* function, const char* threads) {
  std::ostringstream text = text_stream();
  text << "#include \"common/" << function << ".cuh\"\n\n"
       << "using namespace fsa::kernels;\n"
       << thread_check(threads, config) << "extern \"C\" __global__ void __launch_bounds__("
       << threads_of(config) << ")\n"
       << "fsa_" << function << "(const __grid_constant__ BackwardParams params) {\n"
       << "  " << function << "<" << config.tile.block_n << ">(params);\n"
       << "}\n";
  return text.str();
}

std::string forward_text(const KernelConfig& config) {
  const ForwardTile& t = config.tile;
  std::string tiles = tiles_type(config, t.block_m);
  if (config.gate_bits) tiles = "BitmapTiles<" + tiles + ", " + std::to_string(t.block_m) + ">";
  std::ostringstream text = text_stream();
  const bool listed = config.mask == MaskKind::blocks;
  for (const char* policy : {"band_mask", "bitmap_tiles", "contiguous_tma", "list_schedule", "list_tiles",
                             "logit", "mask", "range_tiles", "schedule", "skip", "store_output"})
    text << "#include \"policy/" << policy << ".cuh\"\n";
  text << "#include \"sm90/forward.cuh\"\n\n"
       << "namespace fsa::kernels {\n"
       << "struct Config {\n"
       << "  static constexpr ElementType kElement = ElementType::" << element_name(config) << ";\n"
       << "  static constexpr ForwardTile kTile = {.head_dim = " << t.head_dim
       << ", .head_dim_v = " << t.head_dim_v << ", .block_m = " << t.block_m << ", .block_n = " << t.block_n
       << ",\n    .query_stages = " << t.query_stages << ", .key_stages = " << t.key_stages
       << ", .value_stages = " << t.value_stages << ", .private_values = " << t.private_values
       << ", .key_scalars = " << t.key_scalars << ", .gate_terms = " << t.gate_terms
       << ", .rounded_sums = " << t.rounded_sums << "};\n"
       << "  using KvSource = ContiguousTma;\n"
       << "  using Mask = " << mask_type(config) << ";\n"
       << "  using TileIterator = " << tiles << ";\n"
       << "  using Schedule = " << (listed ? "LongestListFirst<" + tiles + ", " : "LongestFirst<")
       << t.block_m << ">;\n"
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
       << thread_check("32 * kBitmapWarps", config) << "extern \"C\" __global__ void __launch_bounds__("
       << threads_of(config) << ")\n"
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

std::string clear_counters_text(const KernelConfig& config) {
  std::ostringstream text = text_stream();
  text << "#include \"common/clear_counters.cuh\"\n\n"
       << "using namespace fsa::kernels;\n"
       << thread_check("kClearThreads", config) << "extern \"C\" __global__ void __launch_bounds__("
       << threads_of(config) << ")\n"
       << "fsa_clear_counters(int32* counters) {\n"
       << "  clear_counters(counters);\n"
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
    case KernelKind::clear_counters:
      return "clear_counters_sm90";
    case KernelKind::transpose_bits:
      return "transpose_bits_sm90_" + keys;
    case KernelKind::block_columns:
      return "block_columns_sm90_" + keys;
    case KernelKind::backward:
    case KernelKind::backward_prepare:
    case KernelKind::backward_finish:
    case KernelKind::sum_sink:
    case KernelKind::split_columns:
    case KernelKind::sum_parts:
      return backward_name(config);
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
    case KernelKind::clear_counters:
      return {name, arch, "fsa_clear_counters", clear_counters_text(config)};
    case KernelKind::transpose_bits:
      return {name, arch, "fsa_transpose_bits",
              columns_text(config, "transpose_bits", "32 * kTransposeWarps")};
    case KernelKind::block_columns:
      return {name, arch, "fsa_block_columns", columns_text(config, "block_columns", "kListThreads")};
    case KernelKind::backward:
    case KernelKind::backward_prepare:
    case KernelKind::backward_finish:
    case KernelKind::sum_sink:
    case KernelKind::split_columns:
    case KernelKind::sum_parts:
      return {name, arch, std::string("fsa_") + backward_kind_name(config.kind), backward_text(config)};
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
    case KernelKind::clear_counters:
      return kClearThreads;
    case KernelKind::transpose_bits:
      return kColumnThreads;
    case KernelKind::block_columns:
      return kListThreads;
    case KernelKind::backward:
      return static_cast<unsigned>(kernels::kBackwardThreads);
    case KernelKind::backward_prepare:
      return kPrepareThreads;
    case KernelKind::backward_finish:
      return static_cast<unsigned>(2 * config.backward.block_m);
    case KernelKind::sum_sink:
      return kSumSinkThreads;
    case KernelKind::split_columns:
      return kSplitThreads;
    case KernelKind::sum_parts:
      return kSumThreads;
    case KernelKind::forward:
      break;
  }
  return static_cast<unsigned>(kernels::forward_threads(config.tile));
}

unsigned shared_bytes_of(const KernelConfig& config) {
  if (config.kind == KernelKind::backward)
    return static_cast<unsigned>(kernels::backward_shared_bytes(config.backward));
  if (config.kind != KernelKind::forward) return 0;
  return static_cast<unsigned>(kernels::forward_shared_bytes(config.tile));
}

}  // namespace fsa::cuda
