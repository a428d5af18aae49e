// SPDX-License-Identifier: Apache-2.0
// Two keys with equal logits: each weighs one half, so every number below can be worked out by hand.
#include <fsa/fsa.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

namespace {

int failures = 0;

void expect_near(const char* what, double actual, double expected) {
  if (std::abs(actual - expected) <= 1e-6) return;
  std::printf("%s: %.9g, expected %.9g\n", what, actual, expected);
  ++failures;
}

fsa::TensorView view(std::vector<float>& values, std::initializer_list<std::int64_t> shape) {
  return fsa::TensorView::contiguous(values.data(), fsa::DType::float32, shape);
}

fsa::Workspace aligned(std::vector<std::byte>& storage, std::size_t bytes) {
  storage.resize(bytes + 64);
  const auto address = reinterpret_cast<std::uintptr_t>(storage.data());
  return {storage.data() + (64 - address % 64) % 64, bytes};
}

}  // namespace

int main() {
  std::vector<float> query = {1, 1}, key = {1, 0, 0, 1}, value = {2, 4, 6, 16};
  std::vector<float> out(2), lse(1), grad_out = {1, 0}, grad_query(2), grad_key(4), grad_value(4);
  std::vector<std::byte> storage;

  fsa::ForwardArgs forward{
      .inputs = {.query = view(query, {1, 1, 1, 2}),
                 .key = view(key, {1, 2, 1, 2}),
                 .value = view(value, {1, 2, 1, 2})},
      .options = {.causal = true, .softmax_scale = 1.0},
      .out = view(out, {1, 1, 1, 2}),
      .lse = view(lse, {1, 1, 1}),
  };
  forward.workspace = aligned(storage, fsa::workspace_size(forward));
  fsa::forward(forward);
  expect_near("out[0]", out[0], 4);
  expect_near("out[1]", out[1], 10);
  expect_near("lse", lse[0], 1 + std::log(2.0));

  fsa::BackwardArgs backward{
      .inputs = forward.inputs,
      .options = forward.options,
      .out = forward.out,
      .lse = forward.lse,
      .grad_out = view(grad_out, {1, 1, 1, 2}),
      .grad_query = view(grad_query, {1, 1, 1, 2}),
      .grad_key = view(grad_key, {1, 2, 1, 2}),
      .grad_value = view(grad_value, {1, 2, 1, 2}),
  };
  backward.workspace = aligned(storage, fsa::workspace_size(backward));
  fsa::backward(backward);
  // dP = v[:, 0] = (2, 6), dS = P * (dP - out . grad_out) = 0.5 * (2 - 4, 6 - 4) = (-1, 1).
  expect_near("grad_query[0]", grad_query[0], -1);
  expect_near("grad_query[1]", grad_query[1], 1);
  expect_near("grad_key[0]", grad_key[0], -1);
  expect_near("grad_key[3]", grad_key[3], 1);
  expect_near("grad_value[0]", grad_value[0], 0.5);
  expect_near("grad_value[2]", grad_value[2], 0.5);

  // An exception must keep its type across the library's boundary.
  try {
    forward.options.softmax_scale = -1.0;
    fsa::forward(forward);
    std::printf("softmax_scale -1 was accepted\n");
    ++failures;
  } catch (const fsa::Error& error) {
    if (error.code() != fsa::ErrorCode::invalid_argument) {
      std::printf("softmax_scale -1: wrong code for \"%s\"\n", error.what());
      ++failures;
    }
  }
  if (std::string(fsa::version()) != FSA_VERSION_STRING) {
    std::printf("version %s, but the headers say %s\n", fsa::version(), FSA_VERSION_STRING);
    ++failures;
  }
  std::printf("consumer: %s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
