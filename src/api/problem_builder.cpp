// SPDX-License-Identifier: Apache-2.0
#include "api/problem_builder.h"

#include <algorithm>
#include <string>

#include "api/index_checks.h"
#include "core/skip_tile.h"

namespace fsa {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;

constexpr Axes kDecodeAxes{0, -1, 1, 2};

// Rows -1: alpha of decode has none. Outer -1: packed tensors have none.
struct GateExtents {
  std::int64_t outer, rows, heads;
  const char *outer_name, *row_name, *head_name;

  Axes axes(GateLayout layout) const {
    Axes axes;
    int next = 0;
    if (outer >= 0) axes.batch = next++;
    if (rows >= 0 && layout == GateLayout::bsh) axes.row = next++;
    axes.head = next++;
    if (rows >= 0 && layout == GateLayout::bhs) axes.row = next++;
    return axes;
  }

  Shape shape(GateLayout layout) const {
    const Axes axis = axes(layout);
    Shape shape{};
    if (axis.batch >= 0) shape.extent[axis.batch] = outer;
    if (axis.row >= 0) shape.extent[axis.row] = rows;
    shape.extent[axis.head] = heads;
    shape.rank = 1 + (axis.batch >= 0) + (axis.row >= 0);
    return shape;
  }

  std::string words(GateLayout layout) const {
    const std::string row = rows >= 0 ? row_name : "", head = head_name;
    std::string text = outer >= 0 ? outer_name + std::string(", ") : "";
    if (row.empty()) return "[" + text + head + "]";
    text += layout == GateLayout::bsh ? row + ", " + head : head + ", " + row;
    return "[" + text + "] of gate_layout " + (layout == GateLayout::bsh ? "bsh" : "bhs");
  }
};

// The layout is never guessed from a shape, but a shape that fits the other one gets a hint.
void check_gate(const char* name, const TensorView& view, const GateExtents& extents, GateLayout layout) {
  if (same_shape(view, extents.shape(layout))) return;
  const GateLayout other = layout == GateLayout::bsh ? GateLayout::bhs : GateLayout::bsh;
  std::string words = extents.words(layout);
  if (same_shape(view, extents.shape(other)))
    words += std::string("; its shape is that of gate_layout ") + (other == GateLayout::bsh ? "bsh" : "bhs");
  check_shape(name, view, extents.shape(layout), words.c_str());
}

bool is_contiguous(const TensorView& view) {
  return !view.present() || view.shape[0] <= 1 || view.strides[0] == 1;
}

class Builder {
 public:
  Builder(Operation operation, const AttentionInputs& inputs, const AttentionOptions& options,
          Purpose purpose)
      : in_(inputs), opt_(options), purpose_(purpose) {
    p_.operation = operation;
  }

  Call build() {
    check_tensors();
    check_combinations();
    read_query();
    read_keys();
    read_index_tensors();
    read_options();
    read_windows();
    read_compression();
    read_block_mask();
    read_gate();
    read_bias_and_sink();
    check_strides();
    read_index_values();
    fill_operands();
    return std::move(call_);
  }

 private:
  bool decode() const { return p_.operation == Operation::decode; }

  void check_tensors();
  void check_combinations() const;
  void read_query();
  void read_keys();
  void check_keys_match_query() const;
  void read_index_tensors();
  void read_options();
  void read_windows();
  void read_compression();
  void read_block_mask();
  BlockList read_block_list(const char* counts_name, const TensorView& counts, const char* indices_name,
                            const TensorView& indices);
  void read_gate();
  void read_bias_and_sink();
  void check_strides() const;
  void read_index_values();
  std::int64_t read_max_seqlen(const char* name, std::optional<std::int64_t> given, std::int64_t used,
                               bool used_known) const;
  void fill_operands();

  const AttentionInputs& in_;
  const AttentionOptions& opt_;
  const Purpose purpose_;
  Call call_;
  Problem& p_ = call_.problem;
  Arguments& args_ = call_.arguments;
};

// What holds for each tensor alone, and the device.
void Builder::check_tensors() {
  const BlockMask& mask = in_.block_mask;
  require("query", in_.query);
  require("key", in_.key);
  require("value", in_.value);
  take_inputs(call_,
              {{"query", &in_.query},
               {"key", &in_.key},
               {"value", &in_.value},
               {"alibi_slopes", &in_.alibi_slopes},
               {"sink", &in_.sink},
               {"alpha", &in_.alpha},
               {"delta", &in_.delta}},
              {{"cu_seqlens_q", &in_.cu_seqlens_q},
               {"cu_seqlens_k", &in_.cu_seqlens_k},
               {"seqused_q", &in_.seqused_q},
               {"seqused_k", &in_.seqused_k},
               {"page_table", &in_.page_table},
               {"window_sizes", &in_.window_sizes},
               {"gather_kv_indices", &in_.gather_kv_indices},
               {"block_mask.kv_num_blocks", &mask.kv_num_blocks},
               {"block_mask.kv_indices", &mask.kv_indices},
               {"block_mask.full_kv_num_blocks", &mask.full_kv_num_blocks},
               {"block_mask.full_kv_indices", &mask.full_kv_indices},
               {"block_mask.partial_begin", &mask.partial_begin},
               {"block_mask.partial_bits", &mask.partial_bits}},
              purpose_);
  check_float_dtype("query", in_.query);
  check_dtype("key", in_.key, in_.query.dtype, " as query");
  check_dtype("value", in_.value, in_.query.dtype, " as query");
  p_.dtype = in_.query.dtype;
  p_.device = call_.device;
}

// Tensors that exclude or need each other.
void Builder::check_combinations() const {
  const bool paged = in_.page_table.present(), packed_k = in_.cu_seqlens_k.present();
  if (decode()) {
    if (in_.cu_seqlens_q.present())
      fail(kInvalid,
           "cu_seqlens_q: given, but decode has one query per sequence, [batch, num_heads, head_dim]; "
           "leave it out");
    if (in_.seqused_q.present())
      fail(kInvalid, "seqused_q: given, but decode has one query per sequence; leave it out");
  } else {
    if (in_.gather_kv_indices.present())
      fail(kInvalid, "gather_kv_indices: only decode takes it; leave it out");
    if (in_.cu_seqlens_q.present() && !packed_k && !paged)
      fail(kInvalid,
           "cu_seqlens_k: missing, but cu_seqlens_q is given; packed queries need packed or paged keys");
    if (packed_k && !in_.cu_seqlens_q.present())
      fail(kInvalid, "cu_seqlens_q: missing, but cu_seqlens_k is given; packed keys need packed queries");
  }
  if (paged && p_.operation == Operation::backward)
    fail(ErrorCode::unsupported,
         "page_table: backward through paged keys and values is not supported; "
         "gather the pages into contiguous key and value first");
  if (paged && packed_k)
    fail(kInvalid, "page_table: given together with cu_seqlens_k; keys are either paged or packed");
  if (paged && !in_.seqused_k.present())
    fail(kInvalid, "seqused_k: missing, but page_table is given; paged keys need their lengths");
  if (!in_.gather_kv_indices.present()) return;
  if (paged)
    fail(ErrorCode::unsupported, "gather_kv_indices: not supported together with page_table; leave one out");
  if (in_.window_sizes.present() || opt_.window_left >= 0 || opt_.window_right >= 0)
    fail(ErrorCode::unsupported,
         "gather_kv_indices: not supported together with a window; the indices alone say "
         "which keys are visible");
}

void Builder::read_query() {
  const TensorView& query = in_.query;
  p_.packed_q = in_.cu_seqlens_q.present();
  call_.query_axes = decode() ? kDecodeAxes : p_.packed_q ? kPackedAxes : kBatchedAxes;
  if (decode()) {
    check_rank("query", query, 3, "[batch, num_heads, head_dim]");
    p_.batch = query.shape[0];
    p_.max_seqlen_q = 1;
    p_.total_q = p_.batch;
  } else if (p_.packed_q) {
    check_rank("query", query, 3, "[total_q, num_heads, head_dim] with cu_seqlens_q");
    check_rank("cu_seqlens_q", in_.cu_seqlens_q, 1, "[batch + 1]");
    if (in_.cu_seqlens_q.shape[0] < 1) fail(kInvalid, "cu_seqlens_q: shape [0], must be [batch + 1]");
    p_.batch = in_.cu_seqlens_q.shape[0] - 1;
    p_.total_q = query.shape[0];
  } else {
    check_rank("query", query, 4,
               "[batch, seqlen_q, num_heads, head_dim]; packed sequences need cu_seqlens_q");
    p_.batch = query.shape[0];
    p_.max_seqlen_q = query.shape[1];
    p_.total_q = p_.batch * p_.max_seqlen_q;
  }
  p_.num_heads = query.shape[call_.query_axes.head];
  p_.head_dim = query.shape[call_.query_axes.dim];
  check_head_dim("query", "head_dim", p_.head_dim);
  if (p_.num_heads < 1) fail(kInvalid, "query: num_heads 0, must be at least 1");
}

void Builder::read_keys() {
  const TensorView& key = in_.key;
  p_.packed_k = in_.cu_seqlens_k.present();
  p_.paged = in_.page_table.present();
  call_.key_axes = p_.packed_k ? kPackedAxes : kBatchedAxes;
  const char* layout = p_.packed_k ? "[total_k, num_kv_heads, head_dim] with cu_seqlens_k"
                       : p_.paged
                           ? "[num_pages, page_size, num_kv_heads, head_dim] with page_table"
                           : "[batch, seqlen_k, num_kv_heads, head_dim]; packed keys need cu_seqlens_k, "
                             "paged keys page_table";
  check_rank("key", key, p_.packed_k ? 3 : 4, layout);
  check_rank("value", in_.value, key.rank, layout);
  if (p_.packed_k) {
    check_rank("cu_seqlens_k", in_.cu_seqlens_k, 1, "[batch + 1]");
    check_equal("cu_seqlens_k", "batch", in_.cu_seqlens_k.shape[0] - 1, decode() ? "query" : "cu_seqlens_q",
                p_.batch);
    p_.total_k = key.shape[0];
  } else if (p_.paged) {
    check_rank("page_table", in_.page_table, 2, "[batch, max_pages]");
    check_equal("page_table", "batch", in_.page_table.shape[0], p_.packed_q ? "cu_seqlens_q" : "query",
                p_.batch);
    p_.num_pages = key.shape[0];
    p_.page_size = key.shape[1];
    p_.max_pages = in_.page_table.shape[1];
    if (p_.page_size < 1) fail(kInvalid, "key: page_size 0, must be at least 1");
    // Lengths are int32, so a table with more room than that is never used to its end.
    p_.max_seqlen_k = std::min(p_.max_pages * p_.page_size, kMaxLength);
    p_.total_k = p_.num_pages * p_.page_size;
  } else {
    check_equal("key", "batch", key.shape[0], "query", p_.batch);
    p_.max_seqlen_k = key.shape[1];
    p_.total_k = p_.batch * p_.max_seqlen_k;
  }
  p_.num_kv_heads = key.shape[call_.key_axes.head];
  p_.head_dim_v = in_.value.shape[call_.key_axes.dim];
  check_keys_match_query();
  p_.group_size = p_.num_heads / p_.num_kv_heads;
}

void Builder::check_keys_match_query() const {
  const TensorView &key = in_.key, &value = in_.value;
  check_equal("key", "head_dim", key.shape[call_.key_axes.dim], "query", p_.head_dim);
  check_head_dim("value", "head_dim_v", p_.head_dim_v);
  check_equal("value", "num_kv_heads", value.shape[call_.key_axes.head], "key", p_.num_kv_heads);
  if (p_.packed_k) {
    check_equal("value", "total_k", value.shape[0], "key", key.shape[0]);
  } else {
    check_equal("value", p_.paged ? "num_pages" : "batch", value.shape[0], "key", key.shape[0]);
    check_equal("value", p_.paged ? "page_size" : "seqlen_k", value.shape[1], "key", key.shape[1]);
  }
  check_heads(p_.num_heads, "key", p_.num_kv_heads);
}

void Builder::read_index_tensors() {
  if (in_.seqused_q.present()) check_shape("seqused_q", in_.seqused_q, {p_.batch}, "[batch]");
  if (in_.seqused_k.present()) check_shape("seqused_k", in_.seqused_k, {p_.batch}, "[batch]");
  p_.gathered = in_.gather_kv_indices.present();
  if (p_.gathered) {
    check_rank("gather_kv_indices", in_.gather_kv_indices, 2, "[batch, top_k]");
    check_equal("gather_kv_indices", "batch", in_.gather_kv_indices.shape[0], "query", p_.batch);
    p_.gather_size = in_.gather_kv_indices.shape[1];
  }
  if (in_.window_sizes.present())
    check_shape("window_sizes", in_.window_sizes, {p_.num_kv_heads, 4},
                "[num_kv_heads, 4], columns sink, left, right, near");
  args_.cu_seqlens_q = make_table(in_.cu_seqlens_q);
  args_.cu_seqlens_k = make_table(in_.cu_seqlens_k);
  args_.seqused_q = make_table(in_.seqused_q);
  args_.seqused_k = make_table(in_.seqused_k);
  args_.page_table = make_table(in_.page_table);
  args_.window_sizes = make_table(in_.window_sizes);
  args_.gather_kv_indices = make_table(in_.gather_kv_indices);
  for (const TensorView* table : {&in_.cu_seqlens_q, &in_.cu_seqlens_k, &in_.seqused_q, &in_.seqused_k})
    p_.contiguous_tables = p_.contiguous_tables && is_contiguous(*table);
  if (in_.window_sizes.present() && in_.window_sizes.strides[1] != 1) p_.contiguous_tables = false;
}

void Builder::read_options() {
  p_.softmax_scale = checked_softmax_scale(opt_.softmax_scale, p_.head_dim);
  check_finite("softcap", opt_.softcap);
  if (opt_.softcap < 0)
    fail(kInvalid, "softcap: ", opt_.softcap, ", must not be negative; 0 switches it off");
  if (opt_.threshold) check_finite("threshold", *opt_.threshold);
  if (opt_.gate_threshold) check_finite("gate_threshold", *opt_.gate_threshold);
  p_.softcap = opt_.softcap;
  p_.threshold = std::max(0.0, opt_.threshold.value_or(0));
  p_.causal = opt_.causal;
  p_.deterministic = opt_.deterministic;
}

void Builder::read_windows() {
  const auto read = [](const char* name, std::int64_t size) {
    if (size < -1) fail(kInvalid, name, ": ", size, ", must be -1 (no limit), 0 or above");
    return size > kMaxLength ? -1 : size;  // wider than any sequence: the same as open
  };
  p_.window_left = read("window_left", opt_.window_left);
  p_.window_right = read("window_right", opt_.window_right);
  p_.has_window_sizes = in_.window_sizes.present();
  if (p_.has_window_sizes && (opt_.window_left >= 0 || opt_.window_right >= 0))
    fail(kInvalid, "window_sizes: given together with window_left ", opt_.window_left, " and window_right ",
         opt_.window_right, "; choose one form and leave the other unset (-1)");
}

void Builder::read_compression() {
  if (opt_.compress_block == 0) {
    if (opt_.compress_stride != 1)
      fail(kInvalid, "compress_stride: ", opt_.compress_stride,
           ", but compress_block is 0 (keys are tokens); give both or neither");
    return;
  }
  check_windows_of_tokens(opt_.compress_block, opt_.compress_stride);
  const auto refuse = [](bool given, const char* what) {
    if (given)
      fail(ErrorCode::unsupported, what, ": not supported together with compress_block; leave one out");
  };
  refuse(decode(), "decode");
  refuse(p_.paged, "page_table");
  refuse(p_.window_left >= 0, "window_left");
  refuse(p_.window_right >= 0, "window_right");
  refuse(p_.has_window_sizes, "window_sizes");
  refuse(p_.threshold > 0, "threshold");
  refuse(in_.alpha.present() || in_.delta.present(), "alpha and delta");
  refuse(in_.alibi_slopes.present(), "alibi_slopes");
  if (!p_.causal)
    fail(kInvalid, "causal: false, but compress_block is ", opt_.compress_block,
         "; compressed keys are only visible from their last token on: set causal");
  p_.compress_block = opt_.compress_block;
  p_.compress_stride = opt_.compress_stride;
}

BlockList Builder::read_block_list(const char* counts_name, const TensorView& counts,
                                   const char* indices_name, const TensorView& indices) {
  BlockList list;
  if (counts.present() != indices.present())
    fail(kInvalid, counts.present() ? indices_name : counts_name, ": missing, but ",
         counts.present() ? counts_name : indices_name, " is given; a list needs both");
  if (!counts.present()) return list;
  check_rank(counts_name, counts, 3, "[batch or 1, num_heads or 1, row_blocks]");
  check_rank(indices_name, indices, 4, "[batch or 1, num_heads or 1, row_blocks, columns]");
  const std::int64_t batch = counts.shape[0] == 1 ? 1 : p_.batch;
  const std::int64_t heads = counts.shape[1] == 1 ? 1 : p_.num_heads;
  check_shape(counts_name, counts, {batch, heads, p_.row_blocks()},
              "[batch or 1, num_heads or 1, ceil(seqlen_q / block_rows)]");
  check_shape(indices_name, indices, {batch, heads, p_.row_blocks(), indices.shape[3]},
              "[.., columns] after the shape of its counts");
  p_.mask_batch = std::max(p_.mask_batch, batch);
  p_.mask_heads = std::max(p_.mask_heads, heads);
  list.present = true;
  list.counts = static_cast<const std::int32_t*>(counts.data);
  list.stride_batch = effective_stride(counts, 0);
  list.stride_head = effective_stride(counts, 1);
  list.stride_row = effective_stride(counts, 2);
  list.indices = static_cast<const std::int32_t*>(indices.data);
  list.indices_stride_batch = effective_stride(indices, 0);
  list.indices_stride_head = effective_stride(indices, 1);
  list.indices_stride_row = effective_stride(indices, 2);
  list.indices_stride_column = effective_stride(indices, 3);
  list.columns = indices.shape[3];
  p_.contiguous_lists = p_.contiguous_lists && (list.columns <= 1 || list.indices_stride_column == 1);
  return list;
}

void Builder::read_block_mask() {
  const BlockMask& mask = in_.block_mask;
  if (!mask.present()) return;
  const auto refuse = [](bool given, const char* what, const char* way_out) {
    if (given) fail(ErrorCode::unsupported, "block_mask: not supported ", what, way_out);
  };
  refuse(decode(), "by decode", "; use forward with a query of one row per sequence");
  refuse(p_.packed_q, "together with cu_seqlens_q",
         "; put the sequences into one batch entry and tell them apart in the mask");
  refuse(p_.paged, "together with page_table", "; gather the pages into contiguous key and value");
  refuse(opt_.compress_block > 0, "together with compress_block", "; leave one out");
  const std::int64_t tile_keys = skip_tile_keys(p_.head_dim);
  const auto check_size = [&](const char* name, std::int64_t size, std::int64_t unit, const char* side) {
    if (size < 1 || size % unit != 0 || size > kMaxLength)
      fail(kInvalid, name, ": ", size, ", must be a multiple of ", unit, ", the ", side,
           " of a skip tile with head_dim ", p_.head_dim);
  };
  check_size("block_mask.block_rows", mask.block_rows, kSkipTileRows, "rows");
  check_size("block_mask.block_keys", mask.block_keys, tile_keys, "keys");
  p_.has_block_mask = true;
  p_.block_rows = mask.block_rows;
  p_.block_keys = mask.block_keys;
  p_.mask_batch = p_.mask_heads = 1;
  BlockLists& lists = args_.block_mask;
  lists.full = read_block_list("block_mask.full_kv_num_blocks", mask.full_kv_num_blocks,
                               "block_mask.full_kv_indices", mask.full_kv_indices);
  lists.partial = read_block_list("block_mask.kv_num_blocks", mask.kv_num_blocks, "block_mask.kv_indices",
                                  mask.kv_indices);
  p_.has_partial_blocks = lists.partial.present;
  for (const auto& [name, view] : {std::pair{"block_mask.partial_begin", &mask.partial_begin},
                                   std::pair{"block_mask.partial_bits", &mask.partial_bits}})
    if (view->present() != lists.partial.present)
      fail(kInvalid, lists.partial.present ? name : "block_mask.kv_num_blocks", ": missing, but ",
           lists.partial.present ? "block_mask.kv_num_blocks" : name,
           " is given; partial blocks need lists and bits, full ones go into full_kv_indices");
  if (!lists.partial.present) return;
  check_shape("block_mask.partial_begin", mask.partial_begin, shape_of(mask.kv_num_blocks),
              "the shape of kv_num_blocks");
  check_rank("block_mask.partial_bits", mask.partial_bits, 3, "[blocks, block_rows, block_keys / 32]");
  const std::int64_t words = mask.block_keys / 32;
  check_shape("block_mask.partial_bits", mask.partial_bits,
              {mask.partial_bits.shape[0], mask.block_rows, words}, "[blocks, block_rows, block_keys / 32]");
  const std::int64_t* strides = mask.partial_bits.strides;
  const std::int64_t block_words = mask.block_rows * words;
  if (!is_empty(mask.partial_bits) && ((words > 1 && strides[2] != 1) || strides[1] != words ||
                                       (mask.partial_bits.shape[0] > 1 && strides[0] != block_words)))
    fail(kInvalid, "block_mask.partial_bits: strides [", strides[0], ", ", strides[1], ", ", strides[2],
         "], must be [", block_words, ", ", words, ", 1]; pass a contiguous copy");
  lists.begin = static_cast<const std::int32_t*>(mask.partial_begin.data);
  lists.begin_stride_batch = effective_stride(mask.partial_begin, 0);
  lists.begin_stride_head = effective_stride(mask.partial_begin, 1);
  lists.begin_stride_row = effective_stride(mask.partial_begin, 2);
  lists.bits = static_cast<const std::uint32_t*>(mask.partial_bits.data);
  lists.bit_blocks = mask.partial_bits.shape[0];
  p_.contiguous_lists = p_.contiguous_lists && lists.begin_stride_batch == lists.partial.stride_batch &&
                        lists.begin_stride_head == lists.partial.stride_head &&
                        lists.begin_stride_row == lists.partial.stride_row;
}

void Builder::read_gate() {
  p_.has_gate = in_.alpha.present();
  if (in_.alpha.present() != in_.delta.present())
    fail(kInvalid, p_.has_gate ? "delta: missing, but alpha is given" : "alpha: missing, but delta is given",
         "; the pair gate needs both");
  if (!p_.has_gate) {
    if (opt_.gate_threshold)
      fail(kInvalid, "gate_threshold: ", *opt_.gate_threshold,
           ", but there is no gate; give alpha and delta too");
    return;
  }
  const GateExtents alpha{p_.packed_q ? -1 : p_.batch,
                          decode()      ? -1
                          : p_.packed_q ? p_.total_q
                                        : p_.max_seqlen_q,
                          p_.num_heads,
                          "batch",
                          p_.packed_q ? "total_q" : "seqlen_q",
                          "num_heads"};
  const GateExtents delta =
      p_.packed_k ? GateExtents{-1, p_.total_k, p_.num_kv_heads, "", "total_k", "num_kv_heads"}
      : p_.paged
          ? GateExtents{p_.num_pages, p_.page_size, p_.num_kv_heads, "num_pages", "page_size", "num_kv_heads"}
          : GateExtents{p_.batch, p_.max_seqlen_k, p_.num_kv_heads, "batch", "seqlen_k", "num_kv_heads"};
  check_parameter_dtype("alpha", in_.alpha, p_.dtype);
  check_parameter_dtype("delta", in_.delta, p_.dtype);
  check_gate("alpha", in_.alpha, alpha, opt_.gate_layout);
  check_gate("delta", in_.delta, delta, opt_.gate_layout);
  call_.alpha_axes = alpha.axes(opt_.gate_layout);
  call_.delta_axes = delta.axes(opt_.gate_layout);
  p_.gate_threshold_default = !opt_.gate_threshold.has_value();
  p_.gate_test = p_.gate_threshold_default || *opt_.gate_threshold > 0;
  p_.gate_threshold = opt_.gate_threshold.value_or(0);
  p_.log_sigmoid_gate = opt_.log_sigmoid_gate;
  p_.adaptive_gate = opt_.adaptive_gate;
}

void Builder::read_bias_and_sink() {
  p_.has_sink = in_.sink.present();
  if (p_.has_sink) {
    check_parameter_dtype("sink", in_.sink, p_.dtype);
    check_shape("sink", in_.sink, {p_.num_heads}, "[num_heads]");
  }
  p_.has_alibi = in_.alibi_slopes.present();
  if (!p_.has_alibi) return;
  check_parameter_dtype("alibi_slopes", in_.alibi_slopes, p_.dtype);
  if (in_.alibi_slopes.rank == 2)
    check_shape("alibi_slopes", in_.alibi_slopes, {p_.batch, p_.num_heads}, "[batch, num_heads]");
  else
    check_shape("alibi_slopes", in_.alibi_slopes, {p_.num_heads}, "[num_heads] or [batch, num_heads]");
}

// After the shapes: a transposed tensor should be told about its shape. Index tensors may have any strides.
void Builder::check_strides() const {
  for (const auto& [name, view] : call_.inputs)
    if (view->dtype != DType::int32) check_unit_last_stride(name, *view);
}

std::int64_t Builder::read_max_seqlen(const char* name, std::optional<std::int64_t> given, std::int64_t used,
                                      bool used_known) const {
  if (!given) return used;
  if (*given < 0 || *given > kMaxLength)
    fail(kInvalid, name, ": ", *given, ", must be from 0 to ", kMaxLength,
         "; leave it unset for the actual maximum");
  if (used_known && *given < used)
    fail(kInvalid, name, ": ", *given, " is smaller than the longest sequence, ", used,
         "; leave it unset for the actual maximum");
  return *given;
}

// cu_seqlens first: the lengths of the sequences, which all the others are compared with, come from it.
void Builder::read_index_values() {
  const bool readable = p_.device.kind == DeviceKind::cpu;
  Lengths lengths{p_.total_q, p_.total_k, p_.total_q, p_.total_k};
  if (readable) {
    if (p_.packed_q) check_cu_seqlens("cu_seqlens_q", args_.cu_seqlens_q, p_.batch, "query", p_.total_q);
    if (p_.packed_k) check_cu_seqlens("cu_seqlens_k", args_.cu_seqlens_k, p_.batch, "key", p_.total_k);
    lengths = check_lengths(p_, args_);
    if (p_.compress_block > 0) check_compressed_lengths(p_, args_);
    if (p_.paged) check_page_table(p_, args_);
    if (p_.gathered) check_gather_indices(p_, args_);
    if (p_.has_window_sizes) check_window_sizes(p_, args_);
    if (p_.has_block_mask) check_block_mask(p_, args_.block_mask);
  }
  // A bound below what the tensors hold is fine where seqused leaves the rest unused, but the unused rows are
  // still written, so backends get a bound on what is there.
  const std::int64_t max_q =
      read_max_seqlen("max_seqlen_q", opt_.max_seqlen_q, lengths.max_seqlen_q, readable);
  const std::int64_t max_k =
      read_max_seqlen("max_seqlen_k", opt_.max_seqlen_k, lengths.max_seqlen_k, readable);
  if (p_.packed_q) p_.max_seqlen_q = readable ? std::max(max_q, lengths.max_rows) : max_q;
  if (p_.packed_k) p_.max_seqlen_k = readable ? std::max(max_k, lengths.max_keys) : max_k;
  if (p_.paged && opt_.max_seqlen_k) p_.max_seqlen_k = std::min(p_.max_seqlen_k, max_k);
}

void Builder::fill_operands() {
  args_.query = make_operand(in_.query, call_.query_axes);
  args_.key = make_operand(in_.key, call_.key_axes);
  args_.value = make_operand(in_.value, call_.key_axes);
  p_.aligned_query = is_aligned(args_.query);
  p_.aligned_key = is_aligned(args_.key);
  p_.aligned_value = is_aligned(args_.value);
  args_.alpha = make_operand(in_.alpha, call_.alpha_axes);
  args_.delta = make_operand(in_.delta, call_.delta_axes);
  args_.sink = make_operand(in_.sink, {.head = 0});
  args_.alibi_slopes = make_operand(
      in_.alibi_slopes, in_.alibi_slopes.rank == 2 ? Axes{.batch = 0, .head = 1} : Axes{.head = 0});
  call_.lse_axes = decode()      ? Axes{.batch = 0, .head = 1}
                   : p_.packed_q ? Axes{.row = 1, .head = 0}
                                 : Axes{.batch = 0, .row = 2, .head = 1};
}

}  // namespace

Call build_call(Operation operation, const AttentionInputs& inputs, const AttentionOptions& options,
                Purpose purpose) {
  return Builder(operation, inputs, options, purpose).build();
}

}  // namespace fsa
