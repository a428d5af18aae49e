// SPDX-License-Identifier: Apache-2.0
// Checks of what the int32 tensors say. Only for tensors whose memory the caller can read.
#pragma once

#include "core/problem.h"

namespace fsa {

struct Lengths {              // over all sequences
  std::int64_t max_rows = 0;  // that the tensors hold
  std::int64_t max_keys = 0;
  std::int64_t max_seqlen_q = 0;  // in use
  std::int64_t max_seqlen_k = 0;
};

void check_cu_seqlens(const char* name, const IndexTable& table, std::int64_t batch, const char* tensor,
                      std::int64_t total);

// Sequence `batch` of `keys_name` holds `keys` compressed keys and is to have as many as its tokens make; more
// are allowed where not all are in use.
void check_compressed_keys(const char* keys_name, std::int64_t batch, std::int64_t keys, bool more_allowed,
                           std::int64_t tokens, std::int64_t compress_block, std::int64_t compress_stride);

// seqused_k counts tokens, and each row is one.
void check_tokens(std::int64_t batch, std::int64_t tokens, std::int64_t rows, const char* hint);

// cu_seqlens are checked already. Throws when seqused is negative or beyond its sequence.
Lengths check_lengths(const Problem& problem, const Arguments& args);

// Keys are compressed: each sequence holds as many as its tokens make. Lengths are checked already.
void check_compressed_lengths(const Problem& problem, const Arguments& args);

void check_page_table(const Problem& problem, const Arguments& args);
void check_gather_indices(const Problem& problem, const Arguments& args);
void check_window_sizes(const Problem& problem, const Arguments& args);
void check_block_mask(const Problem& problem, const BlockLists& lists);

}  // namespace fsa
