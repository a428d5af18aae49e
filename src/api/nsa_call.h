// SPDX-License-Identifier: Apache-2.0
// One call of native sparse attention on its way to a backend: as api/call.h and api/prepare.h.
#pragma once

#include <string>

#include "api/call.h"
#include "core/nsa_problem.h"

namespace fsa {

struct NsaCall : CallTensors {
  NsaProblem problem;
  NsaArguments arguments;
  Axes axes;      // of x, query, key, value, the branches and what is shaped like them
  Axes lse_axes;  // of lse
};

// Check everything, up to the choice of a backend. `args` must outlive the call that is returned.
NsaCall prepare(const nsa::CompressArgs& args, Purpose purpose);
NsaCall prepare(const nsa::CompressBackwardArgs& args, Purpose purpose);
NsaCall prepare(const nsa::SelectBlocksArgs& args, Purpose purpose);
NsaCall prepare(const nsa::SelectedForwardArgs& args, Purpose purpose);
NsaCall prepare(const nsa::SelectedBackwardArgs& args, Purpose purpose);
NsaCall prepare(const nsa::CombineArgs& args);
NsaCall prepare(const nsa::CombineBackwardArgs& args);

// The last steps of every operation: choose, log, check the workspace, run.
void run(NsaCall& call, const std::string& wanted_backend, Workspace workspace, void* stream);

// ---- What several operations check ----

// Whether sequences are packed, their number and their rows, from the first input [batch, seqlen, heads, head_dim]
// and its cu_seqlens. `heads` is the name of that extent.
void read_rows(NsaCall& call, const char* name, const TensorView& first, const char* heads,
               const char* cu_seqlens_name, const TensorView& cu_seqlens);

// A tensor over keys, packed or batched as the rows are.
void check_keys_layout(const NsaCall& call, const char* name, const TensorView& view, const char* rows);

// Heads and head_dim of a query and its keys; softmax_scale.
void read_heads(NsaCall& call, const TensorView& query, const char* key_name, const TensorView& key,
                const std::optional<double>& softmax_scale);

void check_seqused_k(const NsaCall& call, const TensorView& seqused_k);

void check_block_size(std::int64_t block_size);

// Of query (or of `first`): "[batch, num_heads, seqlen_q]" and its dtype.
Expected expected_lse(const NsaCall& call);

// The rows of every sequence, and of the longest one where the values of cu_seqlens can be read.
bool is_readable(const NsaCall& call);
void read_longest(NsaCall& call);

BlockTable make_block_table(const NsaCall& call, const TensorView& view);

}  // namespace fsa
