// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, as kernels.cpp; a file of its own so that both compile side by side.
#include "backend/cpu/simd/combine-inl.h"
#include "backend/cpu/simd/compress-inl.h"
#include "backend/cpu/simd/nsa_forward_kernels.h"
#include "backend/cpu/simd/select_blocks-inl.h"
#include "backend/cpu/simd/selected-inl.h"

namespace fsa::cpu {

const NsaKernelTable& FSA_JOIN(FSA_SIMD_TARGET, _nsa_kernels)() {
  using P = const NsaProblem&;
  using A = const NsaArguments&;
  static constexpr NsaKernelTable table = {
      [](P p, A a, const CompressBuffers& b, std::int64_t head, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::compress_prepare(p, a, b, head, scratch); },
      [](P p) HWY_ATTR { return FSA_SIMD_TARGET::compress_scratch(p); },
      [](P p, A a, const CompressBuffers& b, const CompressItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::compress(p, a, b, item, scratch); },
      [](P p, A a, const CompressBuffers& b, const CompressItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::compress_grad_x(p, a, b, item, scratch); },
      [](P p, A a, const CompressBuffers& b, std::int64_t head, std::int64_t position, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::compress_grad_weight(p, a, b, head, position, scratch); },
      [](P p) HWY_ATTR { return FSA_SIMD_TARGET::select_scratch(p); },
      [](P p, A a, const RowsItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::select_blocks(p, a, item, scratch); },
      FSA_JOIN(FSA_SIMD_TARGET, _select_forward_scratch),
      FSA_JOIN(FSA_SIMD_TARGET, _select_forward),
      [](P p, std::int64_t tokens) HWY_ATTR { return FSA_SIMD_TARGET::selected_scratch(p, tokens); },
      [](P p, A a, const SelectedBuffers& b, const SelectedItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::selected_pack(p, a, b, item, scratch); },
      [](P p, A a, const SelectedBuffers& b, const SelectedItem& item, const SelectedLists& lists,
         void* scratch) HWY_ATTR { FSA_SIMD_TARGET::selected_forward(p, a, b, item, lists, scratch); },
      [](P p, A a, const SelectedBuffers& b, const SelectedItem& item, const SelectedLists& lists,
         void* scratch) HWY_ATTR { FSA_SIMD_TARGET::selected_backward(p, a, b, item, lists, scratch); },
      [](P p, A a, const SelectedBuffers& b, const SelectedItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::selected_finish(p, a, b, item, scratch); },
      [](P p) HWY_ATTR { return FSA_SIMD_TARGET::combine_scratch(p); },
      [](P p, A a, const RowsItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::combine(p, a, item, scratch); },
      [](P p, A a, const RowsItem& item, void* scratch)
          HWY_ATTR { FSA_SIMD_TARGET::combine_backward(p, a, item, scratch); },
  };
  return table;
}

}  // namespace fsa::cpu
