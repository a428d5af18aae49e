// SPDX-License-Identifier: Apache-2.0
// Overlap of strided tensors, and layouts of memory that must be accepted.
#include <set>

#include "api/checks.h"
#include "api/overlap.h"
#include "test_util.h"

namespace fsa::test {
namespace {

TensorView strided(void* data, DType dtype, const std::vector<std::int64_t>& shape,
                   const std::vector<std::int64_t>& strides) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<std::int32_t>(shape.size());
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    view.shape[axis] = shape[axis];
    view.strides[axis] = strides[axis];
  }
  return view;
}

// Every byte that the view covers, as often as an element covers it.
std::multiset<std::intptr_t> bytes_of(const TensorView& view) {
  std::multiset<std::intptr_t> bytes;
  for (std::int64_t i = 0; i < view.numel(); ++i) {
    std::int64_t rest = i, offset = 0;
    for (int axis = view.rank - 1; axis >= 0; --axis) {
      offset += rest % view.shape[axis] * view.strides[axis];
      rest /= view.shape[axis];
    }
    const auto size = static_cast<std::int64_t>(size_of(view.dtype));
    for (std::int64_t byte = 0; byte < size; ++byte)
      bytes.insert(reinterpret_cast<std::intptr_t>(view.data) + offset * size + byte);
  }
  return bytes;
}

TensorView random_view(Random& random, char* buffer) {
  const DType dtypes[] = {DType::float64, DType::float32, DType::bfloat16};
  const DType dtype = dtypes[random.below(3)];
  const std::int64_t rank = 1 + random.below(3);
  std::vector<std::int64_t> shape, strides;
  for (std::int64_t axis = 0; axis < rank; ++axis) {
    shape.push_back(random.below(12) == 0 ? 0 : 1 + random.below(4));
    strides.push_back(random.below(12) == 0 ? -random.below(5) : random.below(14));
  }
  return strided(buffer + static_cast<std::int64_t>(size_of(dtype)) * random.below(30), dtype, shape,
                 strides);
}

TEST(Overlap, AgreesWithEnumeration) {
  Random random(21);
  std::vector<char> buffer(1 << 12);
  int shared = 0, apart = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const TensorView a = random_view(random, buffer.data() + 1024),
                     b = random_view(random, buffer.data() + 1024);
    const std::multiset<std::intptr_t> bytes_a = bytes_of(a), bytes_b = bytes_of(b);
    const bool expected = std::any_of(bytes_a.begin(), bytes_a.end(),
                                      [&](std::intptr_t byte) { return bytes_b.contains(byte); });
    ASSERT_EQ(may_share_memory(a, b), expected) << "trial " << trial;
    (expected ? shared : apart)++;
  }
  EXPECT_GT(shared, 500);
  EXPECT_GT(apart, 500);
}

// Refusing to write a view whose elements are distinct is allowed only for strides that no slice, transpose or
// padding of a dense tensor has; accepting one whose elements coincide never is.
TEST(Overlap, WritableViewsHaveDistinctElements) {
  Random random(22);
  std::vector<char> buffer(1 << 12);
  int accepted = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const TensorView view = random_view(random, buffer.data() + 1024);
    try {
      check_writable("out", view);
    } catch (const Error&) {
      continue;
    }
    ++accepted;
    const std::multiset<std::intptr_t> bytes = bytes_of(view);
    ASSERT_EQ(std::set<std::intptr_t>(bytes.begin(), bytes.end()).size(), bytes.size()) << "trial " << trial;
  }
  EXPECT_GT(accepted, 200);
}

TEST(Overlap, SlicesOfDenseTensorsAreWritable) {
  Random random(23);
  std::vector<char> buffer(8);
  for (int trial = 0; trial < 500; ++trial) {
    std::vector<std::int64_t> extents, shape, strides;
    std::int64_t stride = 1;
    for (int axis = 0; axis < 4; ++axis) {
      const std::int64_t extent = 1 + random.below(6);
      extents.push_back(extent);
      shape.push_back(1 + random.below(extent));
      strides.push_back(shape.back() == 1 ? random.below(1000) : stride);  // size-1 axes: any stride
      stride *= extent;
    }
    for (int axis = 3; axis > 0; --axis) {
      const std::int64_t other = random.below(axis + 1);
      std::swap(shape[axis], shape[other]);
      std::swap(strides[axis], strides[other]);
    }
    EXPECT_NO_THROW(check_writable("out", strided(buffer.data(), DType::float32, shape, strides)));
  }
}

// All tensors of one training step inside two buffers: qkv and its gradient.
TEST(MemoryLayouts, PackedQkvAndItsGradient) {
  constexpr std::int64_t kBatch = 2, kSeqlen = 6, kHeads = 3, kDim = 4;
  constexpr std::int64_t kToken = 3 * kHeads * kDim;
  Buffer qkv(DType::float32, {kBatch, kSeqlen, 3, kHeads, kDim}),
      grad(DType::float32, {kBatch, kSeqlen, 3, kHeads, kDim});
  Random random(4);
  qkv.fill_normal(random);
  const auto part = [&](Buffer& buffer, std::int64_t index) {
    return strided(static_cast<float*>(buffer.data()) + index * kHeads * kDim, DType::float32,
                   {kBatch, kSeqlen, kHeads, kDim}, {kSeqlen * kToken, kToken, kDim, 1});
  };
  Buffer out(DType::float32, {kBatch, kSeqlen, kHeads, kDim}), lse(DType::float32, {kBatch, kHeads, kSeqlen});
  const AttentionInputs inputs{.query = part(qkv, 0), .key = part(qkv, 1), .value = part(qkv, 2)};
  forward({.inputs = inputs, .options = {.backend = "reference"}, .out = out.view(), .lse = lse.view()});

  Buffer ones(DType::float32, {kBatch, kSeqlen, kHeads, kDim});
  ones.fill(1);
  BackwardArgs args{.inputs = inputs,
                    .options = {.backend = "reference"},
                    .out = out.view(),
                    .lse = lse.view(),
                    .grad_out = ones.view(),
                    .grad_query = part(grad, 0),
                    .grad_key = part(grad, 1),
                    .grad_value = part(grad, 2)};
  backward(args);
  for (std::int64_t i = 0; i < grad.numel(); ++i) ASSERT_FALSE(std::isnan(grad.get(i))) << "element " << i;

  // Next to each other in the last dimension instead, with one column in common.
  Buffer wide(DType::float32, {kBatch, kSeqlen, kHeads, 2 * kDim});
  const auto half = [&](std::int64_t begin) {
    return strided(static_cast<float*>(wide.data()) + begin, DType::float32, {kBatch, kSeqlen, kHeads, kDim},
                   {kSeqlen * kHeads * 2 * kDim, kHeads * 2 * kDim, 2 * kDim, 1});
  };
  args.grad_query = half(0);
  args.grad_key = half(kDim);
  EXPECT_NO_THROW(backward(args));
  args.grad_key = half(kDim - 1);
  try {
    backward(args);
    ADD_FAILURE() << "gradients that share a column were accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "grad_key: shares memory with grad_query; pass a tensor with memory of its own");
  }
}

TEST(MemoryLayouts, InputsMayBeOneTensor) {
  Buffer x(DType::float32, {2, 5, 2, 4}), out(DType::float32, {2, 5, 2, 4});
  Random random(5);
  x.fill_normal(random);
  EXPECT_NO_THROW(forward({.inputs = {.query = x.view(), .key = x.view(), .value = x.view()},
                           .options = {.backend = "reference"},
                           .out = out.view()}));
}

// torch gives size-1 dimensions any stride it likes, the last one and outputs included.
TEST(MemoryLayouts, SizeOneDimensionsMayHaveAnyStride) {
  constexpr std::int64_t kFar = std::int64_t{1} << 60;
  Buffer q(DType::float32, {1, 3, 1, 1}), kv(DType::float32, {1, 4, 1, 1}),
      plain(DType::float32, {1, 3, 1, 1});
  Buffer odd(DType::float32, {1, 3, 1, 1}), lse(DType::float32, {1, 1, 3});
  Random random(6);
  q.fill_normal(random);
  kv.fill_normal(random);
  const auto absurd = [&](Buffer& buffer) {
    TensorView view = buffer.view();
    view.strides[0] = -kFar;
    view.strides[2] = 0;
    view.strides[3] = kFar;
    return view;
  };
  forward({.inputs = {.query = q.view(), .key = kv.view(), .value = kv.view()},
           .options = {.backend = "reference"},
           .out = plain.view()});
  forward({.inputs = {.query = absurd(q), .key = absurd(kv), .value = absurd(kv)},
           .options = {.backend = "reference"},
           .out = absurd(odd),
           .lse = lse.view()});
  EXPECT_TRUE(same_bytes(plain, odd));
}

TEST(MemoryLayouts, ExpandedKeysAndStridedIndexTensors) {
  Buffer q(DType::float32, {4, 2, 6}), kv(DType::float32, {1, 5, 1, 6}), out(DType::float32, {4, 2, 6});
  Random random(7);
  q.fill_normal(random);
  kv.fill_normal(random);
  TensorView expanded = kv.view();
  expanded.shape[0] = 4;
  expanded.strides[0] = 0;
  Buffer lengths = Buffer::ints({5, -9, 1, -9, 0, -9, 3, -9});
  TensorView every_second = lengths.view();
  every_second.shape[0] = 4;
  every_second.strides[0] = 2;
  Buffer lse(DType::float32, {4, 2});
  decode({.inputs = {.query = q.view(), .key = expanded, .value = expanded, .seqused_k = every_second},
          .options = {.backend = "reference"},
          .out = out.view(),
          .lse = lse.view()});
  EXPECT_EQ(lse.at(2, 1), -kInf);
  EXPECT_EQ(out.at(2, 0, 3), 0);
  EXPECT_NEAR(out.at(1, 1, 4), kv.at(0, 0, 0, 4), 1e-6);
}

TEST(MemoryLayouts, EmptyTensorsNeedNoMemory) {
  const TensorView nothing = TensorView::contiguous(nullptr, DType::float32, {2, 0, 3, 4});
  Buffer query(DType::float32, {2, 5, 3, 4}), out(DType::float32, {2, 5, 3, 4}),
      lse(DType::float32, {2, 3, 5});
  query.fill(1);
  forward({.inputs = {.query = query.view(), .key = nothing, .value = nothing},
           .options = {.backend = "reference"},
           .out = out.view(),
           .lse = lse.view()});
  EXPECT_EQ(out.at(1, 4, 2, 3), 0);
  EXPECT_EQ(lse.at(1, 2, 4), -kInf);
  EXPECT_NO_THROW(forward({.inputs = {.query = nothing, .key = query.view(), .value = query.view()},
                           .options = {.backend = "reference"},
                           .out = nothing}));
}

}  // namespace
}  // namespace fsa::test
