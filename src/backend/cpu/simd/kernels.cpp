// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with FSA_SIMD_TARGET naming the set and its namespace.
#include "backend/cpu/simd/backward-inl.h"
#include "backend/cpu/simd/decode-inl.h"
#include "backend/cpu/simd/forward-inl.h"
#include "backend/cpu/simd/kernel_table.h"

#define FSA_JOIN_(a, b) a##b
#define FSA_JOIN(a, b) FSA_JOIN_(a, b)
#define FSA_TEXT_(a) #a
#define FSA_TEXT(a) FSA_TEXT_(a)

namespace fsa::cpu {
namespace FSA_SIMD_TARGET {

// Highway falls back silently when a compiler flag is missing; a file named avx512 must be AVX-512.
constexpr bool is_named(const char* a, const char* b) {
  while (*a != 0 && *a == *b) ++a, ++b;
  return *a == *b;
}
static_assert(!is_named(FSA_TEXT(FSA_SIMD_TARGET), "avx512") || HWY_TARGET <= HWY_AVX3, "flags lack AVX-512");
static_assert(!is_named(FSA_TEXT(FSA_SIMD_TARGET), "avx2") || HWY_TARGET == HWY_AVX2,
              "flags lack AVX2, FMA or AES");
static_assert(!is_named(FSA_TEXT(FSA_SIMD_TARGET), "sse4") || HWY_TARGET == HWY_SSE4,
              "flags lack SSE4.2 or AES");

}  // namespace FSA_SIMD_TARGET

const KernelTable& FSA_JOIN(FSA_SIMD_TARGET, _kernels)() {
  static constexpr KernelTable table = {
      FSA_TEXT(FSA_SIMD_TARGET),
      FSA_SIMD_TARGET::kLanes,
      [](const Problem& p)
          HWY_ATTR { return FSA_SIMD_TARGET::forward_scratch<FSA_SIMD_TARGET::FloatForward>(p); },
      [](const Problem& p, const Arguments& a, const ForwardItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::forward<FSA_SIMD_TARGET::FloatForward>(p, a, item, scratch); },
      [](const Problem& p)
          HWY_ATTR { return FSA_SIMD_TARGET::backward_scratch<FSA_SIMD_TARGET::FloatBackward>(p); },
      [](const Problem&) { return std::size_t{0}; },
      [](const Problem& p)
          HWY_ATTR { return FSA_SIMD_TARGET::backward_block_keys<FSA_SIMD_TARGET::FloatBackward>(p); },
      [](const Problem& p, const Arguments& a, const BackwardBuffers& b, const RowTileItem& item,
         void* scratch) HWY_ATTR { FSA_SIMD_TARGET::row_statistics(p, a, b, item, scratch); },
      [](const Problem& p, const Arguments& a, const BackwardBuffers& b, const BackwardItem& item,
         void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::backward<FSA_SIMD_TARGET::FloatBackward>(p, a, b, item, scratch); },
      [](const Problem& p, const Arguments& a, const BackwardBuffers& b, const RowTileItem& item,
         void* scratch) HWY_ATTR { FSA_SIMD_TARGET::finish_rows(p, a, b, item, scratch); },
      [](const Problem& p)
          HWY_ATTR { return FSA_SIMD_TARGET::decode_scratch<FSA_SIMD_TARGET::FloatDecode>(p); },
      [](const Problem& p, const Arguments& a, const DecodeBuffers& b, const DecodeItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::decode_plan<FSA_SIMD_TARGET::FloatDecode>(p, a, b, item, scratch); },
      [](const Problem& p, const Arguments& a, const DecodeBuffers& b, const DecodeItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::decode<FSA_SIMD_TARGET::FloatDecode>(p, a, b, item, scratch); },
      [](const Problem& p, const Arguments& a, const DecodeBuffers& b, const DecodeItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::decode_combine(p, a, b, item, scratch); },
  };
  return table;
}

}  // namespace fsa::cpu
