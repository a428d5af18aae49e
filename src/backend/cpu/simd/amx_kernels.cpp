// SPDX-License-Identifier: Apache-2.0
// The set "avx512_amx": bfloat16 on AMX tiles, all else as in "avx512". Compiled once, with the
// flags of that set.
#include "backend/cpu/simd/kernel_table.h"
#include "backend/cpu/simd/tile_backward-inl.h"
#include "backend/cpu/simd/tile_decode-inl.h"
#include "backend/cpu/simd/tile_forward-inl.h"

namespace fsa::cpu {
namespace {

using namespace avx512_amx;

bool on_tiles(const Problem& p) { return p.dtype == DType::bfloat16; }

std::size_t forward_scratch_bytes(const Problem& p) {
  return on_tiles(p) ? forward_scratch<TileForward>(p) : avx512_kernels().forward_scratch(p);
}

void run_forward(const Problem& p, const Arguments& a, const ForwardItem& item, void* scratch) {
  if (!on_tiles(p)) return avx512_kernels().forward(p, a, item, scratch);
  const TileSession session;
  forward<TileForward>(p, a, item, scratch);
}

std::size_t backward_scratch_bytes(const Problem& p) {
  return on_tiles(p) ? backward_scratch<TileBackward>(p) : avx512_kernels().backward_scratch(p);
}

std::size_t packed_row_bytes(const Problem& p) { return on_tiles(p) ? PackedRows::bytes(p) : 0; }

std::int64_t block_keys(const Problem& p) {
  return on_tiles(p) ? backward_block_keys<TileBackward>(p) : avx512_kernels().backward_block_keys(p);
}

void run_row_statistics(const Problem& p, const Arguments& a, const BackwardBuffers& b,
                        const RowTileItem& item, void* scratch) {
  avx512_kernels().row_statistics(p, a, b, item, scratch);
  if (on_tiles(p)) pack_rows_of_backward(p, a, b, item, static_cast<std::uint16_t*>(scratch));
}

void run_backward(const Problem& p, const Arguments& a, const BackwardBuffers& b, const BackwardItem& item,
                  void* scratch) {
  if (!on_tiles(p)) return avx512_kernels().backward(p, a, b, item, scratch);
  const TileSession session;
  backward<TileBackward>(p, a, b, item, scratch);
}

std::size_t decode_scratch_bytes(const Problem& p) {
  return on_tiles(p) ? decode_scratch<TileDecode>(p) : avx512_kernels().decode_scratch(p);
}

void run_decode_plan(const Problem& p, const Arguments& a, const DecodeBuffers& b, const DecodeItem& item,
                     void* scratch) {
  if (!on_tiles(p)) return avx512_kernels().decode_plan(p, a, b, item, scratch);
  const TileSession session;
  decode_plan<TileDecode>(p, a, b, item, scratch);
}

void run_decode(const Problem& p, const Arguments& a, const DecodeBuffers& b, const DecodeItem& item,
                void* scratch) {
  if (!on_tiles(p)) return avx512_kernels().decode(p, a, b, item, scratch);
  const TileSession session;
  decode<TileDecode>(p, a, b, item, scratch);
}

}  // namespace

const KernelTable& avx512_amx_kernels() {
  static const KernelTable table = [] {
    KernelTable t = avx512_kernels();
    t.target = "avx512_amx";
    t.forward_scratch = forward_scratch_bytes;
    t.forward = run_forward;
    t.backward_scratch = backward_scratch_bytes;
    t.packed_row_bytes = packed_row_bytes;
    t.backward_block_keys = block_keys;
    t.row_statistics = run_row_statistics;
    t.backward = run_backward;
    t.decode_scratch = decode_scratch_bytes;
    t.decode_plan = run_decode_plan;
    t.decode = run_decode;
    return t;
  }();
  return table;
}

}  // namespace fsa::cpu
