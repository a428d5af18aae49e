// SPDX-License-Identifier: Apache-2.0
// Block masks: which blocks of keys each block of query rows sees. The names are those of PyTorch's
// FlexAttention.
#pragma once

#include <cstdint>

#include "fsa/tensor.h"

namespace fsa {

/// Rows are cut into blocks of block_rows and keys into blocks of block_keys, from the start of each sequence.
/// For every (batch entry, query head, row block) two lists name the key blocks that are visible: `full` ones
/// as a whole, `partial` ones by a bit per row and key. A block that no list names is hidden. Lists may be in
/// any order and name a block once at most; entries behind the count are not read. A dimension of 1 in place
/// of batch or num_heads stands for all of them; nothing is expanded.
///
/// row_blocks = ceil(seqlen_q / block_rows), key_blocks = ceil(seqlen_k / block_keys), of the tensors' extents.
struct BlockMask {
  /// int32 [batch or 1, num_heads or 1, row_blocks]: how many partial blocks each list names.
  TensorView kv_num_blocks = {};
  /// int32 [batch or 1, num_heads or 1, row_blocks, columns]: their key blocks.
  TensorView kv_indices = {};
  /// The same for full blocks. Either kind of list may be absent.
  TensorView full_kv_num_blocks = {};
  TensorView full_kv_indices = {};
  /// int32, the shape of kv_num_blocks: the bits of entry i of a list are block `partial_begin + i` of
  /// partial_bits.
  TensorView partial_begin = {};
  /// int32 [blocks, block_rows, block_keys / 32], contiguous: bit `key % 32` of word [row][key / 32] is 1 where
  /// the row sees the key, both counted from the corner of the block.
  TensorView partial_bits = {};
  std::int64_t block_rows = 128;  ///< A multiple of 64.
  std::int64_t block_keys = 128;  ///< A multiple of 128; of 64 for head_dim above 128.

  bool present() const {
    return kv_num_blocks.present() || kv_indices.present() || full_kv_num_blocks.present() ||
           full_kv_indices.present() || partial_begin.present() || partial_bits.present();
  }
};

}  // namespace fsa
