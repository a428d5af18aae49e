// SPDX-License-Identifier: Apache-2.0
// NSA selected attention. One item is a chunk of tokens of one key head with all heads of the group; a row is one query
// head of one token.
//
//   for each block that a token of the chunk selected, ascending:          (lists: selected_lists.h)
//     K^T and V of the block packed once
//     for batches of the rows that selected it:
//       S = Q K^T         rows of Q where they are, through a list of addresses
//       softmax           max and sum of each row, kept in the chunk
//       O = O * 2^(m_old - m) + P V     rows of O where they are, in the chunk's accumulators
//
// One lane per key, unlike the dense kernels: the rows of a batch are scattered, the keys of a block are not, so neither
// Q, P nor O is ever transposed. A row accumulates its blocks in ascending order with its own maximum, so
// there are no partial results to write, read back and merge, and the chunk bounds all memory. The bits of a row do not
// depend on the chunk: chunks of one token are the query-outer algorithm.
#pragma once

#include "backend/cpu/simd/compress-inl.h"
#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/nsa_table.h"
#include "backend/cpu/simd/scores-inl.h"
#include "backend/cpu/simd/seen_squares-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

// Rows of a block that are computed together: 8 register blocks of 6, and 12 KB of scores at 64 keys.
inline constexpr std::int64_t kSelectedBatch = 48;

// Query (or grad_out) rows of a chunk as float, row token * group + head. Copied even where they could be used in
// place: rows of one head lie num_heads * head_dim apart, which maps them to a few sets of the caches (4 heads of 64:
// 90 GFLOP/s in place, 128 copied).
HWY_INLINE void pack_chunk(const NsaProblem& p, const Operand& o, const SelectedItem& item, std::int64_t dims,
                           std::int64_t pitch, float* target) {
  const NsaSequence& s = item.sequence;
  for (std::int64_t g = 0; g < p.group_size; ++g)
    load_rows(o, s.batch, s.q_begin, item.kv_head * p.group_size + g, item.row_begin,
              item.row_end - item.row_begin, dims, target + g * pitch, pitch * p.group_size);
}

struct SelectedScratch {
  std::int64_t block_pitch, key_pitch, value_pitch;  // of K^T and scores, of rows of head_dim, of head_dim_v
  float *query, *grad_out;                           // [rows][pitch]
  float *out, *grad_query;                           // [rows][pitch], accumulated
  float *row_max, *row_sum;                          // [rows]; backward: the base-2 lse in two floats
  float* dots;                                       // [rows]: rowsum(out * grad_out)
  float *key_t, *value_t, *key, *value;              // of the block
  float *scores, *grad_scores, *maxima, *factors, *staging;

  HWY_INLINE std::size_t carve(const NsaProblem& p, std::int64_t tokens, char* base) {
    Arena arena{base};
    const bool backward = p.operation == NsaOperation::selected_backward;
    const std::int64_t rows = tokens * p.group_size;
    block_pitch = round_up(p.block_size, 16);
    key_pitch = round_up(p.head_dim, 16);
    value_pitch = round_up(p.head_dim_v, 16);
    query = arena.floats(rows * key_pitch);
    out = arena.floats(backward ? 0 : rows * value_pitch);
    grad_out = arena.floats(backward ? rows * value_pitch : 0);
    grad_query = arena.floats(backward ? rows * key_pitch : 0);
    row_max = arena.floats(rows);
    row_sum = arena.floats(rows);
    dots = arena.floats(backward ? rows : 0);
    key_t = arena.floats(round_up(p.head_dim, 4) * block_pitch);
    value_t = arena.floats(backward ? round_up(p.head_dim_v, 4) * block_pitch : 0);
    key = arena.floats(backward ? p.block_size * key_pitch : 0);
    value = arena.floats(backward ? 0 : p.block_size * value_pitch);
    scores = arena.floats(kSelectedBatch * block_pitch);
    grad_scores = arena.floats(backward ? kSelectedBatch * block_pitch : 0);
    maxima = arena.floats(kSelectedBatch);
    factors = arena.floats(kSelectedBatch);
    staging = arena.floats(kRows * max_of(key_pitch, value_pitch));
    return arena.used;
  }
};

HWY_INLINE std::size_t selected_scratch(const NsaProblem& p, std::int64_t tokens) {
  SelectedScratch scratch;
  return scratch.carve(p, tokens, nullptr);
}

// The keys of one block of the sequence.
struct SelectedBlock {
  std::int64_t begin = 0;  // first key
  std::int64_t keys = 0;
};

HWY_INLINE SelectedBlock selected_block(const NsaProblem& p, const NsaSequence& s, std::int64_t block) {
  const std::int64_t begin = block * p.block_size;
  return {begin, min_of(p.block_size, s.tokens - begin)};
}

// Rows of the block transposed, times `factor`: target[dim][key], zeros up to block_pitch.
HWY_INLINE void pack_block_transposed(const RowSource& source, const SelectedBlock& block, std::int64_t dims,
                                      float factor, std::int64_t pitch, float* staging, float* target) {
  for (std::int64_t j = 0; j < block.keys; j += kRows)
    pack_transposed(source, block.begin + j, min_of(kRows, block.keys - j), dims, factor, staging, target + j,
                    pitch);
  for (std::int64_t j = round_up(block.keys, kLanes); j < pitch; j += kLanes)
    for (std::int64_t c = 0; c < dims; ++c) hn::Store(hn::Zero(kFloat), kFloat, target + c * pitch + j);
}

// A block as the products read it; what the operation does not need is null.
struct PackedBlock {
  float *key_t, *value_t, *key, *value;
};

HWY_INLINE PackedBlock packed_block(const NsaProblem& p, const SelectedBuffers& b, std::int64_t kv_head,
                                    std::int64_t block) {
  const std::int64_t at = (kv_head - b.packs.first_head) * b.blocks + block;
  const auto part = [&](float* base, std::int64_t size) {
    return base == nullptr ? nullptr : base + at * size;
  };
  return {part(b.packs.key_t, round_up(p.head_dim, 4) * b.block_pitch),
          part(b.packs.value_t, round_up(p.head_dim_v, 4) * b.block_pitch),
          part(b.packs.key, p.block_size * b.key_pitch), part(b.packs.value, p.block_size * b.value_pitch)};
}

// Not inlined: three times it takes 27 KB of AVX-512 code.
static HWY_NOINLINE void pack_block(const NsaProblem& p, const RowSource& keys, const RowSource& values,
                                    const SelectedBlock& block, const SelectedBuffers& b, float* staging,
                                    const PackedBlock& target) {
  const float scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);
  pack_block_transposed(keys, block, p.head_dim, scale_log2, b.block_pitch, staging, target.key_t);
  if (p.operation == NsaOperation::selected_forward)
    return pack_rows(values, block.begin, block.keys, p.head_dim_v, target.value, b.value_pitch);
  pack_block_transposed(values, block, p.head_dim_v, 1.0f, b.block_pitch, staging, target.value_t);
  pack_rows(keys, block.begin, block.keys, p.head_dim, target.key, b.key_pitch);
}

HWY_INLINE void selected_pack(const NsaProblem& p, const NsaArguments& args, const SelectedBuffers& buffers,
                              const SelectedItem& item, void* memory) {
  const NsaSequence& s = item.sequence;
  const SelectedBlock block{item.row_begin, min_of(item.row_end, s.tokens) - item.row_begin};
  if (block.keys <= 0) return;  // nobody sees keys beyond the tokens
  const std::int64_t first = buffers.packs.first_head,
                     last = min_of(p.num_kv_heads, first + buffers.packs.heads);
  for (std::int64_t head = first; head < last; ++head)
    pack_block(p, row_source(args.key, s.batch, s.k_begin, head),
               row_source(args.value, s.batch, s.k_begin, head), block, buffers, static_cast<float*>(memory),
               packed_block(p, buffers, head, item.block_begin + item.row_begin / p.block_size));
}

// What the next block's turn reads of keys and values.
HWY_INLINE void fetch_block(const NsaProblem& p, const RowSource& keys, const RowSource& values,
                            const SelectedBlock& block, const SelectedBuffers& b, const PackedBlock& packed,
                            Fetch& ahead) {
  if (b.packs.heads == 0) {
    ahead.add(keys.row(block.begin), keys.row_bytes, p.head_dim * bytes_of(keys.dtype), block.keys);
    ahead.add(values.row(block.begin), values.row_bytes, p.head_dim_v * bytes_of(values.dtype), block.keys);
    return;
  }
  const auto add = [&](const float* rows, std::int64_t pitch, std::int64_t count) {
    if (rows != nullptr) ahead.add(rows, 4 * pitch, 4 * pitch, count);
  };
  add(packed.key_t, b.block_pitch, p.head_dim);
  add(packed.value_t, b.block_pitch, p.head_dim_v);
  add(packed.key, b.key_pitch, block.keys);
  add(packed.value, b.value_pitch, block.keys);
}

// Some of the (token, head) pairs that selected a block.
struct SelectedRows {
  std::int64_t count = 0;
  std::int32_t row[kSelectedBatch];  // in the chunk: token * group + head
  std::int32_t
      limit[kSelectedBatch];  // keys of the block that the row sees: all, or up to its own token; ascending

  // Keys that a row sees, at most `most`, in whole squares.
  HWY_INLINE std::int64_t keys(std::int64_t most) const {
    return min_of(most, round_up(limit[count - 1], kSquare));
  }
};

// The next batch of the pairs, from `begin` of `total` on. Rows that see half of the block at most, at its diagonal, are
// batches of their own: the products leave out the other half, 1.5 % of the branch.
HWY_INLINE void list_rows(const NsaProblem& p, const SelectedItem& item, const SelectedBlock& block,
                          const std::int32_t* tokens, std::int64_t begin, std::int64_t total,
                          SelectedRows& rows) {
  const std::int64_t first_position = item.row_begin + item.sequence.offset(), half = p.block_size / 2;
  const std::int64_t most = min_of(kSelectedBatch, total - begin);
  std::int64_t token = begin / p.group_size, g = begin % p.group_size;
  for (rows.count = 0; rows.count < most; ++rows.count) {
    const std::int64_t limit = min_of(block.keys, first_position + tokens[token] - block.begin + 1);
    if (limit > half && 2 * rows.count >= kSelectedBatch && rows.limit[rows.count - 1] <= half) return;
    rows.row[rows.count] = static_cast<std::int32_t>(tokens[token] * p.group_size + g);
    rows.limit[rows.count] = static_cast<std::int32_t>(limit);
    if (++g == p.group_size) {
      g = 0;
      ++token;
    }
  }
}

// Scores beyond the limit become -inf; returns the largest of the rest.
HWY_INLINE float mask_and_max(float* scores, std::int64_t limit, std::int64_t lanes) {
  const Float hidden = hn::Set(kFloat, kNegativeInfinity);
  Float m = hidden;
  std::int64_t j = 0;
  for (; j + kLanes <= limit; j += kLanes) m = hn::Max(m, hn::Load(kFloat, scores + j));
  for (; j < lanes; j += kLanes) {
    const auto seen =
        hn::Lt(hn::Iota(kInt, static_cast<std::int32_t>(j)), hn::Set(kInt, static_cast<std::int32_t>(limit)));
    const Float x = hn::IfThenElse(hn::RebindMask(kFloat, seen), hn::Load(kFloat, scores + j), hidden);
    hn::Store(x, kFloat, scores + j);
    m = hn::Max(m, x);
  }
  return hn::GetLane(hn::MaxOfLanes(kFloat, m));
}

// P replaces the scores of the first `lanes` keys; factors = 2^(m_old - m_new) per row.
HWY_INLINE void selected_softmax(const SelectedScratch& s, const SelectedRows& rows, std::int64_t lanes) {
  const std::int64_t count = rows.count;
  for (std::int64_t r = 0; r < count; ++r) {
    s.maxima[r] = mask_and_max(s.scores + r * s.block_pitch, rows.limit[r], lanes);
    s.factors[r] = s.row_max[rows.row[r]];
  }
  for (std::int64_t r = 0; r < count; r += kLanes) {  // lanes beyond count hold garbage that nobody reads
    const Float old_max = hn::Load(kFloat, s.factors + r);
    const Float new_max = hn::Max(old_max, hn::Load(kFloat, s.maxima + r));
    const Float empty = hn::Set(kFloat, kNegativeInfinity);
    const Float base = hn::IfThenElse(hn::Eq(new_max, empty), hn::Zero(kFloat), new_max);
    hn::Store(new_max, kFloat, s.maxima + r);
    hn::Store(exp2(hn::Sub(old_max, base)), kFloat, s.factors + r);
  }
  for (std::int64_t r = 0; r < count; ++r) {
    const float max = s.maxima[r];
    const Float base = hn::Set(kFloat, max == kNegativeInfinity ? 0.0f : max);
    Float sum = hn::Zero(kFloat);
    float* scores = s.scores + r * s.block_pitch;
    for (std::int64_t j = 0; j < lanes; j += kLanes) {
      const Float x = exp2(hn::Sub(hn::Load(kFloat, scores + j), base));
      hn::Store(x, kFloat, scores + j);
      sum = hn::Add(sum, x);
    }
    const std::int32_t row = rows.row[r];
    s.row_max[row] = max;
    s.row_sum[row] = s.row_sum[row] * s.factors[r] + hn::GetLane(hn::SumOfLanes(kFloat, sum));
  }
}

// out = O / l and lse = (m + log2 l) ln 2; a row that saw no key gets 0 and -inf.
HWY_INLINE void finish_selected(const NsaProblem& p, const NsaArguments& args, const SelectedItem& item,
                                const SelectedScratch& s) {
  const NsaSequence& sequence = item.sequence;
  const std::int64_t tokens = item.row_end - item.row_begin;
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    const std::int64_t head = item.kv_head * p.group_size + g;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t row = t * p.group_size + g;
      const double sum = s.row_sum[row];
      const float factor = sum == 0 ? 0.0f : static_cast<float>(1.0 / sum);
      store_rows(args.out, sequence.batch, sequence.q_begin, head, item.row_begin + t, 1, p.head_dim_v,
                 s.out + row * s.value_pitch, s.value_pitch, factor);
      if (!args.lse.present()) continue;
      const double lse_log2 =
          sum == 0 ? -__builtin_inf() : static_cast<double>(s.row_max[row]) + __builtin_log2(sum);
      static_cast<float*>(
          args.lse.data)[sequence.batch * args.lse.stride_batch + head * args.lse.stride_head +
                         (sequence.q_begin + item.row_begin + t) * args.lse.stride_row] =
          static_cast<float>(lse_log2 * kLn2);
    }
  }
}

HWY_INLINE void selected_forward(const NsaProblem& p, const NsaArguments& args,
                                 const SelectedBuffers& buffers, const SelectedItem& item,
                                 const SelectedLists& lists, void* memory) {
  SelectedScratch s;
  const std::int64_t tokens = item.row_end - item.row_begin, rows_in_chunk = tokens * p.group_size;
  s.carve(p, tokens, static_cast<char*>(memory));
  const NsaSequence& sequence = item.sequence;
  pack_chunk(p, args.query, item, p.head_dim, s.key_pitch, s.query);
  const RowSource keys = row_source(args.key, sequence.batch, sequence.k_begin, item.kv_head);
  const RowSource values = row_source(args.value, sequence.batch, sequence.k_begin, item.kv_head);
  clear_floats(s.out, rows_in_chunk * s.value_pitch);
  clear_floats(s.row_sum, rows_in_chunk);
  for (std::int64_t r = 0; r < rows_in_chunk; ++r) s.row_max[r] = kNegativeInfinity;

  const bool ahead_of_chunks = buffers.packs.heads > 0;
  const PackedBlock own{s.key_t, nullptr, nullptr, s.value};
  const auto block_at = [&](std::int64_t block) {
    return ahead_of_chunks ? packed_block(p, buffers, item.kv_head, item.block_begin + block) : own;
  };
  SelectedRows rows;
  const float* query_rows[kSelectedBatch];
  float* out_rows[kSelectedBatch];
  for (std::int64_t b = 0; b < lists.blocks; ++b) {
    const SelectedBlock block = selected_block(p, sequence, lists.block[b]);
    const PackedBlock packed = block_at(lists.block[b]);
    if (!ahead_of_chunks) pack_block(p, keys, values, block, buffers, s.staging, packed);
    const std::int64_t next = lists.block[min_of(b + 1, lists.blocks - 1)];
    Fetch ahead;
    fetch_block(p, keys, values, selected_block(p, sequence, next), buffers, block_at(next), ahead);
    const std::int64_t total = (lists.begin[b + 1] - lists.begin[b]) * p.group_size;
    for (std::int64_t begin = 0; begin < total; begin += rows.count) {
      list_rows(p, item, block, lists.tokens + lists.begin[b], begin, total, rows);
      const std::int64_t lanes = rows.keys(s.block_pitch), keys_seen = rows.keys(block.keys);
      for (std::int64_t r = 0; r < rows.count; ++r) {
        query_rows[r] = s.query + rows.row[r] * s.key_pitch;
        out_rows[r] = s.out + rows.row[r] * s.value_pitch;
      }
      gemm<Init::zero>(
          GemmListedB{packed.key_t, s.block_pitch, query_rows, p.head_dim, s.scores, s.block_pitch, &ahead},
          rows.count, keys_seen);
      selected_softmax(s, rows, lanes);
      gemm<Init::scale_rows>(
          GemmListedC{packed.value, s.value_pitch, s.scores, s.block_pitch, keys_seen, out_rows, &ahead},
          rows.count, p.head_dim_v, s.factors);
    }
  }
  finish_selected(p, args, item, s);
}

// ---------------------------------------------------------------------------------------------- backward

HWY_INLINE void selected_row_statistics(const NsaProblem& p, const NsaArguments& args,
                                        const SelectedItem& item, const SelectedScratch& s) {
  const NsaSequence& sequence = item.sequence;
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    const std::int64_t head = item.kv_head * p.group_size + g;
    const RowSource out = row_source(args.out, sequence.batch, sequence.q_begin, head);
    const std::int64_t tokens = item.row_end - item.row_begin;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t row = t * p.group_size + g;
      if (t + kRowsAhead < tokens) fetch_row(out, item.row_begin + t + kRowsAhead, p.head_dim_v);
      load_rows(args.out, sequence.batch, sequence.q_begin, head, item.row_begin + t, 1, p.head_dim_v,
                s.staging, 0);
      s.dots[row] = dot_row(s.staging, s.grad_out + row * s.value_pitch, p.head_dim_v);
      const float lse = static_cast<const float*>(
          args.lse.data)[sequence.batch * args.lse.stride_batch + head * args.lse.stride_head +
                         (sequence.q_begin + item.row_begin + t) * args.lse.stride_row];
      const double exact = static_cast<double>(lse) * kLog2E;
      s.row_max[row] = static_cast<float>(exact);
      s.row_sum[row] =
          __builtin_isfinite(lse) ? static_cast<float>(exact - static_cast<double>(s.row_max[row])) : 0.0f;
    }
  }
}

// P = 2^(S - lse) over the scores, dS = P (dP - dot) over the products; 0 beyond the limit of the row.
HWY_INLINE void selected_grad_scores(const SelectedScratch& s, const SelectedRows& rows, std::int64_t lanes) {
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const std::int32_t row = rows.row[r];
    const Float lse = hn::Set(kFloat, s.row_max[row]), lse_low = hn::Set(kFloat, s.row_sum[row]);
    const Float dot = hn::Set(kFloat, s.dots[row]);
    float* scores = s.scores + r * s.block_pitch;
    float* grads = s.grad_scores + r * s.block_pitch;
    for (std::int64_t j = 0; j < lanes; j += kLanes) {
      Float x = exp2(hn::Sub(hn::Sub(hn::Load(kFloat, scores + j), lse), lse_low));
      Float g = hn::Mul(x, hn::Sub(hn::Load(kFloat, grads + j), dot));
      if (j + kLanes > rows.limit[r]) {
        const auto seen = hn::RebindMask(
            kFloat, hn::Lt(hn::Iota(kInt, static_cast<std::int32_t>(j)), hn::Set(kInt, rows.limit[r])));
        x = hn::IfThenElseZero(seen, x);
        g = hn::IfThenElseZero(seen, g);
      }
      hn::Store(x, kFloat, scores + j);
      hn::Store(g, kFloat, grads + j);
    }
  }
}

template <class Product>
HWY_INLINE void add_or_start(bool start, const Product& product, std::int64_t n_count, std::int64_t v_count) {
  if (start)
    gemm<Init::zero>(product, n_count, v_count);
  else
    gemm<Init::add>(product, n_count, v_count);
}

HWY_INLINE void selected_backward(const NsaProblem& p, const NsaArguments& args,
                                  const SelectedBuffers& buffers, const SelectedItem& item,
                                  const SelectedLists& lists, void* memory) {
  SelectedScratch s;
  const std::int64_t tokens = item.row_end - item.row_begin;
  s.carve(p, tokens, static_cast<char*>(memory));
  const NsaSequence& sequence = item.sequence;
  pack_chunk(p, args.query, item, p.head_dim, s.key_pitch, s.query);
  pack_chunk(p, args.grad_out, item, p.head_dim_v, s.value_pitch, s.grad_out);
  const RowSource keys = row_source(args.key, sequence.batch, sequence.k_begin, item.kv_head);
  const RowSource values = row_source(args.value, sequence.batch, sequence.k_begin, item.kv_head);
  selected_row_statistics(p, args, item, s);
  clear_floats(s.grad_query, tokens * p.group_size * s.key_pitch);

  const std::int64_t copy = item.segment * p.num_kv_heads + item.kv_head;
  const std::int64_t first_key = p.packed ? sequence.k_begin : sequence.batch * p.max_seqlen_k;
  const bool ahead_of_chunks = buffers.packs.heads > 0;
  const PackedBlock own{s.key_t, s.value_t, s.key, nullptr};
  const auto block_at = [&](std::int64_t block) {
    return ahead_of_chunks ? packed_block(p, buffers, item.kv_head, item.block_begin + block) : own;
  };
  SelectedRows rows;
  const float* query_rows[kSelectedBatch];
  const float* grad_out_rows[kSelectedBatch];
  float* grad_query_rows[kSelectedBatch];
  for (std::int64_t b = 0; b < lists.blocks; ++b) {
    const SelectedBlock block = selected_block(p, sequence, lists.block[b]);
    const PackedBlock packed = block_at(lists.block[b]);
    if (!ahead_of_chunks) pack_block(p, keys, values, block, buffers, s.staging, packed);
    const std::int64_t slot = copy * buffers.key_rows + first_key + block.begin;
    float* grad_key = buffers.grad_key + slot * buffers.key_pitch;
    float* grad_value = buffers.grad_value + slot * buffers.value_pitch;
    const std::int64_t next_block = lists.block[min_of(b + 1, lists.blocks - 1)];
    const SelectedBlock next = selected_block(p, sequence, next_block);
    const std::int64_t next_slot = slot + next.begin - block.begin;
    Fetch ahead;
    fetch_block(p, keys, values, next, buffers, block_at(next_block), ahead);
    ahead.add(buffers.grad_value + next_slot * buffers.value_pitch, 4 * buffers.value_pitch,
              4 * buffers.value_pitch, next.keys);
    ahead.add(buffers.grad_key + next_slot * buffers.key_pitch, 4 * buffers.key_pitch, 4 * buffers.key_pitch,
              next.keys);
    std::uint8_t& touched = buffers.touched[copy * buffers.blocks + item.block_begin + lists.block[b]];
    const std::int64_t total = (lists.begin[b + 1] - lists.begin[b]) * p.group_size;
    for (std::int64_t begin = 0; begin < total; begin += rows.count) {
      list_rows(p, item, block, lists.tokens + lists.begin[b], begin, total, rows);
      const std::int64_t lanes = rows.keys(s.block_pitch), keys_seen = rows.keys(block.keys);
      for (std::int64_t r = 0; r < rows.count; ++r) {
        query_rows[r] = s.query + rows.row[r] * s.key_pitch;
        grad_out_rows[r] = s.grad_out + rows.row[r] * s.value_pitch;
        grad_query_rows[r] = s.grad_query + rows.row[r] * s.key_pitch;
      }
      gemm<Init::zero>(
          GemmListedB{packed.key_t, s.block_pitch, query_rows, p.head_dim, s.scores, s.block_pitch, &ahead},
          rows.count, lanes);
      gemm<Init::zero>(GemmListedB{packed.value_t, s.block_pitch, grad_out_rows, p.head_dim_v, s.grad_scores,
                                   s.block_pitch, &ahead},
                       rows.count, lanes);
      selected_grad_scores(s, rows, lanes);
      const bool start = touched == 0;
      if (start) {  // what the products do not reach
        const std::int64_t left = block.keys - keys_seen;
        clear_floats(grad_value + keys_seen * buffers.value_pitch, left * buffers.value_pitch);
        clear_floats(grad_key + keys_seen * buffers.key_pitch, left * buffers.key_pitch);
      }
      add_or_start(start,
                   GemmListedA{grad_out_rows, s.scores, 1, s.block_pitch, rows.count, grad_value,
                               buffers.value_pitch, &ahead},
                   keys_seen, p.head_dim_v);
      add_or_start(start,
                   GemmListedA{query_rows, s.grad_scores, 1, s.block_pitch, rows.count, grad_key,
                               buffers.key_pitch, &ahead},
                   keys_seen, p.head_dim);
      gemm<Init::add>(GemmListedC{packed.key, s.key_pitch, s.grad_scores, s.block_pitch, keys_seen,
                                  grad_query_rows, &ahead},
                      rows.count, p.head_dim);
      touched = 1;
    }
  }
  for (std::int64_t g = 0; g < p.group_size; ++g)
    store_rows(args.grad_query, sequence.batch, sequence.q_begin, item.kv_head * p.group_size + g,
               item.row_begin, tokens, p.head_dim, s.grad_query + g * s.key_pitch, s.key_pitch * p.group_size,
               static_cast<float>(p.softmax_scale));
}

// Keys [row_begin, row_end) of one block: the segments added in order, zeros where none touched it.
HWY_INLINE void selected_finish(const NsaProblem& p, const NsaArguments& args, const SelectedBuffers& buffers,
                                const SelectedItem& item, void* memory) {
  const NsaSequence& sequence = item.sequence;
  const std::int64_t first_key = p.packed ? sequence.k_begin : sequence.batch * p.max_seqlen_k;
  const std::int64_t block = item.block_begin + item.row_begin / p.block_size;
  float* sum = static_cast<float*>(memory);
  const auto finish = [&](const Operand& target, const float* grads, std::int64_t pitch, std::int64_t dims,
                          float factor) HWY_ATTR {
    for (std::int64_t key = item.row_begin; key < item.row_end; ++key) {
      clear_floats(sum, pitch);
      for (std::int64_t segment = 0; segment < buffers.segments; ++segment) {
        const std::int64_t copy = segment * p.num_kv_heads + item.kv_head;
        if (key < sequence.tokens && buffers.touched[copy * buffers.blocks + block] != 0)
          add_row(grads + (copy * buffers.key_rows + first_key + key) * pitch, 1.0f, dims, sum);
      }
      store_rows(target, sequence.batch, sequence.k_begin, item.kv_head, key, 1, dims, sum, pitch, factor);
    }
  };
  finish(args.grad_key, buffers.grad_key, buffers.key_pitch, p.head_dim, static_cast<float>(p.softmax_scale));
  finish(args.grad_value, buffers.grad_value, buffers.value_pitch, p.head_dim_v, 1.0f);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
