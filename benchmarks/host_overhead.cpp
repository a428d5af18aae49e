// SPDX-License-Identifier: Apache-2.0
// What a call costs on the host before and after its arithmetic: argument checks, choice of a backend, hand-over.
// The problems are so small that nothing else is left.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "fsa/fsa.h"

namespace {

constexpr std::int64_t kHeadDim = 64;

/// One head, `seqlen` rows and keys. Holds what the arguments point to.
struct Tiny {
  explicit Tiny(std::int64_t seqlen)
      : length(seqlen),
        storage(static_cast<std::size_t>(7 * seqlen * kHeadDim), 0.5F),
        lse(static_cast<std::size_t>(seqlen)) {
    forward.inputs = {.query = rows(0), .key = rows(1), .value = rows(2)};
    forward.out = rows(3);
    forward.lse = fsa::TensorView::contiguous(lse.data(), fsa::DType::float32, {1, 1, seqlen});
    forward_scratch.resize(fsa::workspace_size(forward) + 64);
    forward.workspace = aligned(forward_scratch);

    backward.inputs = forward.inputs;
    backward.out = forward.out;
    backward.lse = forward.lse;
    backward.grad_out = rows(3);
    backward.grad_query = rows(4);
    backward.grad_key = rows(5);
    backward.grad_value = rows(6);
    backward_scratch.resize(fsa::workspace_size(backward) + 64);
    backward.workspace = aligned(backward_scratch);

    decode.inputs = forward.inputs;
    decode.inputs.query = token(0);
    decode.out = token(3);
    decode_scratch.resize(fsa::workspace_size(decode) + 64);
    decode.workspace = aligned(decode_scratch);
  }

  fsa::TensorView rows(std::int64_t index) {
    return fsa::TensorView::contiguous(storage.data() + index * length * kHeadDim, fsa::DType::float32,
                                       {1, length, 1, kHeadDim});
  }

  fsa::TensorView token(std::int64_t index) {
    return fsa::TensorView::contiguous(storage.data() + index * length * kHeadDim, fsa::DType::float32,
                                       {1, 1, kHeadDim});
  }

  static fsa::Workspace aligned(std::vector<unsigned char>& bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
    const std::size_t skip = (64 - address % 64) % 64;
    return {bytes.data() + skip, bytes.size() - skip};
  }

  std::int64_t length;
  std::vector<float> storage;
  std::vector<float> lse;
  std::vector<unsigned char> forward_scratch, backward_scratch, decode_scratch;
  fsa::ForwardArgs forward;
  fsa::BackwardArgs backward;
  fsa::DecodeArgs decode;
};

void forward(benchmark::State& state) {
  Tiny tiny(state.range(0));
  for (auto _ : state) fsa::forward(tiny.forward);
}
BENCHMARK(forward)->Arg(1)->Arg(16);

void backward(benchmark::State& state) {
  Tiny tiny(state.range(0));
  fsa::forward(tiny.forward);
  for (auto _ : state) fsa::backward(tiny.backward);
}
BENCHMARK(backward)->Arg(1)->Arg(16);

void decode(benchmark::State& state) {
  Tiny tiny(state.range(0));
  for (auto _ : state) fsa::decode(tiny.decode);
}
BENCHMARK(decode)->Arg(1)->Arg(16);

void workspace_size_forward(benchmark::State& state) {
  Tiny tiny(1);
  for (auto _ : state) benchmark::DoNotOptimize(fsa::workspace_size(tiny.forward));
}
BENCHMARK(workspace_size_forward);

void workspace_size_backward(benchmark::State& state) {
  Tiny tiny(1);
  for (auto _ : state) benchmark::DoNotOptimize(fsa::workspace_size(tiny.backward));
}
BENCHMARK(workspace_size_backward);

void supports_forward(benchmark::State& state) {
  Tiny tiny(1);
  for (auto _ : state) benchmark::DoNotOptimize(fsa::supports(tiny.forward));
}
BENCHMARK(supports_forward);

void explain_forward(benchmark::State& state) {
  Tiny tiny(1);
  for (auto _ : state) benchmark::DoNotOptimize(fsa::explain(tiny.forward));
}
BENCHMARK(explain_forward);

}  // namespace

BENCHMARK_MAIN();
