// SPDX-License-Identifier: Apache-2.0
// NSA compression as matrix products over overlapping rows, without im2col: a window of l tokens of one head, packed as
// l * head_dim floats, is one row of B at distance s * head_dim from the next.
//
//   forward        Y[i][:]        = sum over (kappa, d) of X[i s + kappa][d] W[kappa d][:]   + bias
//   grad_x         dX[a s + r][:] = sum over j < l / s of dY[a - j] W[r + j s]^T             s tokens are one row of C
//   grad_weight    dW[kappa]      = sum over i of (X[i s + kappa] + pe[kappa])^T dY[i]
//
// mean and weighted are the same with one factor per position in place of a matrix.
#pragma once

#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/nsa_table.h"
#include "backend/cpu/simd/scores-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

HWY_INLINE std::int64_t compress_pitch(const NsaProblem& p) { return round_up(p.head_dim, 16); }
HWY_INLINE std::int64_t compress_group_pitch(const NsaProblem& p) {
  return round_up(p.compress_stride * p.head_dim, 16);
}

// Element [head, row, dim] of weight, pe or their gradients.
HWY_INLINE std::int64_t parameter_index(const Operand& o, std::int64_t head, std::int64_t row,
                                        std::int64_t dim) {
  return head * o.stride_head + row * o.stride_row + dim * o.stride_dim;
}

HWY_INLINE void load_parameter_row(const Operand& o, std::int64_t head, std::int64_t row, std::int64_t dims,
                                   float* target) {
  if (o.stride_dim == 1) {
    RowSource source = row_source(o, 0, 0, head);
    pack_rows(source, row, 1, dims, target, 0);
    return;
  }
  for (std::int64_t d = 0; d < round_up(dims, kLanes); ++d)
    target[d] = d < dims ? load_scalar(o.data, o.dtype, parameter_index(o, head, row, d)) : 0.0f;
}

HWY_INLINE float position_factor(const NsaProblem& p, const float* weight, std::int64_t position) {
  return p.kind == nsa::CompressKind::mean ? static_cast<float>(1.0 / static_cast<double>(p.compress_block))
                                           : weight[position];
}

// target += factor * source
HWY_INLINE void add_row(const float* source, float factor, std::int64_t dims, float* target) {
  const Float f = hn::Set(kFloat, factor);
  for (std::int64_t d = 0; d < dims; d += kLanes)
    hn::Store(hn::MulAdd(f, hn::LoadU(kFloat, source + d), hn::Load(kFloat, target + d)), kFloat, target + d);
}

HWY_INLINE void clear_floats(float* data, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) data[i] = 0;
}

HWY_INLINE float dot_row(const float* a, const float* b, std::int64_t dims) {
  Float sum = hn::Zero(kFloat);
  for (std::int64_t d = 0; d < dims; d += kLanes)
    sum = hn::MulAdd(hn::LoadU(kFloat, a + d), hn::LoadU(kFloat, b + d), sum);
  return hn::GetLane(hn::SumOfLanes(kFloat, sum));
}

// Rows of x or of the compressed tensors; grad_out may have any strides.
HWY_INLINE void load_rows(const Operand& o, std::int64_t batch, std::int64_t first, std::int64_t head,
                          std::int64_t begin, std::int64_t count, std::int64_t dims, float* target,
                          std::int64_t pitch) {
  const RowSource source = row_source(o, batch, first, head);
  if (o.stride_dim == 1) {
    pack_rows(source, begin, count, dims, target, pitch);
    return;
  }
  for (std::int64_t r = 0; r < count; ++r)
    for (std::int64_t d = 0; d < round_up(dims, kLanes); ++d)
      target[r * pitch + d] = d < dims ? load_scalar(source.row(begin + r), o.dtype, d * o.stride_dim) : 0.0f;
}

HWY_INLINE void store_rows(const Operand& o, std::int64_t batch, std::int64_t first, std::int64_t head,
                           std::int64_t begin, std::int64_t count, std::int64_t dims, const float* source,
                           std::int64_t pitch, float factor = 1.0f) {
  const RowSource target = row_source(o, batch, first, head);
  with_element_type(o.dtype, [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    for (std::int64_t r = 0; r < count; ++r)
      narrow_row(source + r * pitch, dims, factor,
                 reinterpret_cast<T*>(const_cast<char*>(target.row(begin + r))));
  });
}

// The buffers of one key head.
struct CompressHead {
  float *weight, *weight_t, *bias, *grad_sum;
};

HWY_INLINE CompressHead compress_head(const NsaProblem& p, const CompressBuffers& b, std::int64_t kv_head) {
  const bool linear = p.kind == nsa::CompressKind::linear;
  const std::int64_t rows = p.compress_block * p.head_dim;
  const std::int64_t weights = linear ? (rows + 4) * compress_pitch(p) : round_up(p.compress_block, 16);
  const std::int64_t transposed =
      p.compress_block / p.compress_stride * round_up(p.head_dim, 4) * compress_group_pitch(p);
  const auto at = [&](float* base, std::int64_t size) {
    return base == nullptr ? nullptr : base + kv_head * size;
  };
  return {at(b.weight, weights), at(b.weight_t, transposed), at(b.bias, compress_pitch(p)),
          at(b.grad_sum, compress_pitch(p))};
}

// Parameters of one key head in float, the bias, and for the backward the transposed slices and the sum of grad_out.
HWY_INLINE void compress_prepare(const NsaProblem& p, const NsaArguments& args,
                                 const CompressBuffers& buffers, std::int64_t kv_head, void* memory) {
  const CompressHead head = compress_head(p, buffers, kv_head);
  const std::int64_t l = p.compress_block, d = p.head_dim, pitch = compress_pitch(p);
  float* row = static_cast<float*>(memory);
  if (p.kind == nsa::CompressKind::linear) {
    for (std::int64_t r = 0; r < l * d; ++r) {
      clear_floats(head.weight + r * pitch, pitch);
      load_parameter_row(args.weight, kv_head, r, d, head.weight + r * pitch);
    }
    clear_floats(head.weight + l * d * pitch, 4 * pitch);
  } else if (p.kind == nsa::CompressKind::weighted) {
    for (std::int64_t r = 0; r < l; ++r)
      head.weight[r] =
          load_scalar(args.weight.data, args.weight.dtype, parameter_index(args.weight, kv_head, r, 0));
  }
  if (head.bias != nullptr) {
    clear_floats(head.bias, pitch);
    for (std::int64_t position = 0; position < l; ++position) {
      load_parameter_row(args.pe, kv_head, position, d, row);
      if (p.kind == nsa::CompressKind::linear)
        gemm<Init::add>(Gemm{head.weight + position * d * pitch, pitch, row, 0, 1, d, head.bias, pitch}, 1,
                        d);
      else
        add_row(row, position_factor(p, head.weight, position), d, head.bias);
    }
  }
  if (p.operation != NsaOperation::compress_backward) return;
  if (p.kind == nsa::CompressKind::linear) {
    const std::int64_t slices = l / p.compress_stride, group = p.compress_stride * d;
    for (std::int64_t j = 0; j < slices; ++j)
      transpose(head.weight + j * group * pitch, pitch, group, d,
                head.weight_t + j * round_up(d, 4) * compress_group_pitch(p), compress_group_pitch(p));
  }
  // Sums of up to 128 windows join the total one by one: less rounding than one long chain.
  float* part = row + pitch;
  clear_floats(head.grad_sum, pitch);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const NsaSequence s = nsa_sequence(p, args, b);
    for (std::int64_t begin = 0; begin < s.compressed; begin += kChain) {
      clear_floats(part, pitch);
      for (std::int64_t i = begin; i < min_of(s.compressed, begin + kChain); ++i) {
        load_rows(args.grad_out, s.batch, s.k_begin, kv_head, i, 1, d, row, 0);
        add_row(row, 1.0f, d, part);
      }
      add_row(part, 1.0f, d, head.grad_sum);
    }
  }
}

inline constexpr std::int64_t kSharedPositions = 2;  // of a window, whose grad_weight is one item

struct CompressScratch {
  float *x, *y;
  std::int64_t y_pitch;

  HWY_INLINE std::size_t carve(const NsaProblem& p, char* base) {
    Arena arena{base};
    const std::int64_t windows = windows_per_item(p), l = p.compress_block, s = p.compress_stride;
    const bool backward = p.operation == NsaOperation::compress_backward;
    y_pitch = compress_pitch(p);
    // Rows of x at distance head_dim, so that windows overlap; a row is written in whole vectors.
    const std::int64_t rows =
        backward ? max_of(kChain + kSharedPositions - 1, windows + l / s) : (windows - 1) * s + l;
    x = arena.floats(rows * round_up(p.head_dim, 16) + 16);
    const std::int64_t results =
        backward ? max_of(windows * compress_group_pitch(p),
                          (kChain + kSharedPositions * p.head_dim + 2) * compress_pitch(p))
                 : windows * compress_pitch(p);
    y = arena.floats(max_of(results, 2 * compress_pitch(p)));
    return arena.used;
  }
};

HWY_INLINE std::size_t compress_scratch(const NsaProblem& p) {
  CompressScratch scratch;
  return scratch.carve(p, nullptr);
}

HWY_INLINE void compress(const NsaProblem& p, const NsaArguments& args, const CompressBuffers& buffers,
                         const CompressItem& item, void* memory) {
  CompressScratch scratch;
  scratch.carve(p, static_cast<char*>(memory));
  const CompressHead head = compress_head(p, buffers, item.kv_head);
  const NsaSequence& s = item.sequence;
  const std::int64_t l = p.compress_block, stride = p.compress_stride, d = p.head_dim;
  const std::int64_t windows = item.end - item.begin, pitch = compress_pitch(p);
  const std::int64_t rows = (windows - 1) * stride + l;
  load_rows(args.key, s.batch, s.q_begin, item.kv_head, item.begin * stride, rows, d, scratch.x, d);
  for (std::int64_t i = 0; i < windows; ++i)
    for (std::int64_t c = 0; c < pitch; ++c)
      scratch.y[i * pitch + c] = head.bias != nullptr ? head.bias[c] : 0.0f;
  if (p.kind == nsa::CompressKind::linear) {
    gemm<Init::add>(Gemm{head.weight, pitch, scratch.x, stride * d, 1, l * d, scratch.y, pitch}, windows, d);
  } else {
    for (std::int64_t i = 0; i < windows; ++i)
      for (std::int64_t position = 0; position < l; ++position)
        add_row(scratch.x + (i * stride + position) * d, position_factor(p, head.weight, position), d,
                scratch.y + i * pitch);
  }
  store_rows(args.out, s.batch, s.k_begin, item.kv_head, item.begin, windows, d, scratch.y, pitch);
}

// Groups of `stride` tokens [begin, end) of grad_x; group a takes from windows a - l / s + 1 to a.
HWY_INLINE void compress_grad_x(const NsaProblem& p, const NsaArguments& args, const CompressBuffers& buffers,
                                const CompressItem& item, void* memory) {
  CompressScratch scratch;
  scratch.carve(p, static_cast<char*>(memory));
  const CompressHead head = compress_head(p, buffers, item.kv_head);
  const NsaSequence& s = item.sequence;
  const std::int64_t stride = p.compress_stride, d = p.head_dim, reach = p.compress_block / stride;
  const std::int64_t groups = item.end - item.begin, pitch = compress_pitch(p);
  const std::int64_t group_pitch = compress_group_pitch(p);
  const std::int64_t first = item.begin - (reach - 1);  // window of row 0 of the packed gradients
  float* grads = scratch.x;
  for (std::int64_t i = 0; i < groups + reach - 1; ++i) {
    const std::int64_t window = first + i;
    if (window >= 0 && window < s.compressed)
      load_rows(args.grad_out, s.batch, s.k_begin, item.kv_head, window, 1, d, grads + i * pitch, 0);
    else
      clear_floats(grads + i * pitch, pitch);
  }
  const bool linear = p.kind == nsa::CompressKind::linear;
  if (!linear) clear_floats(scratch.y, groups * group_pitch);
  for (std::int64_t j = 0; j < reach; ++j) {
    const float* rows = grads + (reach - 1 - j) * pitch;
    if (linear) {
      const Gemm product{head.weight_t + j * round_up(d, 4) * group_pitch,
                         group_pitch,
                         rows,
                         pitch,
                         1,
                         d,
                         scratch.y,
                         group_pitch};
      if (j == 0)
        gemm<Init::zero>(product, groups, stride * d);
      else
        gemm<Init::add>(product, groups, stride * d);
      continue;
    }
    for (std::int64_t a = 0; a < groups; ++a)
      for (std::int64_t r = 0; r < stride; ++r) {
        const float factor = position_factor(p, head.weight, r + j * stride);
        float* target = scratch.y + a * group_pitch + r * d;
        for (std::int64_t c = 0; c < d; ++c) target[c] += factor * rows[a * pitch + c];
      }
  }
  for (std::int64_t a = 0; a < groups; ++a) {
    const std::int64_t token = (item.begin + a) * stride;
    store_rows(args.grad_key, s.batch, s.q_begin, item.kv_head, token, min_of(stride, s.rows - token), d,
               scratch.y + a * group_pitch, d);
  }
}

// Positions `first` and, where the window has it, `first` + stride: window i reads at the second what window i + 1 reads
// at the first, so both share the packed rows of x and of grad_out.
HWY_INLINE void compress_grad_weight(const NsaProblem& p, const NsaArguments& args,
                                     const CompressBuffers& buffers, std::int64_t kv_head, std::int64_t first,
                                     void* memory) {
  CompressScratch scratch;
  scratch.carve(p, static_cast<char*>(memory));
  const CompressHead head = compress_head(p, buffers, kv_head);
  const std::int64_t stride = p.compress_stride, d = p.head_dim, pitch = compress_pitch(p);
  const std::int64_t positions = first + stride < p.compress_block ? 2 : 1;
  const bool linear = p.kind == nsa::CompressKind::linear;
  float* grads = scratch.y;                         // [kChain][pitch]
  float* sums = grads + kChain * pitch;             // [positions][head_dim][pitch]
  float* pe = sums + kSharedPositions * d * pitch;  // [pitch]
  float* row = pe + pitch;                          // [pitch]
  double factor_grads[kSharedPositions] = {};
  if (linear) clear_floats(sums, positions * d * pitch);
  if (args.grad_weight.present()) {
    for (std::int64_t b = 0; b < p.batch; ++b) {
      const NsaSequence s = nsa_sequence(p, args, b);
      RowSource x = row_source(args.key, s.batch, s.q_begin, kv_head);
      x.base += first * x.row_bytes;  // window i reads its row at `first`: every stride-th row
      x.row_bytes *= stride;
      for (std::int64_t begin = 0; begin < s.compressed; begin += kChain) {
        const std::int64_t count = min_of(kChain, s.compressed - begin);
        pack_rows(x, begin, count + positions - 1, d, scratch.x, pitch);
        load_rows(args.grad_out, s.batch, s.k_begin, kv_head, begin, count, d, grads, pitch);
        for (std::int64_t n = 0; n < positions; ++n) {
          const float* of_position = scratch.x + n * pitch;
          if (linear) {
            gemm<Init::add>(Gemm{grads, pitch, of_position, 1, pitch, count, sums + n * d * pitch, pitch}, d,
                            d);
            continue;
          }
          float part = 0;
          for (std::int64_t i = 0; i < count; ++i)
            part += dot_row(of_position + i * pitch, grads + i * pitch, d);
          factor_grads[n] += static_cast<double>(part);
        }
      }
    }
  }
  for (std::int64_t n = 0; n < positions; ++n) {
    const std::int64_t position = first + n * stride;
    if (args.pe.present()) load_parameter_row(args.pe, kv_head, position, d, pe);
    if (linear) {
      float* sum = sums + n * d * pitch;
      if (args.pe.present())
        for (std::int64_t c = 0; c < d; ++c) add_row(head.grad_sum, pe[c], d, sum + c * pitch);
      store_rows(args.grad_weight, 0, 0, kv_head, position * d, d, d, sum, pitch);
    } else if (args.grad_weight.present()) {
      if (args.pe.present()) factor_grads[n] += static_cast<double>(dot_row(pe, head.grad_sum, d));
      store_scalar(static_cast<float>(factor_grads[n]), args.grad_weight.data, args.grad_weight.dtype,
                   parameter_index(args.grad_weight, kv_head, position, 0));
    }
    if (!args.grad_pe.present()) continue;
    if (linear) {
      for (std::int64_t c = 0; c < d; ++c)
        row[c] = dot_row(head.weight + (position * d + c) * pitch, head.grad_sum, d);
    } else {
      clear_floats(row, pitch);
      add_row(head.grad_sum, position_factor(p, head.weight, position), d, row);
    }
    store_rows(args.grad_pe, 0, 0, kv_head, position, 1, d, row, pitch);
  }
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
