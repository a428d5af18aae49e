// SPDX-License-Identifier: Apache-2.0
// What tests of native sparse attention share: each part with all its tensors, made from one NsaSetup and run
// through the public API.
#pragma once

#include <functional>

#include "test_random.h"

namespace fsa::test {

struct NsaSetup {
  std::int64_t batch = 1;
  std::int64_t seqlen = 1;  // rows of a batched sequence
  std::int64_t num_heads = 1;
  std::int64_t num_kv_heads = 1;
  std::int64_t head_dim = 2;
  std::int64_t head_dim_v = 2;
  DType dtype = DType::float64;
  nsa::CompressKind kind = nsa::CompressKind::linear;
  bool pe = false;
  std::int64_t compress_block = 32;
  std::int64_t compress_stride = 16;
  std::int64_t block_size = 64;
  std::int64_t top_k = 4;
  std::int64_t init_blocks = 1;
  std::int64_t local_blocks = 2;
  std::optional<double> softmax_scale = {};
  nsa::Algorithm algorithm = nsa::Algorithm::automatic;
  std::int64_t chunk_tokens = 0;
  bool gates_per_head = false;
  DType gate_dtype = DType::none;             // none: dtype
  std::vector<std::int32_t> cu_seqlens = {};  // given: packed, with `spare` rows behind the last sequence
  std::int64_t spare = 0;
  std::vector<std::int32_t> seqused_k = {};  // given: batched keys with room for `room` tokens
  std::int64_t room = 0;
  std::string backend = "reference";
  std::uint64_t seed = 1;

  bool packed() const { return !cu_seqlens.empty(); }
  std::int64_t sequences() const {
    return packed() ? static_cast<std::int64_t>(cu_seqlens.size()) - 1 : batch;
  }
  std::int64_t rows(std::int64_t b) const { return packed() ? cu_seqlens[b + 1] - cu_seqlens[b] : seqlen; }
  std::int64_t tokens(std::int64_t b) const { return seqused_k.empty() ? rows(b) : seqused_k[b]; }
  std::int64_t windows(std::int64_t b) const {
    return nsa::compressed_length(tokens(b), compress_block, compress_stride);
  }
  std::int64_t key_room() const { return seqused_k.empty() ? seqlen : room; }
  std::int64_t window_room() const {
    return nsa::compressed_length(key_room(), compress_block, compress_stride);
  }
  std::vector<std::int32_t> cu_seqlens_compressed() const {
    std::vector<std::int32_t> cu;
    for (std::int64_t b = 0; packed() && b <= sequences(); ++b)
      cu.push_back(b == 0 ? 0 : cu.back() + static_cast<std::int32_t>(windows(b - 1)));
    return cu;
  }

  std::vector<std::int64_t> row_shape(std::int64_t heads, std::int64_t dims) const {
    if (packed()) return {cu_seqlens.back() + spare, heads, dims};
    return {batch, seqlen, heads, dims};
  }
  std::vector<std::int64_t> key_shape(std::int64_t dims) const {
    if (packed()) return row_shape(num_kv_heads, dims);
    return {batch, key_room(), num_kv_heads, dims};
  }
  std::vector<std::int64_t> window_shape(std::int64_t dims) const {
    if (packed()) return {cu_seqlens_compressed().back() + spare, num_kv_heads, dims};
    return {batch, window_room(), num_kv_heads, dims};
  }
  std::vector<std::int64_t> lse_shape() const {
    if (packed()) return {num_heads, cu_seqlens.back() + spare};
    return {batch, num_heads, seqlen};
  }
  std::vector<std::int64_t> blocks_shape() const {
    if (packed()) return {num_kv_heads, cu_seqlens.back() + spare, top_k};
    return {batch, num_kv_heads, seqlen, top_k};
  }
  DType lse_dtype() const { return dtype == DType::float64 ? DType::float64 : DType::float32; }
};

// Normal numbers in the rows in use, NaN elsewhere: nobody may look there. used(b) rows of sequence b are in use,
// from row begin(b) on when packed.
inline void fill_used(Buffer& tensor, Random& random, const NsaSetup& setup,
                      const std::function<std::int64_t(std::int64_t)>& begin,
                      const std::function<std::int64_t(std::int64_t)>& used) {
  tensor.fill_normal(random);
  const int row_axis = setup.packed() ? 0 : 1;
  std::int64_t per_row = 1;
  for (int axis = row_axis + 1; axis < tensor.view().rank; ++axis) per_row *= tensor.shape(axis);
  const std::int64_t extent = tensor.shape(row_axis), batches = setup.packed() ? 1 : setup.batch;
  for (std::int64_t b = 0; b < batches; ++b) {
    const std::int64_t end = setup.packed() ? begin(setup.sequences()) : used(b);
    for (std::int64_t i = end * per_row; i < extent * per_row; ++i)
      tensor.put(b * extent * per_row + i, kNan);
  }
}
inline void fill_rows(Buffer& tensor, Random& random, const NsaSetup& setup) {
  fill_used(
      tensor, random, setup, [&](std::int64_t b) { return setup.cu_seqlens[b]; },
      [&](std::int64_t b) { return setup.rows(b); });
}
inline void fill_keys(Buffer& tensor, Random& random, const NsaSetup& setup) {
  fill_used(
      tensor, random, setup, [&](std::int64_t b) { return setup.cu_seqlens[b]; },
      [&](std::int64_t b) { return setup.tokens(b); });
}
inline void fill_windows(Buffer& tensor, Random& random, const NsaSetup& setup) {
  fill_used(
      tensor, random, setup, [&](std::int64_t b) { return setup.cu_seqlens_compressed()[b]; },
      [&](std::int64_t b) { return setup.windows(b); });
}

// Poisons the outputs, gives the call the workspace that it asks for, filled with NaN, and checks that the inputs
// are unchanged and that nothing around the outputs and the workspace was written.
template <class Args, class Function>
void run_checked(Args args, const std::vector<const Buffer*>& inputs, const std::vector<Buffer*>& outputs,
                 Function function) {
  std::vector<std::vector<unsigned char>> before;
  for (const Buffer* input : inputs) before.push_back(input->bytes());
  for (Buffer* output : outputs) output->poison();
  std::vector<unsigned char> scratch;
  std::size_t begin = 0, size = 0;
  if constexpr (requires { args.workspace; }) {
    size = workspace_size(args);
    scratch.assign(size + 192, 0xff);
    begin = 64 + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64;
    args.workspace = {scratch.data() + begin, size};
  }
  function(args);
  for (std::size_t i = 0; i < scratch.size(); ++i)
    if ((i < begin || i >= begin + size) && scratch[i] != 0xff) {
      ADD_FAILURE() << "written outside of the workspace";
      break;
    }
  for (std::size_t i = 0; i < inputs.size(); ++i)
    EXPECT_EQ(before[i], inputs[i]->bytes()) << "an input was changed";
  for (const Buffer* output : outputs) EXPECT_TRUE(output->guards_intact()) << "written outside of an output";
}

// For finite differences and comparisons.
template <class Part>
struct NsaTensor {
  const char* name;
  Buffer Part::* tensor;
};
template <class Part>
struct NsaGradient {
  const char* name;
  Buffer Part::* input;
  Buffer Part::* grad;
};

inline Buffer optional_ints(const std::vector<std::int32_t>& values) {
  return values.empty() ? Buffer() : Buffer::ints(values);
}

inline std::vector<std::int64_t> shape_of(const Buffer& buffer) {
  const TensorView view = buffer.view();
  return {view.shape, view.shape + view.rank};
}

struct Compression {
  NsaSetup setup;
  Buffer x, weight, pe, cu_seqlens, cu_seqlens_compressed, out;
  Buffer grad_out, grad_x, grad_weight, grad_pe;

  explicit Compression(const NsaSetup& given) : setup(given) {
    const NsaSetup& s = setup;
    Random random(s.seed);
    x = Buffer(s.dtype, s.row_shape(s.num_kv_heads, s.head_dim));
    fill_rows(x, random, s);
    if (s.kind == nsa::CompressKind::linear)
      weight = Buffer(s.dtype, {s.num_kv_heads, s.compress_block * s.head_dim, s.head_dim});
    if (s.kind == nsa::CompressKind::weighted) weight = Buffer(s.dtype, {s.num_kv_heads, s.compress_block});
    const std::int64_t terms = s.compress_block * (s.kind == nsa::CompressKind::linear ? s.head_dim : 1);
    if (weight.present()) weight.fill_normal(random, 1 / std::sqrt(static_cast<double>(terms)));
    grad_weight = weight;
    if (s.pe) pe = Buffer(s.dtype, {s.num_kv_heads, s.compress_block, s.head_dim});
    if (s.pe) pe.fill_normal(random);
    grad_pe = pe;
    cu_seqlens = optional_ints(s.cu_seqlens);
    cu_seqlens_compressed = optional_ints(s.cu_seqlens_compressed());
    out = grad_out = Buffer(s.dtype, s.window_shape(s.head_dim));
    fill_windows(grad_out, random, s);
    grad_x = Buffer(s.dtype, shape_of(x));
  }

  nsa::CompressInputs inputs() const {
    return {.x = x.view(),
            .weight = weight.view(),
            .intra_block_pe = pe.view(),
            .cu_seqlens = cu_seqlens.view(),
            .cu_seqlens_compressed = cu_seqlens_compressed.view()};
  }
  nsa::CompressOptions options() const {
    return {.kind = setup.kind,
            .compress_block = setup.compress_block,
            .compress_stride = setup.compress_stride,
            .backend = setup.backend};
  }
  nsa::CompressArgs args() const { return {.inputs = inputs(), .options = options(), .out = out.view()}; }
  nsa::CompressBackwardArgs backward_args() const {
    return {.inputs = inputs(),
            .options = options(),
            .grad_out = grad_out.view(),
            .grad_x = grad_x.view(),
            .grad_weight = grad_weight.view(),
            .grad_intra_block_pe = grad_pe.view()};
  }
  void forward() { run_checked(args(), all_inputs(), {&out}, nsa::compress); }
  void backward() {
    run_checked(backward_args(), all_inputs(), {&grad_x, &grad_weight, &grad_pe}, nsa::compress_backward);
  }

  static std::vector<NsaTensor<Compression>> outputs() { return {{"out", &Compression::out}}; }
  static std::vector<NsaGradient<Compression>> gradients() {
    return {{"x", &Compression::x, &Compression::grad_x},
            {"weight", &Compression::weight, &Compression::grad_weight},
            {"intra_block_pe", &Compression::pe, &Compression::grad_pe}};
  }

 private:
  std::vector<const Buffer*> all_inputs() const {
    return {&x, &weight, &pe, &cu_seqlens, &cu_seqlens_compressed, &grad_out};
  }
};

struct Selection {
  NsaSetup setup;
  Buffer query, key, lse, cu_seqlens_q, cu_seqlens_compressed, seqused_k, selected_blocks;

  // lse is that of the compressed branch in float64, rounded once.
  explicit Selection(const NsaSetup& given) : setup(given) {
    const NsaSetup& s = setup;
    Random random(s.seed);
    query = Buffer(s.dtype, s.row_shape(s.num_heads, s.head_dim));
    key = Buffer(s.dtype, s.window_shape(s.head_dim));
    fill_rows(query, random, s);
    fill_windows(key, random, s);
    cu_seqlens_q = optional_ints(s.cu_seqlens);
    cu_seqlens_compressed = optional_ints(s.cu_seqlens_compressed());
    seqused_k = optional_ints(s.seqused_k);
    lse = Buffer(s.lse_dtype(), s.lse_shape());
    selected_blocks = Buffer(DType::int32, s.blocks_shape());
    compute_lse();
  }

  nsa::SelectBlocksArgs args() const {
    return {.query = query.view(),
            .compressed_key = key.view(),
            .lse = lse.view(),
            .cu_seqlens_q = cu_seqlens_q.view(),
            .cu_seqlens_compressed = cu_seqlens_compressed.view(),
            .seqused_k = seqused_k.view(),
            .compress_block = setup.compress_block,
            .compress_stride = setup.compress_stride,
            .block_size = setup.block_size,
            .top_k = setup.top_k,
            .init_blocks = setup.init_blocks,
            .local_blocks = setup.local_blocks,
            .softmax_scale = setup.softmax_scale,
            .selected_blocks = selected_blocks.view(),
            .backend = setup.backend};
  }
  void run() {
    run_checked(args(), {&query, &key, &lse, &cu_seqlens_q, &cu_seqlens_compressed, &seqused_k},
                {&selected_blocks}, nsa::select_blocks);
  }
  // Of the compressed branch; the keys are its values.
  ForwardArgs attention(const Buffer& out, const char* backend) const {
    return {.inputs = {.query = query.view(),
                       .key = key.view(),
                       .value = key.view(),
                       .cu_seqlens_q = cu_seqlens_q.view(),
                       .cu_seqlens_k = cu_seqlens_compressed.view(),
                       .seqused_k = seqused_k.view()},
            .options = {.causal = true,
                        .compress_block = setup.compress_block,
                        .compress_stride = setup.compress_stride,
                        .softmax_scale = setup.softmax_scale,
                        .backend = backend},
            .out = out.view(),
            .lse = lse.view()};
  }
  Buffer out() const { return Buffer(setup.dtype, setup.row_shape(setup.num_heads, setup.head_dim)); }
  void compute_lse() { forward(attention(out(), "reference")); }

  std::int32_t block(std::int64_t b, std::int64_t kv_head, std::int64_t row, std::int64_t slot) const {
    return static_cast<std::int32_t>(setup.packed()
                                         ? selected_blocks.at(kv_head, setup.cu_seqlens[b] + row, slot)
                                         : selected_blocks.at(b, kv_head, row, slot));
  }
};

struct SelectedAttention {
  NsaSetup setup;
  Buffer query, key, value, selected_blocks, cu_seqlens, seqused_k, out, lse;
  Buffer grad_out, grad_query, grad_key, grad_value;

  // Without rows of blocks until set_blocks() or random_blocks(): every entry is -1.
  explicit SelectedAttention(const NsaSetup& given) : setup(given) {
    const NsaSetup& s = setup;
    Random random(s.seed);
    query = Buffer(s.dtype, s.row_shape(s.num_heads, s.head_dim));
    key = Buffer(s.dtype, s.key_shape(s.head_dim));
    value = Buffer(s.dtype, s.key_shape(s.head_dim_v));
    out = grad_out = Buffer(s.dtype, s.row_shape(s.num_heads, s.head_dim_v));
    lse = Buffer(s.lse_dtype(), s.lse_shape());
    fill_rows(query, random, s);
    fill_keys(key, random, s);
    fill_keys(value, random, s);
    fill_rows(grad_out, random, s);
    cu_seqlens = optional_ints(s.cu_seqlens);
    seqused_k = optional_ints(s.seqused_k);
    selected_blocks = Buffer(DType::int32, s.blocks_shape());
    selected_blocks.fill(-1);
    grad_query = Buffer(s.dtype, shape_of(query));
    grad_key = Buffer(s.dtype, shape_of(key));
    grad_value = Buffer(s.dtype, shape_of(value));
  }

  std::int64_t token(std::int64_t b, std::int64_t row) const { return row + setup.tokens(b) - setup.rows(b); }
  std::int64_t blocks(std::int64_t b) const {
    return (setup.tokens(b) + setup.block_size - 1) / setup.block_size;
  }

  // Entries of one row; the rest are -1.
  void set_blocks(std::int64_t b, std::int64_t kv_head, std::int64_t row,
                  const std::vector<std::int64_t>& entries) {
    for (std::int64_t slot = 0; slot < setup.top_k; ++slot) {
      const auto block = static_cast<double>(
          slot < static_cast<std::int64_t>(entries.size()) ? entries[static_cast<std::size_t>(slot)] : -1);
      if (setup.packed())
        selected_blocks.set(block, kv_head, setup.cu_seqlens[b] + row, slot);
      else
        selected_blocks.set(block, b, kv_head, row, slot);
    }
  }
  // Calls entries(b, kv_head, row) for every row.
  template <class Entries>
  void set_every_row(Entries entries) {
    for (std::int64_t b = 0; b < setup.sequences(); ++b)
      for (std::int64_t head = 0; head < setup.num_kv_heads; ++head)
        for (std::int64_t row = 0; row < setup.rows(b); ++row)
          set_blocks(b, head, row, entries(b, head, row));
  }
  // Anything that is allowed, in any order: -1, duplicates, blocks of the future. Rows that no sequence owns hold
  // nonsense.
  void random_blocks(Random& random) {
    selected_blocks.poison();
    set_every_row([&](std::int64_t b, std::int64_t, std::int64_t row) {
      const std::int64_t own = token(b, row) / setup.block_size;
      std::vector<std::int64_t> entries;
      for (std::int64_t slot = 0; slot < setup.top_k; ++slot) {
        const std::int64_t what = random.below(12);
        entries.push_back(what == 0   ? -1
                          : what == 1 ? random.below(blocks(b))
                          : what == 2 ? own
                          : what == 3 ? 0
                                      : random.below(own + 1));
      }
      return entries;
    });
  }

  nsa::SelectedInputs inputs() const {
    return {.query = query.view(),
            .key = key.view(),
            .value = value.view(),
            .selected_blocks = selected_blocks.view(),
            .cu_seqlens = cu_seqlens.view(),
            .seqused_k = seqused_k.view()};
  }
  nsa::SelectedOptions options() const {
    return {.block_size = setup.block_size,
            .softmax_scale = setup.softmax_scale,
            .algorithm = setup.algorithm,
            .chunk_tokens = setup.chunk_tokens,
            .backend = setup.backend};
  }
  nsa::SelectedForwardArgs args() const {
    return {.inputs = inputs(), .options = options(), .out = out.view(), .lse = lse.view()};
  }
  nsa::SelectedBackwardArgs backward_args() const {
    return {.inputs = inputs(),
            .options = options(),
            .out = out.view(),
            .lse = lse.view(),
            .grad_out = grad_out.view(),
            .grad_query = grad_query.view(),
            .grad_key = grad_key.view(),
            .grad_value = grad_value.view()};
  }
  void forward() { run_checked(args(), all_inputs(), {&out, &lse}, nsa::selected_forward); }
  void backward() {
    std::vector<const Buffer*> inputs = all_inputs();
    inputs.insert(inputs.end(), {&out, &lse});
    run_checked(backward_args(), inputs, {&grad_query, &grad_key, &grad_value}, nsa::selected_backward);
  }

  static std::vector<NsaTensor<SelectedAttention>> outputs() {
    return {{"out", &SelectedAttention::out}, {"lse", &SelectedAttention::lse}};
  }
  static std::vector<NsaGradient<SelectedAttention>> gradients() {
    return {{"query", &SelectedAttention::query, &SelectedAttention::grad_query},
            {"key", &SelectedAttention::key, &SelectedAttention::grad_key},
            {"value", &SelectedAttention::value, &SelectedAttention::grad_value}};
  }

 private:
  std::vector<const Buffer*> all_inputs() const {
    return {&query, &key, &value, &selected_blocks, &cu_seqlens, &seqused_k, &grad_out};
  }
};

struct Combination {
  NsaSetup setup;
  Buffer compressed, selected, sliding, gates, out;
  Buffer grad_out, grad_compressed, grad_selected, grad_sliding, grad_gates;

  explicit Combination(const NsaSetup& given) : setup(given) {
    const NsaSetup& s = setup;
    Random random(s.seed);
    const std::vector<std::int64_t> shape = s.row_shape(s.num_heads, s.head_dim_v);
    std::vector<std::int64_t> gate_shape = s.row_shape(s.num_heads, 3);
    if (!s.gates_per_head) gate_shape.erase(gate_shape.end() - 2);
    for (Buffer* buffer : {&compressed, &selected, &sliding, &grad_out}) {
      *buffer = Buffer(s.dtype, shape);
      buffer->fill_normal(random);
    }
    gates = Buffer(s.gate_dtype == DType::none ? s.dtype : s.gate_dtype, gate_shape);
    for (std::int64_t i = 0; i < gates.numel(); ++i) gates.put(i, random.uniform());
    out = grad_compressed = grad_selected = grad_sliding = Buffer(s.dtype, shape);
    grad_gates = Buffer(gates.dtype(), gate_shape);
  }

  nsa::CombineArgs args() const {
    return {.compressed = compressed.view(),
            .selected = selected.view(),
            .sliding = sliding.view(),
            .gates = gates.view(),
            .out = out.view(),
            .backend = setup.backend};
  }
  nsa::CombineBackwardArgs backward_args() const {
    return {.compressed = compressed.view(),
            .selected = selected.view(),
            .sliding = sliding.view(),
            .gates = gates.view(),
            .grad_out = grad_out.view(),
            .grad_compressed = grad_compressed.view(),
            .grad_selected = grad_selected.view(),
            .grad_sliding = grad_sliding.view(),
            .grad_gates = grad_gates.view(),
            .backend = setup.backend};
  }
  void forward() { run_checked(args(), all_inputs(), {&out}, nsa::combine); }
  void backward() {
    run_checked(backward_args(), all_inputs(), {&grad_compressed, &grad_selected, &grad_sliding, &grad_gates},
                nsa::combine_backward);
  }

  static std::vector<NsaTensor<Combination>> outputs() { return {{"out", &Combination::out}}; }
  static std::vector<NsaGradient<Combination>> gradients() {
    return {{"compressed", &Combination::compressed, &Combination::grad_compressed},
            {"selected", &Combination::selected, &Combination::grad_selected},
            {"sliding", &Combination::sliding, &Combination::grad_sliding},
            {"gates", &Combination::gates, &Combination::grad_gates}};
  }

 private:
  std::vector<const Buffer*> all_inputs() const {
    return {&compressed, &selected, &sliding, &gates, &grad_out};
  }
};

// Scores of blocks as the NSA paper writes them (equation 9), in float64: the sum of the probabilities of the windows
// j a - (c - 1) + m + r over m < a = B / s and r < c = l / s. Of one sequence and key head.
class PaperScores {
 public:
  PaperScores(const Selection& s, std::int64_t b, std::int64_t kv_head)
      : setup_(s.setup), group_(setup_.num_heads / setup_.num_kv_heads), windows_(setup_.windows(b)) {
    const NsaSetup& p = setup_;
    offset_ = p.tokens(b) - p.rows(b);
    const std::int64_t batch = p.packed() ? 0 : b, q_begin = p.packed() ? p.cu_seqlens[b] : 0;
    const std::int64_t k_begin = p.packed() ? p.cu_seqlens_compressed()[b] : 0;
    // Index of an element as [batch, rows, heads, dim], which packed tensors are with one batch entry.
    const auto load = [&](const Buffer& tensor, std::int64_t extent, std::int64_t heads, std::int64_t row,
                          std::int64_t head) {
      std::vector<double> values;
      for (std::int64_t d = 0; d < p.head_dim; ++d)
        values.push_back(tensor.get(((batch * extent + row) * heads + head) * p.head_dim + d));
      return values;
    };
    for (std::int64_t i = 0; i < windows_; ++i)
      keys_.push_back(load(s.key, p.window_room(), p.num_kv_heads, k_begin + i, kv_head));
    for (std::int64_t row = 0; row < p.rows(b); ++row)
      for (std::int64_t head = kv_head * group_; head < (kv_head + 1) * group_; ++head) {
        queries_.push_back(load(s.query, p.seqlen, p.num_heads, q_begin + row, head));
        lses_.push_back(p.packed() ? s.lse.at(head, q_begin + row) : s.lse.at(b, head, row));
      }
  }

  // Of the blocks 0 ... own of a row.
  std::vector<double> of_row(std::int64_t row) const {
    const NsaSetup& p = setup_;
    const std::int64_t token = row + offset_;
    const double scale = p.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(p.head_dim)));
    std::vector<double> probabilities(keys_.size());
    for (std::int64_t i = 0; i < windows_ && token >= i * p.compress_stride + p.compress_block - 1; ++i)
      for (std::int64_t head = row * group_; head < (row + 1) * group_; ++head) {
        const std::vector<double>& query = queries_[static_cast<std::size_t>(head)];
        const std::vector<double>& key = keys_[static_cast<std::size_t>(i)];
        double product = 0;
        for (std::size_t d = 0; d < query.size(); ++d) product += query[d] * key[d];
        probabilities[static_cast<std::size_t>(i)] +=
            std::exp(scale * product - lses_[static_cast<std::size_t>(head)]);
      }
    const std::int64_t a = p.block_size / p.compress_stride, c = p.compress_block / p.compress_stride;
    std::vector<double> scores(static_cast<std::size_t>(token / p.block_size + 1));
    for (std::size_t j = 0; j < scores.size(); ++j)
      for (std::int64_t m = 0; m < a; ++m)
        for (std::int64_t r = 0; r < c; ++r) {
          const std::int64_t i = static_cast<std::int64_t>(j) * a - (c - 1) + m + r;
          if (i >= 0 && i < windows_) scores[j] += probabilities[static_cast<std::size_t>(i)];
        }
    return scores;
  }

 private:
  const NsaSetup& setup_;
  std::int64_t group_, windows_, offset_ = 0;
  std::vector<std::vector<double>> keys_, queries_;  // queries: rows, then heads of the group
  std::vector<double> lses_;
};

// Every row holds a best choice by PaperScores: ascending, exactly min(top_k, own + 1) blocks, then -1; forced
// blocks first; no block that was left out beats one that was taken by more than `slack`, relative.
inline void expect_best_blocks(const Selection& s, double slack) {
  const NsaSetup& p = s.setup;
  for (std::int64_t b = 0; b < p.sequences(); ++b)
    for (std::int64_t kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
      const PaperScores paper(s, b, kv_head);
      for (std::int64_t row = 0; row < p.rows(b); ++row) {
        SCOPED_TRACE(testing::Message()
                     << "seed " << p.seed << " sequence " << b << " key head " << kv_head << " row " << row);
        const std::vector<double> scores = paper.of_row(row);
        const auto own = static_cast<std::int64_t>(scores.size()) - 1;
        const std::int64_t count = std::min(p.top_k, own + 1);
        std::vector<bool> taken(scores.size());
        std::int64_t previous = -1;
        for (std::int64_t slot = 0; slot < p.top_k; ++slot) {
          const std::int64_t block = s.block(b, kv_head, row, slot);
          if (slot >= count) {
            ASSERT_EQ(block, -1) << "slot " << slot;
            continue;
          }
          ASSERT_GT(block, previous) << "slot " << slot;
          ASSERT_LE(block, own) << "slot " << slot;
          taken[static_cast<std::size_t>(block)] = true;
          previous = block;
        }
        double worst_taken = kInf, best_left = 0;
        for (std::int64_t j = 0; j <= own; ++j) {
          const double score = scores[static_cast<std::size_t>(j)];
          const bool forced = j < p.init_blocks || j > own - p.local_blocks;
          if (forced) {
            ASSERT_TRUE(taken[static_cast<std::size_t>(j)]) << "forced block " << j;
          } else if (taken[static_cast<std::size_t>(j)]) {
            worst_taken = std::min(worst_taken, score);
          } else {
            best_left = std::max(best_left, score);
          }
        }
        ASSERT_GE(worst_taken, best_left * (1 - slack));
      }
    }
}

template <class Part>
Part with_backend(Part part, const char* backend) {
  part.setup.backend = backend;
  return part;
}

template <class Part>
void expect_same_outputs(const Part& a, const Part& b, double tolerance) {
  for (const auto& [name, tensor] : Part::outputs())
    expect_close(a.*tensor, b.*tensor, tolerance, name, a.setup.seed);
}
template <class Part>
void expect_same_gradients(const Part& a, const Part& b, double tolerance) {
  for (const auto& [name, input, grad] : Part::gradients())
    if ((a.*input).present()) expect_close(a.*grad, b.*grad, tolerance, name, a.setup.seed);
}
template <class Part>
void expect_same_bits(const Part& a, const Part& b) {
  for (const auto& [name, tensor] : Part::outputs())
    EXPECT_TRUE(same_bytes(a.*tensor, b.*tensor)) << name << ", seed " << a.setup.seed;
  for (const auto& [name, input, grad] : Part::gradients())
    EXPECT_TRUE(same_bytes(a.*grad, b.*grad)) << "gradient of " << name << ", seed " << a.setup.seed;
}

}  // namespace fsa::test
