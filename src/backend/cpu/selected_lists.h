// SPDX-License-Identifier: Apache-2.0
// Which tokens of a chunk selected which block: the transpose of selected_blocks, block by block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/nsa_problem.h"

namespace fsa::cpu {

// Blocks ascending, the tokens of a block ascending; tokens counted from the first one of the chunk. Each token
// appears at most once per block: a duplicate selection counts once, -1 and blocks after the token's own do not.
struct SelectedLists {
  std::int64_t blocks = 0;
  const std::int32_t* block = nullptr;  // [blocks]
  const std::int32_t* begin = nullptr;  // [blocks + 1], into tokens
  const std::int32_t* tokens = nullptr;
};

// Bytes of memory that build_lists needs for chunks of up to `tokens` tokens.
std::size_t lists_bytes(const NsaProblem& problem, std::int64_t tokens);

// Rows [row_begin, row_end) of the sequence; entries by histogram, prefix sum and stable scatter.
SelectedLists build_lists(const NsaProblem& problem, const NsaArguments& args, const NsaSequence& sequence,
                          std::int64_t kv_head, std::int64_t row_begin, std::int64_t row_end, void* memory);

}  // namespace fsa::cpu
