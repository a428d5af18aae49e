// SPDX-License-Identifier: Apache-2.0
// What C++ tests share: tensors between guard bands, poison, seeded random numbers, and one attention call
// with all its tensors, described by an AttentionSetup and run through the public API.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numbers>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cpu/reference_scalar.h"
#include "fsa/fsa.h"

namespace fsa::test {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The same numbers on every platform, which std::normal_distribution does not promise.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {  // splitmix64
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }  // in (0, 1)
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * std::numbers::pi * uniform()); }
  std::int64_t below(std::int64_t limit) {
    return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(limit));
  }

 private:
  std::uint64_t state_;
};

// A tensor that owns its memory. Float tensors start as NaN, int32 tensors as a pattern; 256 bytes on each
// side must stay as they are. A default-constructed one is absent.
class Buffer {
 public:
  static constexpr std::size_t kGuard = 256;
  static constexpr unsigned char kPattern = 0xa5;

  Buffer() = default;
  Buffer(DType dtype, const std::vector<std::int64_t>& shape) : Buffer(dtype, shape, row_major(shape)) {}
  Buffer(DType dtype, const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
    view_.dtype = dtype;
    view_.rank = static_cast<std::int32_t>(shape.size());
    std::int64_t extent = 1;
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      view_.shape[axis] = shape[axis];
      view_.strides[axis] = strides[axis];
      extent = shape[axis] == 0 || extent == 0 ? 0 : extent + (shape[axis] - 1) * strides[axis];
    }
    bytes_.assign(2 * kGuard + static_cast<std::size_t>(extent) * size_of(dtype), kPattern);
    if (dtype != DType::int32)
      for (std::int64_t i = 0; i < extent; ++i) store_scalar(dtype, data(), i, kNan);
  }

  static std::vector<std::int64_t> row_major(const std::vector<std::int64_t>& shape) {
    std::vector<std::int64_t> strides(shape.size(), 1);
    for (std::size_t axis = shape.size(); axis-- > 1;)
      strides[axis - 1] = strides[axis] * std::max<std::int64_t>(shape[axis], 1);
    return strides;
  }

  static Buffer ints(const std::vector<std::int32_t>& values, std::vector<std::int64_t> shape = {}) {
    if (shape.empty()) shape = {static_cast<std::int64_t>(values.size())};
    Buffer buffer(DType::int32, shape);
    if (!values.empty()) std::memcpy(buffer.data(), values.data(), values.size() * 4);
    return buffer;
  }

  bool present() const { return view_.present(); }
  void* data() { return bytes_.data() + kGuard; }
  const void* data() const { return bytes_.data() + kGuard; }
  DType dtype() const { return view_.dtype; }
  std::int64_t numel() const { return view_.numel(); }
  std::int64_t shape(int axis) const { return view_.shape[axis]; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  TensorView view() const {
    TensorView view = view_;
    if (present()) view.data = const_cast<unsigned char*>(bytes_.data()) + kGuard;
    return view;
  }

  template <class... Index>
  double at(Index... index) const {
    return load(offset({static_cast<std::int64_t>(index)...}));
  }
  template <class... Index>
  void set(double value, Index... index) {
    store(offset({static_cast<std::int64_t>(index)...}), value);
  }

  // The i-th element in row-major order, whatever the strides are.
  double get(std::int64_t i) const { return load(offset_of_element(i)); }
  void put(std::int64_t i, double value) { store(offset_of_element(i), value); }

  void fill(double value) {
    for (std::int64_t i = 0; i < numel(); ++i) put(i, value);
  }
  void fill_normal(Random& random, double scale = 1) {
    for (std::int64_t i = 0; i < numel(); ++i) put(i, scale * random.normal());
  }
  void poison() {
    if (!present()) return;
    for (std::int64_t i = 0; i < numel(); ++i)
      if (dtype() == DType::int32)
        store(offset_of_element(i), 0x5a5a5a5a);
      else
        put(i, kNan);
  }

  bool guards_intact() const {
    for (std::size_t i = 0; i < kGuard && present(); ++i)
      if (bytes_[i] != kPattern || bytes_[bytes_.size() - 1 - i] != kPattern) return false;
    return true;
  }

 private:
  std::int64_t offset_of_element(std::int64_t i) const {
    std::int64_t result = 0;
    for (int axis = view_.rank - 1; axis >= 0; --axis) {
      result += i % view_.shape[axis] * view_.strides[axis];
      i /= view_.shape[axis];
    }
    return result;
  }
  std::int64_t offset(std::initializer_list<std::int64_t> index) const {
    if (static_cast<std::int32_t>(index.size()) != view_.rank)
      throw std::logic_error("wrong number of indices");
    std::int64_t result = 0;
    int axis = 0;
    for (std::int64_t i : index) result += i * view_.strides[axis++];
    return result;
  }
  double load(std::int64_t i) const {
    if (dtype() == DType::int32) return static_cast<const std::int32_t*>(data())[i];
    return load_scalar(dtype(), data(), i);
  }
  void store(std::int64_t i, double value) {
    if (dtype() == DType::int32)
      static_cast<std::int32_t*>(data())[i] = static_cast<std::int32_t>(value);
    else
      store_scalar(dtype(), data(), i, value);
  }

  std::vector<unsigned char> bytes_;
  TensorView view_;
};

// Largest |a - b|; equal infinities and NaN against NaN count as 0, any other mismatch of those as infinity.
inline double max_difference(const Buffer& a, const Buffer& b) {
  if (a.numel() != b.numel()) return kInf;
  double worst = 0;
  for (std::int64_t i = 0; i < a.numel(); ++i) {
    const double x = a.get(i), y = b.get(i);
    if (x == y || (std::isnan(x) && std::isnan(y))) continue;
    const double difference = std::abs(x - y);
    worst = std::max(worst, std::isnan(difference) ? kInf : difference);
  }
  return worst;
}

inline bool same_bytes(const Buffer& a, const Buffer& b) { return a.bytes() == b.bytes(); }

struct AttentionSetup {
  std::int64_t batch = 1;
  std::int64_t seqlen_q = 1;  // decode: ignored
  std::int64_t seqlen_k = 1;
  std::int64_t num_heads = 1;
  std::int64_t num_kv_heads = 1;
  std::int64_t head_dim = 2;
  std::int64_t head_dim_v = 2;
  DType dtype = DType::float64;
  AttentionOptions options = {};
  bool gate = false;
  bool sink = false;
  bool alibi = false;
  std::vector<std::int32_t> cu_seqlens_q = {};  // given: packed, with `spare` tokens behind the last sequence
  std::vector<std::int32_t> cu_seqlens_k = {};
  std::int64_t spare = 0;
  std::vector<std::int32_t> seqused_q = {};
  std::vector<std::int32_t> seqused_k = {};
  std::vector<std::array<std::int32_t, 4>> window_sizes = {};
  std::vector<std::int32_t> gather_kv_indices = {};  // [batch, top_k]
  std::uint64_t seed = 1;
};

// All tensors of one call (batched or packed keys; paged ones are made by `paged`). Inputs are normal,
// outputs NaN.
struct Attention {
  AttentionSetup setup;
  Buffer query, key, value, alpha, delta, sink, alibi_slopes;
  Buffer cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, window_sizes, page_table, gather_kv_indices;
  Buffer kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_begin, partial_bits;
  std::int64_t block_rows = 128, block_keys = 128;  // of the block mask; test_block_mask.h makes one
  Buffer out, lse, skip_map;
  Buffer grad_out, grad_lse;  // inputs of backward; absent until somebody makes them
  Buffer grad_query, grad_key, grad_value, grad_alpha, grad_delta, grad_sink;

  bool packed_q() const { return !setup.cu_seqlens_q.empty(); }
  bool packed_k() const { return !setup.cu_seqlens_k.empty(); }
  std::int64_t group_size() const { return setup.num_heads / setup.num_kv_heads; }
  DType lse_dtype() const { return setup.dtype == DType::float64 ? DType::float64 : DType::float32; }

  static Attention prefill(const AttentionSetup& setup) { return Attention(setup, false); }
  static Attention for_decode(const AttentionSetup& setup) { return Attention(setup, true); }

  AttentionInputs inputs() const {
    return {.query = query.view(),
            .key = key.view(),
            .value = value.view(),
            .cu_seqlens_q = cu_seqlens_q.view(),
            .cu_seqlens_k = cu_seqlens_k.view(),
            .seqused_q = seqused_q.view(),
            .seqused_k = seqused_k.view(),
            .page_table = page_table.view(),
            .window_sizes = window_sizes.view(),
            .alibi_slopes = alibi_slopes.view(),
            .sink = sink.view(),
            .alpha = alpha.view(),
            .delta = delta.view(),
            .gather_kv_indices = gather_kv_indices.view(),
            .block_mask = {.kv_num_blocks = kv_num_blocks.view(),
                           .kv_indices = kv_indices.view(),
                           .full_kv_num_blocks = full_kv_num_blocks.view(),
                           .full_kv_indices = full_kv_indices.view(),
                           .partial_begin = partial_begin.view(),
                           .partial_bits = partial_bits.view(),
                           .block_rows = block_rows,
                           .block_keys = block_keys}};
  }
  ForwardArgs forward_args() const {
    return {.inputs = inputs(),
            .options = setup.options,
            .out = out.view(),
            .lse = lse.view(),
            .skip_map = skip_map.view()};
  }
  BackwardArgs backward_args() const {
    return {.inputs = inputs(),
            .options = setup.options,
            .out = out.view(),
            .lse = lse.view(),
            .skip_map = skip_map.view(),
            .grad_out = grad_out.view(),
            .grad_lse = grad_lse.view(),
            .grad_query = grad_query.view(),
            .grad_key = grad_key.view(),
            .grad_value = grad_value.view(),
            .grad_alpha = grad_alpha.view(),
            .grad_delta = grad_delta.view(),
            .grad_sink = grad_sink.view()};
  }
  DecodeArgs decode_args() const {
    return {.inputs = inputs(), .options = setup.options, .out = out.view(), .lse = lse.view()};
  }

  // Each run poisons its outputs, gives the call the workspace that it asks for, and checks that the inputs
  // are unchanged and the guard bands intact.
  void forward() {
    ForwardArgs args = forward_args();
    if (!skip_map.present()) skip_map = Buffer(DType::int32, skip_map_shape(args));
    for (Buffer* buffer : {&out, &lse, &skip_map}) buffer->poison();
    args = forward_args();
    run(args, [](const ForwardArgs& a) { fsa::forward(a); });
  }
  void backward() {
    for (Buffer* buffer : {&grad_query, &grad_key, &grad_value, &grad_alpha, &grad_delta, &grad_sink})
      buffer->poison();
    BackwardArgs args = backward_args();
    run(args, [](const BackwardArgs& a) { fsa::backward(a); });
  }
  void decode() {
    out.poison();
    lse.poison();
    DecodeArgs args = decode_args();
    run(args, [](const DecodeArgs& a) { fsa::decode(a); });
  }

  // Random gradients of out and lse, so that backward() can run.
  void make_gradients(Random& random, bool with_grad_lse) {
    grad_out = Buffer(out.dtype(), shape_of(out));
    grad_out.fill_normal(random);
    grad_lse = Buffer();
    if (!with_grad_lse) return;
    grad_lse = Buffer(lse.dtype(), shape_of(lse));
    grad_lse.fill_normal(random);
  }

  bool kept(std::int64_t batch, std::int64_t head, std::int64_t row_tile, std::int64_t key_tile) const {
    const double word =
        packed_q() ? skip_map.at(head, setup.cu_seqlens_q[batch] / 64 + batch + row_tile, key_tile / 32)
                   : skip_map.at(batch, head, row_tile, key_tile / 32);
    return (static_cast<std::uint32_t>(static_cast<std::int32_t>(word)) >> (key_tile % 32) & 1) != 0;
  }

  // The same keys, values and delta, spread over pages in random order. Unused pages and rows hold NaN,
  // unused entries of the table nonsense.
  Attention paged(std::int64_t page_size, Random& random) const {
    Attention result = *this;
    const std::int64_t max_pages = (setup.seqlen_k + page_size - 1) / page_size + 1;
    const std::int64_t num_pages = setup.batch * max_pages + 3;
    std::vector<std::int32_t> order(num_pages);
    for (std::int64_t i = 0; i < num_pages; ++i) order[i] = static_cast<std::int32_t>(i);
    for (std::int64_t i = num_pages - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    result.key = Buffer(setup.dtype, {num_pages, page_size, setup.num_kv_heads, setup.head_dim});
    result.value = Buffer(setup.dtype, {num_pages, page_size, setup.num_kv_heads, setup.head_dim_v});
    if (setup.gate) result.delta = Buffer(delta.dtype(), {num_pages, page_size, setup.num_kv_heads});
    std::vector<std::int32_t> table(setup.batch * max_pages, -7);
    std::vector<std::int32_t> used(setup.batch);
    for (std::int64_t b = 0; b < setup.batch; ++b) {
      used[b] = static_cast<std::int32_t>(setup.seqused_k.empty() ? setup.seqlen_k : setup.seqused_k[b]);
      for (std::int64_t j = 0; j < used[b]; ++j) {
        const std::int32_t page = order[b * max_pages + j / page_size];
        table[b * max_pages + j / page_size] = page;
        for (std::int64_t h = 0; h < setup.num_kv_heads; ++h) {
          for (std::int64_t d = 0; d < setup.head_dim; ++d)
            result.key.set(key.at(b, j, h, d), page, j % page_size, h, d);
          for (std::int64_t d = 0; d < setup.head_dim_v; ++d)
            result.value.set(value.at(b, j, h, d), page, j % page_size, h, d);
          if (setup.gate) result.delta.set(delta.at(b, j, h), page, j % page_size, h);
        }
      }
    }
    result.page_table = Buffer::ints(table, {setup.batch, max_pages});
    result.setup.seqused_k = used;
    result.seqused_k = Buffer::ints(used);
    result.skip_map = Buffer();
    return result;
  }

  // Lengths in use of one sequence.
  std::int64_t used_q(std::int64_t b) const {
    return used(setup.seqused_q, setup.cu_seqlens_q, setup.seqlen_q, b);
  }
  std::int64_t used_k(std::int64_t b) const {
    return used(setup.seqused_k, setup.cu_seqlens_k, setup.seqlen_k, b);
  }

  static std::vector<std::int64_t> shape_of(const Buffer& buffer) {
    const TensorView view = buffer.view();
    return {view.shape, view.shape + view.rank};
  }

 private:
  Attention(const AttentionSetup& given, bool is_decode) : setup(given) {
    const AttentionSetup& s = setup;
    const DType dtype = s.dtype;
    const std::int64_t total_q = packed_q() ? s.cu_seqlens_q.back() + s.spare : 0;
    const std::int64_t total_k = packed_k() ? s.cu_seqlens_k.back() + s.spare : 0;
    auto rows = [&](std::int64_t heads, std::int64_t dims) -> std::vector<std::int64_t> {
      std::vector<std::int64_t> shape;
      if (is_decode)
        shape = {s.batch, heads};
      else if (packed_q())
        shape = {total_q, heads};
      else
        shape = {s.batch, s.seqlen_q, heads};
      if (dims > 0) shape.push_back(dims);
      return shape;
    };
    auto keys = [&](std::int64_t dims) -> std::vector<std::int64_t> {
      std::vector<std::int64_t> shape;
      if (packed_k())
        shape = {total_k, s.num_kv_heads};
      else
        shape = {s.batch, s.seqlen_k, s.num_kv_heads};
      if (dims > 0) shape.push_back(dims);
      return shape;
    };
    query = Buffer(dtype, rows(s.num_heads, s.head_dim));
    key = Buffer(dtype, keys(s.head_dim));
    value = Buffer(dtype, keys(s.head_dim_v));
    out = Buffer(dtype, rows(s.num_heads, s.head_dim_v));
    if (is_decode)
      lse = Buffer(lse_dtype(), {s.batch, s.num_heads});
    else if (packed_q())
      lse = Buffer(lse_dtype(), {s.num_heads, total_q});
    else
      lse = Buffer(lse_dtype(), {s.batch, s.num_heads, s.seqlen_q});
    if (s.gate) alpha = Buffer(dtype, rows(s.num_heads, 0));
    if (s.gate) delta = Buffer(dtype, keys(0));
    if (s.sink) sink = Buffer(dtype, {s.num_heads});
    if (s.alibi) alibi_slopes = Buffer(DType::float32, {s.num_heads});
    if (packed_q()) cu_seqlens_q = Buffer::ints(s.cu_seqlens_q);
    if (packed_k()) cu_seqlens_k = Buffer::ints(s.cu_seqlens_k);
    if (!s.seqused_q.empty()) seqused_q = Buffer::ints(s.seqused_q);
    if (!s.seqused_k.empty()) seqused_k = Buffer::ints(s.seqused_k);
    if (!s.window_sizes.empty()) {
      window_sizes = Buffer(DType::int32, {s.num_kv_heads, 4});
      for (std::int64_t h = 0; h < s.num_kv_heads; ++h)
        for (std::int64_t column = 0; column < 4; ++column)
          window_sizes.set(s.window_sizes[h % s.window_sizes.size()][column], h, column);
    }
    if (!s.gather_kv_indices.empty())
      gather_kv_indices = Buffer::ints(
          s.gather_kv_indices, {s.batch, static_cast<std::int64_t>(s.gather_kv_indices.size()) / s.batch});
    if (!is_decode) {
      grad_query = Buffer(dtype, shape_of(query));
      grad_key = Buffer(dtype, shape_of(key));
      grad_value = Buffer(dtype, shape_of(value));
      if (s.gate) grad_alpha = Buffer(dtype, shape_of(alpha));
      if (s.gate) grad_delta = Buffer(dtype, shape_of(delta));
      if (s.sink) grad_sink = Buffer(dtype, shape_of(sink));
    }
    Random random(s.seed);
    for (Buffer* buffer : {&query, &key, &value, &alpha, &delta, &sink})
      if (buffer->present()) buffer->fill_normal(random);
    for (std::int64_t h = 0; s.alibi && h < s.num_heads; ++h)
      alibi_slopes.set(std::ldexp(0.25, -static_cast<int>(h % 8)), h);
  }

  static std::int64_t used(const std::vector<std::int32_t>& seqused,
                           const std::vector<std::int32_t>& cu_seqlens, std::int64_t seqlen, std::int64_t b) {
    if (!seqused.empty()) return seqused[b];
    return cu_seqlens.empty() ? seqlen : cu_seqlens[b + 1] - cu_seqlens[b];
  }

  template <class Args, class Call>
  void run(Args& args, Call call) {
    const auto before = input_bytes();
    std::vector<unsigned char> scratch(workspace_size(args) + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(scratch.data());
    args.workspace = {scratch.data() + (64 - address % 64) % 64, scratch.size() - 64};
    call(args);
    EXPECT_EQ(before, input_bytes()) << "an input was changed";
    for (const Buffer* buffer :
         {&out, &lse, &skip_map, &grad_query, &grad_key, &grad_value, &grad_alpha, &grad_delta, &grad_sink})
      EXPECT_TRUE(buffer->guards_intact()) << "written outside of an output";
  }
  std::vector<std::vector<unsigned char>> input_bytes() const {
    std::vector<std::vector<unsigned char>> result;
    for (const Buffer* buffer : {&query,
                                 &key,
                                 &value,
                                 &alpha,
                                 &delta,
                                 &sink,
                                 &alibi_slopes,
                                 &cu_seqlens_q,
                                 &cu_seqlens_k,
                                 &seqused_q,
                                 &seqused_k,
                                 &window_sizes,
                                 &page_table,
                                 &gather_kv_indices,
                                 &kv_num_blocks,
                                 &kv_indices,
                                 &full_kv_num_blocks,
                                 &full_kv_indices,
                                 &partial_begin,
                                 &partial_bits,
                                 &grad_out,
                                 &grad_lse})
      result.push_back(buffer->bytes());
    return result;
  }
};

// Gives queries and keys topics: each run of `run` keys and of 64 query tokens has a random one of up to 8,
// a pair of one topic has a logit of about `strength`, others about 0. With strength > 10 whole tiles fall
// below any sensible threshold.
inline void fill_topics(Attention& a, Random& random, std::int64_t run = 128, double strength = 16) {
  const std::int64_t dims = a.setup.head_dim;
  const double scale = a.setup.options.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(dims)));
  const double length = std::sqrt(strength / scale);
  const std::int64_t topics = std::min<std::int64_t>(dims, 8);  // topic t = axis t, plus noise
  auto fill = [&](Buffer& tensor, std::int64_t tokens_per_run) {
    const std::int64_t rank = tensor.view().rank;
    const std::int64_t heads = tensor.shape(rank - 2);
    const std::int64_t tokens = tensor.numel() / std::max<std::int64_t>(heads * dims, 1);
    std::int64_t topic = 0;
    for (std::int64_t token = 0; token < tokens; ++token) {
      if (token % tokens_per_run == 0) topic = random.below(topics);
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t d = 0; d < dims; ++d)
          tensor.put((token * heads + h) * dims + d, 0.1 * random.normal() + (d == topic ? length : 0));
    }
  };
  fill(a.key, run);
  fill(a.query, 64);
}

}  // namespace fsa::test
