// SPDX-License-Identifier: Apache-2.0
#include "api/nsa_call.h"

#include <algorithm>

#include "api/choice.h"

namespace fsa {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;

}  // namespace

std::string describe(const NsaProblem& problem) {
  std::string line =
      text_of(name_of(problem.operation), " ", name_of(problem.dtype), " batch ", problem.batch, " heads ",
              problem.num_heads, "/", problem.num_kv_heads, " seqlen ", problem.max_seqlen_q, "x",
              problem.max_seqlen_k, " head_dim ", problem.head_dim, "/", problem.head_dim_v);
  if (problem.compress_block > 0)
    line += text_of(" compress_block ", problem.compress_block, " compress_stride ", problem.compress_stride);
  if (problem.block_size > 0) line += text_of(" block_size ", problem.block_size, " top_k ", problem.top_k);
  return line;
}

void run(NsaCall& call, const std::string& wanted_backend, Workspace workspace, void* stream) {
  run_call(call, wanted_backend, workspace, stream);
}

void read_rows(NsaCall& call, const char* name, const TensorView& first, const char* heads,
               const char* cu_seqlens_name, const TensorView& cu_seqlens) {
  NsaProblem& p = call.problem;
  p.packed = cu_seqlens.present();
  call.axes = p.packed ? kPackedAxes : kBatchedAxes;
  call.lse_axes = p.packed ? Axes{.row = 1, .head = 0} : Axes{.batch = 0, .row = 2, .head = 1};
  const std::string layout =
      p.packed ? text_of("[total, ", heads, ", head_dim] with ", cu_seqlens_name)
               : text_of("[batch, seqlen, ", heads, ", head_dim]; packed sequences need ", cu_seqlens_name);
  check_rank(name, first, p.packed ? 3 : 4, layout.c_str());
  if (p.packed) {
    check_rank(cu_seqlens_name, cu_seqlens, 1, "[batch + 1]");
    if (cu_seqlens.shape[0] < 1) fail(kInvalid, cu_seqlens_name, ": shape [0], must be [batch + 1]");
    p.batch = cu_seqlens.shape[0] - 1;
    p.total_q = p.max_seqlen_q = first.shape[0];
  } else {
    p.batch = first.shape[0];
    p.max_seqlen_q = first.shape[1];
    p.total_q = p.batch * p.max_seqlen_q;
  }
}

void check_keys_layout(const NsaCall& call, const char* name, const TensorView& view, const char* rows) {
  const bool packed = call.problem.packed;
  const std::string layout =
      packed ? text_of("packed as query, [total, num_kv_heads, head_dim]")
             : text_of("[batch, ", rows, ", num_kv_heads, head_dim] as query without cu_seqlens");
  check_rank(name, view, packed ? 3 : 4, layout.c_str());
  if (!packed) check_equal(name, "batch", view.shape[0], "query", call.problem.batch);
}

void read_heads(NsaCall& call, const TensorView& query, const char* key_name, const TensorView& key,
                const std::optional<double>& softmax_scale) {
  NsaProblem& p = call.problem;
  p.num_heads = query.shape[call.axes.head];
  p.head_dim = query.shape[call.axes.dim];
  p.num_kv_heads = key.shape[call.axes.head];
  check_head_dim("query", "head_dim", p.head_dim);
  check_equal(key_name, "head_dim", key.shape[call.axes.dim], "query", p.head_dim);
  if (p.num_heads < 1) fail(kInvalid, "query: num_heads 0, must be at least 1");
  check_heads(p.num_heads, key_name, p.num_kv_heads);
  p.group_size = p.num_heads / p.num_kv_heads;
  p.softmax_scale = checked_softmax_scale(softmax_scale, p.head_dim);
}

void check_seqused_k(const NsaCall& call, const TensorView& seqused_k) {
  if (!seqused_k.present()) return;
  if (call.problem.packed)
    fail(ErrorCode::unsupported,
         "seqused_k: given together with cu_seqlens, but only batched tensors take it; leave one out");
  check_shape("seqused_k", seqused_k, {call.problem.batch}, "[batch]");
}

void check_block_size(std::int64_t block_size) {
  if (block_size < 16 || block_size > 256)
    fail(kInvalid, "block_size: ", block_size, ", must be from 16 to 256");
}

Expected expected_lse(const NsaCall& call) {
  const NsaProblem& p = call.problem;
  const DType dtype = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  if (p.packed) return {{p.num_heads, p.total_q}, dtype, "[num_heads, total]"};
  return {{p.batch, p.num_heads, p.max_seqlen_q}, dtype, "[batch, num_heads, seqlen_q]"};
}

bool is_readable(const NsaCall& call) { return call.problem.device.kind == DeviceKind::cpu; }

void read_longest(NsaCall& call) {
  NsaProblem& p = call.problem;
  if (!p.packed || !is_readable(call)) return;
  p.max_seqlen_q = p.max_seqlen_k = 0;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const NsaSequence s = nsa_sequence(p, call.arguments, b);
    p.max_seqlen_q = std::max(p.max_seqlen_q, s.rows);
    p.max_seqlen_k = std::max(p.max_seqlen_k, s.keys);
  }
}

BlockTable make_block_table(const NsaCall& call, const TensorView& view) {
  BlockTable table;
  if (!view.present()) return table;
  const int head_axis = call.problem.packed ? 0 : 1;
  table.data = static_cast<std::int32_t*>(view.data);
  table.stride_batch = call.problem.packed ? 0 : effective_stride(view, 0);
  table.stride_head = effective_stride(view, head_axis);
  table.stride_row = effective_stride(view, head_axis + 1);
  table.stride_slot = effective_stride(view, head_axis + 2);
  return table;
}

}  // namespace fsa
