// SPDX-License-Identifier: Apache-2.0
// What must hold of every part of native sparse attention on every backend: packed sequences are single ones, all
// blocks together are dense attention, a row of blocks is a set, the last rows of a prefill are decode.
#include "test_nsa_util.h"

namespace fsa::test {
namespace {

struct Place {
  const char* backend;
  DType dtype;
};

class NsaProperties : public testing::TestWithParam<Place> {
 protected:
  void SetUp() override {
    setup_.backend = GetParam().backend;
    setup_.dtype = GetParam().dtype;
  }
  double limit() const { return tolerance(GetParam().dtype); }
  double slack() const { return GetParam().dtype == DType::float64 ? 1e-12 : 1e-5; }

  NsaSetup setup_;
};

INSTANTIATE_TEST_SUITE_P(Backends, NsaProperties,
                         testing::Values(Place{"reference", DType::float64}, Place{"cpu", DType::float32}),
                         [](const auto& info) { return std::string(info.param.backend); });

// Rows [begin, begin + count) of `from`, at its row axis, to the start of `to`.
void copy_rows(const Buffer& from, int row_axis, std::int64_t begin, Buffer& to, std::int64_t to_begin,
               std::int64_t count) {
  const auto sizes = [row_axis](const Buffer& buffer) {
    std::int64_t outer = 1, inner = 1;
    for (int axis = 0; axis < row_axis; ++axis) outer *= buffer.shape(axis);
    for (int axis = row_axis + 1; axis < buffer.view().rank; ++axis) inner *= buffer.shape(axis);
    return std::array<std::int64_t, 2>{outer, inner};
  };
  const auto [outer, inner] = sizes(from);
  for (std::int64_t o = 0; o < outer; ++o)
    for (std::int64_t row = 0; row < count; ++row)
      for (std::int64_t i = 0; i < inner; ++i)
        to.put((o * to.shape(row_axis) + to_begin + row) * inner + i,
               from.get((o * from.shape(row_axis) + begin + row) * inner + i));
}

// One sequence alone, batched.
NsaSetup single(const NsaSetup& packed, std::int64_t b) {
  NsaSetup setup = packed;
  setup.cu_seqlens = {};
  setup.spare = 0;
  setup.batch = 1;
  setup.seqlen = packed.rows(b);
  return setup;
}

void expect_rows(const Buffer& packed, int packed_axis, std::int64_t begin, const Buffer& alone, int axis,
                 std::int64_t count, double tolerance, const char* name) {
  Buffer part = alone;
  ASSERT_EQ(alone.shape(axis), count) << name;
  copy_rows(packed, packed_axis, begin, part, 0, count);
  expect_close(part, alone, tolerance, name, 0);
}

const std::vector<std::int32_t> kLengths = {0, 100, 100, 101, 131, 292, 300};

TEST_P(NsaProperties, PackedCompressionIsThatOfEachSequence) {
  setup_.cu_seqlens = kLengths;
  setup_.spare = 5;
  setup_.num_kv_heads = 2;
  setup_.head_dim = 12;
  setup_.pe = true;
  for (const nsa::CompressKind kind :
       {nsa::CompressKind::linear, nsa::CompressKind::mean, nsa::CompressKind::weighted}) {
    setup_.kind = kind;
    Compression packed(setup_);
    packed.forward();
    packed.backward();
    Buffer grad_weight = packed.grad_weight, grad_pe = packed.grad_pe;
    if (grad_weight.present()) grad_weight.fill(0);
    grad_pe.fill(0);
    const auto add = [](Buffer& sum, const Buffer& part) {
      for (std::int64_t i = 0; part.present() && i < sum.numel(); ++i) sum.put(i, sum.get(i) + part.get(i));
    };
    const std::vector<std::int32_t> cu_compressed = setup_.cu_seqlens_compressed();
    for (std::int64_t b = 0; b < setup_.sequences(); ++b) {
      Compression alone(single(setup_, b));
      alone.weight = packed.weight;
      alone.pe = packed.pe;
      copy_rows(packed.x, 0, kLengths[b], alone.x, 0, setup_.rows(b));
      const std::int64_t windows = setup_.windows(b);
      if (windows > 0) copy_rows(packed.grad_out, 0, cu_compressed[b], alone.grad_out, 0, windows);
      alone.forward();
      alone.backward();
      expect_rows(packed.out, 0, cu_compressed[b], alone.out, 1, windows, limit(), "out");
      expect_rows(packed.grad_x, 0, kLengths[b], alone.grad_x, 1, setup_.rows(b), limit(), "grad_x");
      add(grad_weight, alone.grad_weight);
      add(grad_pe, alone.grad_pe);
    }
    for (std::int64_t i = 0; i < 5; ++i)
      for (std::int64_t d = 0; d < 12; ++d) {
        EXPECT_EQ(packed.out.at(cu_compressed.back() + i, 1, d), 0) << "beyond the sequences";
        EXPECT_EQ(packed.grad_x.at(kLengths.back() + i, 1, d), 0);
      }
    if (grad_weight.present()) expect_close(packed.grad_weight, grad_weight, limit(), "grad_weight", 0);
    expect_close(packed.grad_pe, grad_pe, limit(), "grad_pe", 0);
  }
}

TEST_P(NsaProperties, BatchedCompressionIsPackedCompression) {
  setup_.batch = 3;
  setup_.seqlen = 75;
  setup_.head_dim = 8;
  setup_.num_kv_heads = 2;
  Compression batched(setup_);
  batched.forward();
  batched.backward();
  setup_.cu_seqlens = {0, 75, 150, 225};
  Compression packed(setup_);
  packed.weight = batched.weight;
  for (std::int64_t i = 0; i < batched.x.numel(); ++i) packed.x.put(i, batched.x.get(i));
  for (std::int64_t i = 0; i < batched.grad_out.numel(); ++i) packed.grad_out.put(i, batched.grad_out.get(i));
  packed.forward();
  packed.backward();
  expect_close(packed.out, batched.out, limit(), "out", 0);
  expect_close(packed.grad_x, batched.grad_x, limit(), "grad_x", 0);
  expect_close(packed.grad_weight, batched.grad_weight, limit(), "grad_weight", 0);
}

TEST_P(NsaProperties, MeanDoesNotDependOnTheOrderInsideAWindow) {
  setup_.seqlen = 96;
  setup_.head_dim = 7;
  setup_.kind = nsa::CompressKind::mean;
  setup_.compress_stride = 32;
  Compression c(setup_);
  c.forward();
  Compression reversed = c;
  for (std::int64_t t = 0; t < 96; ++t) copy_rows(c.x, 1, t, reversed.x, t / 32 * 32 + 31 - t % 32, 1);
  reversed.forward();
  expect_same_outputs(reversed, c, limit());
}

TEST_P(NsaProperties, TokensThatFillNoWindowChangeNothing) {
  setup_.seqlen = 47;
  setup_.head_dim = 9;
  Compression c(setup_);
  c.forward();
  Compression changed = c;
  for (std::int64_t t = 32; t < 47; ++t)
    for (std::int64_t d = 0; d < 9; ++d) changed.x.set(1e3, 0, t, 0, d);
  changed.forward();
  EXPECT_TRUE(same_bytes(c.out, changed.out));
  c.backward();
  for (std::int64_t t = 32; t < 47; ++t)
    for (std::int64_t d = 0; d < 9; ++d) EXPECT_EQ(c.grad_x.at(0, t, 0, d), 0);
}

// ---- Selection ----

TEST_P(NsaProperties, PackedSelectionIsThatOfEachSequence) {
  setup_.cu_seqlens = {0, 500, 500, 501, 531, 1200, 1220};
  setup_.spare = 3;
  setup_.num_heads = 4;
  setup_.num_kv_heads = 2;
  setup_.head_dim = 20;
  setup_.top_k = 5;
  Selection packed(setup_);
  packed.run();
  expect_best_blocks(packed, slack());
  const std::vector<std::int32_t> cu_compressed = setup_.cu_seqlens_compressed();
  for (std::int64_t b = 0; b < setup_.sequences(); ++b) {
    Selection alone(single(setup_, b));
    copy_rows(packed.query, 0, setup_.cu_seqlens[b], alone.query, 0, setup_.rows(b));
    if (setup_.windows(b) > 0) copy_rows(packed.key, 0, cu_compressed[b], alone.key, 0, setup_.windows(b));
    for (std::int64_t head = 0; head < 4; ++head)
      for (std::int64_t row = 0; row < setup_.rows(b); ++row)
        alone.lse.set(packed.lse.at(head, setup_.cu_seqlens[b] + row), 0, head, row);
    alone.run();
    expect_best_blocks(alone, slack());
  }
  for (std::int64_t head = 0; head < 2; ++head)
    for (std::int64_t row = 1220; row < 1223; ++row)
      for (std::int64_t slot = 0; slot < 5; ++slot)
        EXPECT_EQ(packed.selected_blocks.at(head, row, slot), -1) << "beyond the sequences";
}

TEST_P(NsaProperties, LastRowsSelectAsPrefillDoes) {
  setup_.seqlen = 700;
  setup_.num_heads = 6;
  setup_.num_kv_heads = 2;
  setup_.head_dim = 16;
  setup_.top_k = 6;
  Selection prefill(setup_);
  prefill.run();
  NsaSetup setup = setup_;
  setup.batch = 5;
  setup.room = 760;
  setup.seqused_k = {3, 64, 65, 352, 700};
  for (const std::int64_t rows : {1, 2, 3}) {
    setup.seqlen = rows;
    Selection last(setup);
    for (std::int64_t b = 0; b < 5; ++b) {
      const std::int64_t tokens = setup.seqused_k[b];
      for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t head = 0; head < 6; ++head) {
          last.lse.set(prefill.lse.at(0, head, tokens - rows + row), b, head, row);
          for (std::int64_t d = 0; d < 16; ++d)
            last.query.set(prefill.query.at(0, tokens - rows + row, head, d), b, row, head, d);
        }
      for (std::int64_t i = 0; i < setup.windows(b); ++i)
        for (std::int64_t head = 0; head < 2; ++head)
          for (std::int64_t d = 0; d < 16; ++d) last.key.set(prefill.key.at(0, i, head, d), b, i, head, d);
    }
    last.run();
    expect_best_blocks(last, slack());
    int different = 0;
    for (std::int64_t b = 0; b < 5; ++b)
      for (std::int64_t head = 0; head < 2; ++head)
        for (std::int64_t row = 0; row < rows; ++row)
          for (std::int64_t slot = 0; slot < 6; ++slot)
            different += last.block(b, head, row, slot) !=
                         prefill.block(0, head, setup.seqused_k[b] - rows + row, slot);
    EXPECT_EQ(different, 0) << rows << " rows";
  }
}

// Equal keys make equal scores wherever the windows of two blocks are alike.
TEST_P(NsaProperties, LowestIndexWinsTies) {
  setup_.seqlen = 64 * 12;
  setup_.num_heads = 3;
  setup_.head_dim = 8;
  setup_.top_k = 5;
  setup_.compress_stride = 32;
  setup_.init_blocks = 0;
  setup_.local_blocks = 1;
  Selection s(setup_);
  s.key.fill(0.5);
  s.compute_lse();
  s.run();
  for (std::int64_t slot = 0; slot < 5; ++slot)
    EXPECT_EQ(s.block(0, 0, 64 * 12 - 1, slot), slot < 4 ? slot : 11);
}

TEST_P(NsaProperties, NanScoresRankBehindAllOthers) {
  setup_.seqlen = 64 * 10;
  setup_.head_dim = 4;
  setup_.top_k = 4;
  setup_.compress_stride = 32;
  Selection s(setup_);
  for (std::int64_t i = 4; i < 10; ++i) s.key.set(kNan, 0, i, 0, 0);  // the windows of blocks 2 to 4
  s.lse.fill(0);
  s.run();
  const std::int64_t row = 64 * 10 - 1;
  EXPECT_EQ(s.block(0, 0, row, 0), 0);
  const std::int32_t chosen = s.block(0, 0, row, 1);
  EXPECT_TRUE(chosen == 1 || (chosen >= 5 && chosen <= 7)) << chosen;
  EXPECT_EQ(s.block(0, 0, row, 2), 8);
  EXPECT_EQ(s.block(0, 0, row, 3), 9);
}

// ---- Selected attention ----

std::vector<std::int64_t> all_blocks(std::int64_t count) {
  std::vector<std::int64_t> blocks(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) blocks[static_cast<std::size_t>(i)] = i;
  return blocks;
}

TEST_P(NsaProperties, AllBlocksAreDenseCausalAttention) {
  setup_.num_heads = 6;
  setup_.num_kv_heads = 2;
  setup_.head_dim = 24;
  setup_.head_dim_v = 17;
  setup_.cu_seqlens = {0, 150, 150, 151, 300};
  setup_.spare = 4;
  setup_.top_k = 7;
  for (const nsa::Algorithm algorithm : {nsa::Algorithm::kv_outer, nsa::Algorithm::query_outer}) {
    setup_.algorithm = algorithm;
    setup_.block_size = algorithm == nsa::Algorithm::kv_outer ? 32 : 64;
    SelectedAttention selected(setup_);
    selected.set_every_row([&](std::int64_t b, auto, auto) { return all_blocks(selected.blocks(b)); });
    selected.forward();
    selected.backward();
    SelectedAttention dense = selected;
    for (Buffer* buffer : {&dense.out, &dense.lse, &dense.grad_query, &dense.grad_key, &dense.grad_value})
      buffer->poison();
    const AttentionInputs inputs{.query = dense.query.view(),
                                 .key = dense.key.view(),
                                 .value = dense.value.view(),
                                 .cu_seqlens_q = dense.cu_seqlens.view(),
                                 .cu_seqlens_k = dense.cu_seqlens.view()};
    const AttentionOptions options{.causal = true, .backend = "reference"};
    forward({.inputs = inputs, .options = options, .out = dense.out.view(), .lse = dense.lse.view()});
    backward({.inputs = inputs,
              .options = options,
              .out = dense.out.view(),
              .lse = dense.lse.view(),
              .grad_out = dense.grad_out.view(),
              .grad_query = dense.grad_query.view(),
              .grad_key = dense.grad_key.view(),
              .grad_value = dense.grad_value.view()});
    expect_same_outputs(selected, dense, limit());
    expect_same_gradients(selected, dense, 4 * limit());
  }
}

TEST_P(NsaProperties, PackedSelectedAttentionIsThatOfEachSequence) {
  setup_.num_heads = 4;
  setup_.num_kv_heads = 2;
  setup_.head_dim = 16;
  setup_.head_dim_v = 8;
  setup_.cu_seqlens = kLengths;
  setup_.spare = 2;
  setup_.block_size = 32;
  for (const nsa::Algorithm algorithm : {nsa::Algorithm::kv_outer, nsa::Algorithm::query_outer}) {
    setup_.algorithm = algorithm;
    SelectedAttention packed(setup_);
    Random random(3);
    packed.random_blocks(random);
    packed.forward();
    packed.backward();
    for (std::int64_t b = 0; b < setup_.sequences(); ++b) {
      const std::int64_t begin = kLengths[b], rows = setup_.rows(b);
      SelectedAttention alone(single(setup_, b));
      if (rows > 0) {
        copy_rows(packed.query, 0, begin, alone.query, 0, rows);
        copy_rows(packed.key, 0, begin, alone.key, 0, rows);
        copy_rows(packed.value, 0, begin, alone.value, 0, rows);
        copy_rows(packed.grad_out, 0, begin, alone.grad_out, 0, rows);
        alone.set_every_row([&](auto, std::int64_t head, std::int64_t row) {
          std::vector<std::int64_t> entries;
          for (std::int64_t slot = 0; slot < setup_.top_k; ++slot)
            entries.push_back(static_cast<std::int64_t>(packed.selected_blocks.at(head, begin + row, slot)));
          return entries;
        });
      }
      alone.forward();
      alone.backward();
      expect_rows(packed.out, 0, begin, alone.out, 1, rows, limit(), "out");
      expect_rows(packed.grad_query, 0, begin, alone.grad_query, 1, rows, 4 * limit(), "grad_query");
      expect_rows(packed.grad_key, 0, begin, alone.grad_key, 1, rows, 4 * limit(), "grad_key");
      expect_rows(packed.grad_value, 0, begin, alone.grad_value, 1, rows, 4 * limit(), "grad_value");
    }
    for (std::int64_t row = 300; row < 302; ++row)
      for (std::int64_t head = 0; head < 4; ++head) {
        EXPECT_EQ(packed.lse.at(head, row), -kInf) << "beyond the sequences";
        EXPECT_EQ(packed.out.at(row, head, 7), 0);
        EXPECT_EQ(packed.grad_query.at(row, head, 15), 0);
        EXPECT_EQ(packed.grad_key.at(row, head / 2, 15), 0);
        EXPECT_EQ(packed.grad_value.at(row, head / 2, 7), 0);
      }
  }
}

TEST_P(NsaProperties, RowOfBlocksIsASet) {
  setup_.batch = 2;
  setup_.seqlen = 200;
  setup_.num_heads = 4;
  setup_.num_kv_heads = 2;
  setup_.head_dim = 16;
  setup_.head_dim_v = 16;
  setup_.block_size = 16;
  setup_.top_k = 10;
  for (const nsa::Algorithm algorithm : {nsa::Algorithm::kv_outer, nsa::Algorithm::query_outer}) {
    setup_.algorithm = algorithm;
    SelectedAttention tidy(setup_), untidy(setup_);
    Random random(11);
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t head = 0; head < 2; ++head)
        for (std::int64_t row = 0; row < 200; ++row) {
          const std::int64_t own = row / 16;
          std::vector<std::int64_t> set;
          for (std::int64_t block = 0; block <= own && set.size() < 5; ++block)
            if (random.below(2) == 0) set.push_back(block);
          tidy.set_blocks(b, head, row, set);
          std::vector<std::int64_t> entries = set;
          while (entries.size() < 10) {
            const std::int64_t what = random.below(3);
            if (what == 0) entries.push_back(-1);
            if (what == 1 && !set.empty())
              entries.push_back(
                  set[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(set.size())))]);
            if (what == 2 && own < 12) entries.push_back(own + 1 + random.below(12 - own));
          }
          for (std::int64_t i = 9; i > 0; --i)
            std::swap(entries[static_cast<std::size_t>(i)],
                      entries[static_cast<std::size_t>(random.below(i + 1))]);
          untidy.set_blocks(b, head, row, entries);
        }
    tidy.forward();
    untidy.forward();
    tidy.backward();
    untidy.backward();
    expect_same_outputs(untidy, tidy, limit());
    expect_same_gradients(untidy, tidy, 4 * limit());
  }
}

TEST_P(NsaProperties, AlgorithmsAndChunksAgree) {
  setup_.seqlen = 333;
  setup_.num_heads = 6;
  setup_.num_kv_heads = 3;
  setup_.head_dim = setup_.head_dim_v = 32;
  setup_.block_size = 32;
  setup_.algorithm = nsa::Algorithm::query_outer;
  SelectedAttention first(setup_);
  Random random(4);
  first.random_blocks(random);
  first.forward();
  first.backward();
  SelectedAttention other = first;
  other.setup.algorithm = nsa::Algorithm::kv_outer;
  for (const std::int64_t chunk : {0, 1, 7, 64, 1000}) {
    other.setup.chunk_tokens = chunk;
    other.forward();
    other.backward();
    expect_same_outputs(other, first, limit());
    expect_same_gradients(other, first, 4 * limit());
  }
}

TEST_P(NsaProperties, LastRowsAttendAsPrefillDoes) {
  setup_.seqlen = 200;
  setup_.num_heads = 6;
  setup_.num_kv_heads = 2;
  setup_.head_dim = 16;
  setup_.head_dim_v = 8;
  setup_.block_size = 16;
  for (const nsa::Algorithm algorithm : {nsa::Algorithm::kv_outer, nsa::Algorithm::query_outer}) {
    setup_.algorithm = algorithm;
    SelectedAttention prefill(setup_);
    Random random(8);
    prefill.set_every_row([&](auto, auto, std::int64_t row) {
      std::vector<std::int64_t> entries{row / 16};
      for (int slot = 1; slot < 4; ++slot) entries.push_back(random.below(row / 16 + 1));
      return entries;
    });
    prefill.forward();
    NsaSetup setup = setup_;
    setup.batch = 4;
    setup.room = 211;
    setup.seqused_k = {3, 16, 77, 200};
    for (const std::int64_t rows : {1, 2, 3}) {
      setup.seqlen = rows;
      SelectedAttention last(setup);
      Buffer expected = last.out, expected_lse = last.lse;
      for (std::int64_t b = 0; b < 4; ++b) {
        const std::int64_t tokens = setup.seqused_k[b], first = tokens - rows;
        for (std::int64_t head = 0; head < 2; ++head) {
          for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t d = 0; d < 16; ++d) last.key.set(prefill.key.at(0, t, head, d), b, t, head, d);
            for (std::int64_t d = 0; d < 8; ++d)
              last.value.set(prefill.value.at(0, t, head, d), b, t, head, d);
          }
          for (std::int64_t row = 0; row < rows; ++row)
            for (std::int64_t slot = 0; slot < 4; ++slot)
              last.selected_blocks.set(prefill.selected_blocks.at(0, head, first + row, slot), b, head, row,
                                       slot);
        }
        for (std::int64_t row = 0; row < rows; ++row)
          for (std::int64_t head = 0; head < 6; ++head) {
            for (std::int64_t d = 0; d < 16; ++d)
              last.query.set(prefill.query.at(0, first + row, head, d), b, row, head, d);
            for (std::int64_t d = 0; d < 8; ++d)
              expected.set(prefill.out.at(0, first + row, head, d), b, row, head, d);
            expected_lse.set(prefill.lse.at(0, head, first + row), b, head, row);
          }
      }
      last.forward();
      expect_close(last.out, expected, limit(), "out", 0);
      expect_close(last.lse, expected_lse, limit(), "lse", 0);
      last.backward();
      for (std::int64_t b = 0; b < 4; ++b)
        for (std::int64_t t = setup.seqused_k[b]; t < 211; ++t) {
          EXPECT_EQ(last.grad_key.at(b, t, 1, 15), 0) << "beyond the tokens";
          EXPECT_EQ(last.grad_value.at(b, t, 1, 7), 0);
        }
    }
  }
}

TEST_P(NsaProperties, RowsWithoutAKey) {
  setup_.seqlen = 100;
  setup_.num_heads = 2;
  setup_.head_dim = setup_.head_dim_v = 8;
  setup_.block_size = 16;
  for (const nsa::Algorithm algorithm : {nsa::Algorithm::kv_outer, nsa::Algorithm::query_outer}) {
    setup_.algorithm = algorithm;
    SelectedAttention a(setup_);
    a.set_every_row([](auto, auto, std::int64_t row) {
      return row % 2 == 0 ? std::vector<std::int64_t>{-1, 6} : std::vector<std::int64_t>{0, row / 16};
    });  // block 6 begins at token 96
    a.forward();
    a.backward();
    for (std::int64_t row = 0; row < 96; row += 2)
      for (std::int64_t head = 0; head < 2; ++head) {
        EXPECT_EQ(a.lse.at(0, head, row), -kInf) << row;
        for (std::int64_t d = 0; d < 8; ++d) {
          EXPECT_EQ(a.out.at(0, row, head, d), 0) << row;
          EXPECT_EQ(a.grad_query.at(0, row, head, d), 0) << row;
        }
      }
    for (const Buffer* grad : {&a.grad_query, &a.grad_key, &a.grad_value})
      for (std::int64_t i = 0; i < grad->numel(); ++i) EXPECT_TRUE(std::isfinite(grad->get(i)));
    for (std::int64_t d = 0; d < 8; ++d) EXPECT_NE(a.grad_key.at(0, 3, 0, d), 0);
  }
}

TEST_P(NsaProperties, LargeLogits) {
  setup_.seqlen = 150;
  setup_.head_dim = setup_.head_dim_v = 16;
  setup_.block_size = 32;
  setup_.softmax_scale = 60;  // logits of some hundred
  for (const nsa::Algorithm algorithm : {nsa::Algorithm::kv_outer, nsa::Algorithm::query_outer}) {
    setup_.algorithm = algorithm;
    SelectedAttention a(setup_);
    Random random(2);
    a.random_blocks(random);
    a.forward();
    SelectedAttention expected = with_backend(a, "reference");
    expected.forward();
    expect_close(a.lse, expected.lse, 1e-6, "lse", 0);
    expect_close(a.out, expected.out, 1e-3, "out", 0);  // a logit of 500 has 3e-5 of rounding
  }
}

TEST_P(NsaProperties, NothingToDo) {
  for (const std::vector<std::int32_t>& cu : {std::vector<std::int32_t>{0}, {0, 0}, {0, 0, 0}})
    for (const std::int64_t spare : {0, 3}) {
      setup_.cu_seqlens = cu;
      setup_.spare = spare;
      setup_.num_heads = 2;
      Compression compression(setup_);
      compression.forward();
      compression.backward();
      for (std::int64_t i = 0; i < compression.grad_weight.numel(); ++i)
        ASSERT_EQ(compression.grad_weight.get(i), 0);
      Selection selection(setup_);
      selection.run();
      SelectedAttention selected(setup_);
      selected.selected_blocks.poison();
      selected.forward();
      selected.backward();
      for (std::int64_t i = 0; i < selected.lse.numel(); ++i) ASSERT_EQ(selected.lse.get(i), -kInf);
      for (std::int64_t i = 0; i < selected.grad_value.numel(); ++i) ASSERT_EQ(selected.grad_value.get(i), 0);
    }
  setup_.cu_seqlens = {};
  setup_.spare = 0;
  for (const auto& [batch, seqlen] : {std::array<std::int64_t, 2>{0, 5}, {2, 0}, {2, 1}, {1, 31}}) {
    setup_.batch = batch;
    setup_.seqlen = seqlen;
    Compression compression(setup_);
    compression.forward();
    compression.backward();
    Selection selection(setup_);
    selection.run();
    expect_best_blocks(selection, slack());
    SelectedAttention selected(setup_);
    selected.set_every_row([](auto, auto, auto) { return std::vector<std::int64_t>{0}; });
    selected.forward();
    selected.backward();
    Combination combination(setup_);
    combination.forward();
    combination.backward();
  }
}

// Reading strided inputs: heads before rows, as torch's transpose leaves them, and an expanded grad_out.
TEST_P(NsaProperties, StridesDoNotMatter) {
  setup_.batch = 2;
  setup_.seqlen = 60;
  setup_.num_heads = 4;
  setup_.num_kv_heads = 2;
  setup_.head_dim = setup_.head_dim_v = 8;
  setup_.block_size = 16;
  const auto transposed = [](const Buffer& given) {
    const std::int64_t rows = given.shape(1), heads = given.shape(2), dims = given.shape(3);
    Buffer result(given.dtype(), shape_of(given), {rows * heads * dims, dims, rows * dims, 1});
    for (std::int64_t i = 0; i < given.numel(); ++i) result.put(i, given.get(i));
    return result;
  };
  SelectedAttention plain(setup_);
  Random random(6);
  plain.random_blocks(random);
  plain.grad_out.fill(0.25);
  plain.forward();
  plain.backward();
  SelectedAttention strided = plain;
  for (Buffer SelectedAttention::* tensor :
       {&SelectedAttention::query, &SelectedAttention::key, &SelectedAttention::value,
        &SelectedAttention::out, &SelectedAttention::grad_query, &SelectedAttention::grad_key,
        &SelectedAttention::grad_value})
    strided.*tensor = transposed(plain.*tensor);
  strided.grad_out = Buffer(setup_.dtype, shape_of(plain.grad_out), {0, 0, 0, 0});
  strided.grad_out.put(0, 0.25);
  strided.forward();
  strided.backward();
  expect_same_outputs(strided, plain, limit());
  expect_same_gradients(strided, plain, limit());

  Compression compression(setup_);
  compression.grad_out.fill(0.5);
  compression.forward();
  compression.backward();
  Compression other = compression;
  for (Buffer Compression::* tensor : {&Compression::x, &Compression::out, &Compression::grad_x})
    other.*tensor = transposed(compression.*tensor);
  other.grad_out = Buffer(setup_.dtype, shape_of(compression.grad_out), {0, 0, 0, 0});
  other.grad_out.put(0, 0.5);
  other.forward();
  other.backward();
  expect_same_outputs(other, compression, limit());
  expect_same_gradients(other, compression, limit());

  for (const bool per_head : {false, true}) {
    setup_.gates_per_head = per_head;
    Combination combination(setup_);
    combination.grad_out.fill(0.5);
    combination.forward();
    combination.backward();
    Combination strange = combination;
    strange.selected = transposed(combination.selected);
    strange.grad_selected = transposed(combination.grad_selected);
    strange.out = transposed(combination.out);
    strange.grad_out = Buffer(setup_.dtype, shape_of(combination.grad_out), {0, 0, 0, 0});
    strange.grad_out.put(0, 0.5);
    std::vector<std::int64_t> strides(combination.gates.view().rank);  // branches first
    std::int64_t stride = 1;
    for (std::size_t axis = strides.size() - 1; axis-- > 0;) {
      strides[axis] = stride;
      stride *= combination.gates.shape(static_cast<int>(axis));
    }
    strides.back() = stride;
    strange.gates = Buffer(combination.gates.dtype(), shape_of(combination.gates), strides);
    for (std::int64_t i = 0; i < combination.gates.numel(); ++i)
      strange.gates.put(i, combination.gates.get(i));
    strange.forward();
    strange.backward();
    expect_same_outputs(strange, combination, limit());
    expect_same_gradients(strange, combination, limit());
  }
}

}  // namespace
}  // namespace fsa::test
