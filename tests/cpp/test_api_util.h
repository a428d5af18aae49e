// SPDX-License-Identifier: Apache-2.0
// Running one spoiled call and its valid twin. The spoiled call's tensors point into memory that nobody may touch,
// index tensors aside, so a check that comes too late ends the test with a fault.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <functional>

#include "test_util.h"

namespace fsa::test {

// Address space without access rights, handed out in steps that no tensor of these tests reaches across.
class ForbiddenMemory {
 public:
  ForbiddenMemory()
      : memory_(mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (memory_ == MAP_FAILED) std::abort();
  }
  ~ForbiddenMemory() { munmap(memory_, kBytes); }
  ForbiddenMemory(const ForbiddenMemory&) = delete;
  ForbiddenMemory& operator=(const ForbiddenMemory&) = delete;

  void hide(TensorView& view) {
    if (view.present()) view.data = static_cast<unsigned char*>(memory_) + kStep * next_++;
  }

 private:
  static constexpr std::size_t kStep = 1 << 20, kBytes = kStep * 64;
  void* memory_;
  std::size_t next_ = 1;
};

// Another contiguous shape at the same address.
inline TensorView reshaped(const TensorView& view, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(view.data, view.dtype, shape);
}

// The struct that holds a call's inputs: a member, or the arguments themselves.
template <class Args>
auto& inputs_of(Args& args) {
  if constexpr (requires { args.inputs; })
    return args.inputs;
  else
    return args;
}

// One call: its arguments, and memory for what a test puts in their place.
template <class Args>
class Trial {
 public:
  explicit Trial(const Args& given) : args(given) {}
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  Args args;
  decltype(inputs_of(std::declval<Args&>())) in = inputs_of(args);

  TensorView ints(const std::vector<std::int32_t>& values, const std::vector<std::int64_t>& shape = {}) {
    owned_.push_back(Buffer::ints(values, shape));
    return owned_.back().view();
  }
  TensorView tensor(DType dtype, const std::vector<std::int64_t>& shape) {
    owned_.push_back(Buffer(dtype, shape));
    owned_.back().fill(1);
    return owned_.back().view();
  }
  Workspace workspace(std::size_t bytes) {
    scratch_.resize(bytes + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(scratch_.data());
    return {scratch_.data() + (64 - address % 64) % 64, bytes};
  }

 private:
  std::deque<Buffer> owned_;
  std::vector<unsigned char> scratch_;
};

inline std::vector<TensorView*> large_tensors(AttentionInputs& in) {
  return {&in.query, &in.key, &in.value, &in.alibi_slopes, &in.sink, &in.alpha, &in.delta};
}
inline std::vector<TensorView*> large_tensors(ForwardArgs& args) {
  std::vector<TensorView*> all = large_tensors(args.inputs);
  all.insert(all.end(), {&args.out, &args.lse, &args.skip_map});
  return all;
}
inline std::vector<TensorView*> large_tensors(BackwardArgs& args) {
  std::vector<TensorView*> all = large_tensors(args.inputs);
  all.insert(all.end(),
             {&args.out, &args.lse, &args.skip_map, &args.grad_out, &args.grad_lse, &args.grad_query,
              &args.grad_key, &args.grad_value, &args.grad_alpha, &args.grad_delta, &args.grad_sink});
  return all;
}
inline std::vector<TensorView*> large_tensors(DecodeArgs& args) {
  std::vector<TensorView*> all = large_tensors(args.inputs);
  all.insert(all.end(), {&args.out, &args.lse});
  return all;
}

inline std::vector<TensorView*> large_tensors(nsa::CompressInputs& in) {
  return {&in.x, &in.weight, &in.intra_block_pe};
}
inline std::vector<TensorView*> large_tensors(nsa::CompressArgs& args) {
  std::vector<TensorView*> all = large_tensors(args.inputs);
  all.push_back(&args.out);
  return all;
}
inline std::vector<TensorView*> large_tensors(nsa::CompressBackwardArgs& args) {
  std::vector<TensorView*> all = large_tensors(args.inputs);
  all.insert(all.end(), {&args.grad_out, &args.grad_x, &args.grad_weight, &args.grad_intra_block_pe});
  return all;
}
inline std::vector<TensorView*> large_tensors(nsa::SelectBlocksArgs& args) {
  return {&args.query, &args.compressed_key, &args.lse, &args.selected_blocks};
}
inline std::vector<TensorView*> large_tensors(nsa::SelectedInputs& in) {
  return {&in.query, &in.key, &in.value};
}
inline std::vector<TensorView*> large_tensors(nsa::SelectedForwardArgs& args) {
  std::vector<TensorView*> all = large_tensors(args.inputs);
  all.insert(all.end(), {&args.out, &args.lse});
  return all;
}
inline std::vector<TensorView*> large_tensors(nsa::SelectedBackwardArgs& args) {
  std::vector<TensorView*> all = large_tensors(args.inputs);
  all.insert(all.end(),
             {&args.out, &args.lse, &args.grad_out, &args.grad_query, &args.grad_key, &args.grad_value});
  return all;
}
inline std::vector<TensorView*> large_tensors(nsa::CombineArgs& args) {
  return {&args.compressed, &args.selected, &args.sliding, &args.gates, &args.out};
}
inline std::vector<TensorView*> large_tensors(nsa::CombineBackwardArgs& args) {
  return {&args.compressed,      &args.selected,      &args.sliding,      &args.gates,     &args.grad_out,
          &args.grad_compressed, &args.grad_selected, &args.grad_sliding, &args.grad_gates};
}

inline void call(const ForwardArgs& args) { forward(args); }
inline void call(const BackwardArgs& args) { backward(args); }
inline void call(const DecodeArgs& args) { decode(args); }
inline void call(const nsa::CompressArgs& args) { nsa::compress(args); }
inline void call(const nsa::CompressBackwardArgs& args) { nsa::compress_backward(args); }
inline void call(const nsa::SelectBlocksArgs& args) { nsa::select_blocks(args); }
inline void call(const nsa::SelectedForwardArgs& args) { nsa::selected_forward(args); }
inline void call(const nsa::SelectedBackwardArgs& args) { nsa::selected_backward(args); }
inline void call(const nsa::CombineArgs& args) { nsa::combine(args); }
inline void call(const nsa::CombineBackwardArgs& args) { nsa::combine_backward(args); }

template <class Args>
using Change = std::function<void(Trial<Args>&)>;

template <class Args>
struct BadInput {
  // A constructor, because g++ 12 cannot compile default member initialisers in a braced list of lambdas.
  BadInput(const char* name, ErrorCode code, std::vector<const char*> words, Change<Args> spoil,
           Change<Args> twin = nullptr, bool unsupported = true)
      : name(name),
        code(code),
        words(std::move(words)),
        spoil(std::move(spoil)),
        twin(std::move(twin)),
        unsupported(unsupported) {}

  const char* name;
  ErrorCode code;
  std::vector<const char*> words;  // that the message holds
  Change<Args> spoil;
  Change<Args> twin;  // what the same user would rightly have written; none: the call as it was
  bool unsupported;   // supports() forgives what is missing, but nothing that is wrong
};

inline const char* name_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "invalid_argument";
    case ErrorCode::type_mismatch:
      return "type_mismatch";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::device:
      return "device";
    default:
      return "internal";
  }
}

template <class Args>
void expect_refused(const BadInput<Args>& bad, const Args& given) {
  ForbiddenMemory memory;
  Trial<Args> trial(given);
  for (TensorView* view : large_tensors(trial.args)) memory.hide(*view);
  bad.spoil(trial);
  try {
    call(trial.args);
    ADD_FAILURE() << bad.name << ": accepted";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.code(), bad.code) << bad.name << ": " << name_of(error.code()) << ": " << message;
    for (const char* word : bad.words)
      EXPECT_NE(message.find(word), std::string::npos)
          << bad.name << ": \"" << message << "\" does not say \"" << word << "\"";
  }
  if constexpr (requires { supports(trial.args); }) {
    const Status status = supports(trial.args);
    EXPECT_EQ(status.ok, !bad.unsupported) << bad.name << ": " << status.reason;
    EXPECT_EQ(status.reason.empty(), status.ok) << bad.name;
  }
}

template <class Args>
void expect_accepted(const BadInput<Args>& bad, const Args& given) {
  Trial<Args> trial(given);
  if (bad.twin) bad.twin(trial);
  try {
    if constexpr (requires { trial.args.workspace; })
      if (trial.args.workspace.data == nullptr)
        trial.args.workspace = trial.workspace(workspace_size(trial.args));
    call(trial.args);
    if constexpr (requires { supports(trial.args); }) {
      EXPECT_TRUE(supports(trial.args).ok) << bad.name;
    }
  } catch (const Error& error) {
    ADD_FAILURE() << bad.name << ": the valid twin was refused: " << error.what();
  }
}

template <class Args>
void check_table(const std::vector<BadInput<Args>>& table, const Args& valid) {
  for (const BadInput<Args>& bad : table) {
    SCOPED_TRACE(bad.name);
    expect_refused(bad, valid);
    expect_accepted(bad, valid);
  }
}

}  // namespace fsa::test
