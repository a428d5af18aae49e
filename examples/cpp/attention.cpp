// SPDX-License-Identifier: Apache-2.0
// Forward and backward without Python. The sequence has eight topics; each row starts by looking at its own topic,
// and gradient descent on the queries teaches it to copy the value of its own position. Dense first, then with a
// threshold, which learns the same while skipping the tiles of other topics.
#include <cstdio>
#include <optional>
#include <random>
#include <vector>

#include "fsa/fsa.h"

namespace {

constexpr std::int64_t kBatch = 1, kSeqlen = 1024, kHeads = 4, kKvHeads = 2, kHeadDim = 64;
constexpr std::int64_t kTopicLength = 128;

std::vector<float> normal(std::int64_t count, float deviation, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = distribution(generator);
  return values;
}

// Adds its topic's direction, the same for all heads, to each row of [seqlen, heads, head_dim].
void add_topics(std::vector<float>& values, std::int64_t heads) {
  const std::vector<float> topics = normal(kSeqlen / kTopicLength * kHeadDim, 1.2f, 4);
  for (std::int64_t row = 0; row < kSeqlen; ++row)
    for (std::int64_t head = 0; head < heads; ++head)
      for (std::int64_t dim = 0; dim < kHeadDim; ++dim)
        values[(row * heads + head) * kHeadDim + dim] += topics[row / kTopicLength * kHeadDim + dim];
}

fsa::TensorView view(std::vector<float>& values, std::initializer_list<std::int64_t> shape) {
  return fsa::TensorView::contiguous(values.data(), fsa::DType::float32, shape);
}

struct AlignedBuffer {  // a workspace starts at a multiple of 64 bytes
  explicit AlignedBuffer(std::size_t bytes) : storage(bytes + 64) {}
  fsa::Workspace workspace() {
    const auto address = reinterpret_cast<std::uintptr_t>(storage.data());
    const std::size_t skip = (64 - address % 64) % 64;
    return {storage.data() + skip, storage.size() - skip};
  }
  std::vector<unsigned char> storage;
};

struct Result {
  double first_loss = 0;
  double last_loss = 0;
  double kept = 1;
};

Result fit(std::optional<double> threshold, int steps) {
  std::vector<float> query = normal(kBatch * kSeqlen * kHeads * kHeadDim, 0.1f, 1);
  std::vector<float> key = normal(kBatch * kSeqlen * kKvHeads * kHeadDim, 1, 2);
  std::vector<float> value = normal(kBatch * kSeqlen * kKvHeads * kHeadDim, 1, 3);
  add_topics(query, kHeads);
  add_topics(key, kKvHeads);
  std::vector<float> out(query.size()), grad_out(query.size()), target(query.size());
  std::vector<float> grad_query(query.size()), grad_key(key.size()), grad_value(value.size());
  std::vector<float> lse(static_cast<std::size_t>(kBatch * kHeads * kSeqlen));
  for (std::int64_t row = 0; row < kSeqlen; ++row)
    for (std::int64_t head = 0; head < kHeads; ++head)
      for (std::int64_t dim = 0; dim < kHeadDim; ++dim)
        target[(row * kHeads + head) * kHeadDim + dim] =
            value[(row * kKvHeads + head / (kHeads / kKvHeads)) * kHeadDim + dim];

  fsa::ForwardArgs forward{
      .inputs = {.query = view(query, {kBatch, kSeqlen, kHeads, kHeadDim}),
                 .key = view(key, {kBatch, kSeqlen, kKvHeads, kHeadDim}),
                 .value = view(value, {kBatch, kSeqlen, kKvHeads, kHeadDim})},
      .options = {.causal = true, .threshold = threshold},
      .out = view(out, {kBatch, kSeqlen, kHeads, kHeadDim}),
      .lse = view(lse, {kBatch, kHeads, kSeqlen}),
  };
  const std::vector<std::int64_t> map_shape = fsa::skip_map_shape(forward);
  std::vector<std::int32_t> skip_map(
      static_cast<std::size_t>(map_shape[0] * map_shape[1] * map_shape[2] * map_shape[3]));
  forward.skip_map = fsa::TensorView::contiguous(skip_map.data(), fsa::DType::int32,
                                                 {map_shape[0], map_shape[1], map_shape[2], map_shape[3]});

  fsa::BackwardArgs backward{
      .inputs = forward.inputs,
      .options = forward.options,
      .out = forward.out,
      .lse = forward.lse,
      .skip_map = forward.skip_map,
      .grad_out = view(grad_out, {kBatch, kSeqlen, kHeads, kHeadDim}),
      .grad_query = view(grad_query, {kBatch, kSeqlen, kHeads, kHeadDim}),
      .grad_key = view(grad_key, {kBatch, kSeqlen, kKvHeads, kHeadDim}),
      .grad_value = view(grad_value, {kBatch, kSeqlen, kKvHeads, kHeadDim}),
  };

  AlignedBuffer forward_buffer(fsa::workspace_size(forward)), backward_buffer(fsa::workspace_size(backward));
  forward.workspace = forward_buffer.workspace();
  backward.workspace = backward_buffer.workspace();

  Result result;
  const double count = static_cast<double>(out.size());
  for (int step = 0; step < steps; ++step) {
    fsa::forward(forward);
    double loss = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const float error = out[i] - target[i];
      loss += 0.5 * error * error / count;
      grad_out[i] = error;
    }
    if (step == 0) result.first_loss = loss;
    result.last_loss = loss;
    fsa::backward(backward);
    for (std::size_t i = 0; i < query.size(); ++i) query[i] -= 0.5f * grad_query[i];
  }
  const fsa::TileCounts tiles = fsa::count_tiles(forward);
  result.kept = static_cast<double>(tiles.kept) / static_cast<double>(tiles.visible);
  return result;
}

}  // namespace

int main() {
  try {
    std::printf("fsa %s, %d threads\n", fsa::version(), fsa::num_threads());
    std::printf("%-10s %12s %12s %8s\n", "attention", "first loss", "last loss", "kept");
    bool learned = true;
    for (const std::optional<double> threshold : {std::optional<double>(), std::optional<double>(1.0)}) {
      const Result result = fit(threshold, 10);
      std::printf("%-10s %12.4f %12.4f %7.1f%%\n", threshold ? "threshold" : "dense", result.first_loss,
                  result.last_loss, 100 * result.kept);
      learned = learned && result.last_loss < 0.9 * result.first_loss;
    }
    std::printf(learned ? "The loss went down: gradients flow.\n" : "The loss did not go down.\n");
    return learned ? 0 : 1;
  } catch (const fsa::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
