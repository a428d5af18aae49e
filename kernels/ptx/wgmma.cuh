// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix multiply: D[64 x N] (+)= A[64 x 16] * B[16 x N], float32 accumulators in registers.
//
// Inline assembly has no way to name "all registers of an array", so the operand lists are spelled by macros,
// eight registers a row. Everything outside this file sees two functions, multiply_shared and
// multiply_registers.
#pragma once

#include "core/base.cuh"
#include "core/config.h"

namespace fsa::kernels::ptx {

// Before the first multiply that reads or writes registers which ordinary instructions have touched.
FSA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

FSA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending committed groups are in flight.
template <int32 kPending>
FSA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Multiplies write their registers behind the compiler's back: values may be used only after wgmma_wait and
// this.
template <int32 kCount>
FSA_DEVICE void settle(float (&registers)[kCount]) {
#pragma unroll
  for (int32 i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int32 kCount>
FSA_DEVICE void settle(uint32 (&registers)[kCount]) {
#pragma unroll
  for (int32 i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#define FSA_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FSA_TEXT_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FSA_TEXT_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FSA_TEXT_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FSA_TEXT_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FSA_TEXT_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FSA_TEXT_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FSA_TEXT_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FSA_TEXT_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FSA_TEXT_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FSA_TEXT_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FSA_TEXT_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FSA_TEXT_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FSA_TEXT_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FSA_TEXT_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FSA_TEXT_15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define FSA_LIST_8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

#define FSA_TEXT_N8 "%0, %1, %2, %3"
#define FSA_LIST_N8(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FSA_TEXT_N32 FSA_TEXT_0 ", " FSA_TEXT_1
#define FSA_LIST_N32(d) FSA_LIST_8(d, 0), FSA_LIST_8(d, 8)
#define FSA_TEXT_N64 FSA_TEXT_N32 ", " FSA_TEXT_2 ", " FSA_TEXT_3
#define FSA_LIST_N64(d) FSA_LIST_N32(d), FSA_LIST_8(d, 16), FSA_LIST_8(d, 24)
#define FSA_TEXT_N80 FSA_TEXT_N64 ", " FSA_TEXT_4
#define FSA_LIST_N80(d) FSA_LIST_N64(d), FSA_LIST_8(d, 32)
#define FSA_TEXT_N96 FSA_TEXT_N80 ", " FSA_TEXT_5
#define FSA_LIST_N96(d) FSA_LIST_N80(d), FSA_LIST_8(d, 40)
#define FSA_TEXT_N112 FSA_TEXT_N96 ", " FSA_TEXT_6
#define FSA_LIST_N112(d) FSA_LIST_N96(d), FSA_LIST_8(d, 48)
#define FSA_TEXT_N128 FSA_TEXT_N112 ", " FSA_TEXT_7
#define FSA_LIST_N128(d) FSA_LIST_N112(d), FSA_LIST_8(d, 56)
#define FSA_TEXT_N160 FSA_TEXT_N128 ", " FSA_TEXT_8 ", " FSA_TEXT_9
#define FSA_LIST_N160(d) FSA_LIST_N128(d), FSA_LIST_8(d, 64), FSA_LIST_8(d, 72)
#define FSA_TEXT_N176 FSA_TEXT_N160 ", " FSA_TEXT_10
#define FSA_LIST_N176(d) FSA_LIST_N160(d), FSA_LIST_8(d, 80)
#define FSA_TEXT_N192 FSA_TEXT_N176 ", " FSA_TEXT_11
#define FSA_LIST_N192(d) FSA_LIST_N176(d), FSA_LIST_8(d, 88)
#define FSA_TEXT_N256 FSA_TEXT_N192 ", " FSA_TEXT_12 ", " FSA_TEXT_13 ", " FSA_TEXT_14 ", " FSA_TEXT_15
#define FSA_LIST_N256(d) \
  FSA_LIST_N192(d), FSA_LIST_8(d, 96), FSA_LIST_8(d, 104), FSA_LIST_8(d, 112), FSA_LIST_8(d, 120)

#define FSA_WGMMA_SHARED(N, TYPE, A, B, P) FSA_WGMMA_SHARED_AS(N, TYPE, A, B, P, "0, 0")

// ROWS: "a, b", 1 where the operand lies with its inner values on different lines.
#define FSA_WGMMA_SHARED_AS(N, TYPE, A, B, P, ROWS)                                               \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " P                            \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FSA_TEXT_N##N \
               "}, " A ", " B ", accumulate, 1, 1, " ROWS ";\n}\n"                                \
               : FSA_LIST_N##N(d)                                                                 \
               : "l"(a), "l"(b), "r"(accumulate)                                                  \
               : "memory")

#define FSA_WGMMA_REGISTERS(N, TYPE, A0, A1, A2, A3, B) \
  FSA_WGMMA_REGISTERS_AS(N, TYPE, A0, A1, A2, A3, B, "1", "1")

#define FSA_WGMMA_REGISTERS_AS(N, TYPE, A0, A1, A2, A3, B, ACCUMULATE, ROWS)                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FSA_TEXT_N##N \
               "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", " ACCUMULATE ", 1, 1, " ROWS ";\n"    \
               : FSA_LIST_N##N(d)                                                                 \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)                                       \
               : "memory")

// Both operands in shared memory, each stored with the 16 inner values contiguous.
template <ElementType kElement, int32 kN>
FSA_DEVICE void multiply_shared(float (&d)[kN / 2], uint64 a, uint64 b, uint32 accumulate) {
  constexpr bool kBf16 = kElement == ElementType::bf16;
  if constexpr (kN == 32) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(32, "bf16", "%16", "%17", "%18");
    else
      FSA_WGMMA_SHARED(32, "f16", "%16", "%17", "%18");
  } else if constexpr (kN == 64) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(64, "bf16", "%32", "%33", "%34");
    else
      FSA_WGMMA_SHARED(64, "f16", "%32", "%33", "%34");
  } else if constexpr (kN == 80) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(80, "bf16", "%40", "%41", "%42");
    else
      FSA_WGMMA_SHARED(80, "f16", "%40", "%41", "%42");
  } else if constexpr (kN == 96) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(96, "bf16", "%48", "%49", "%50");
    else
      FSA_WGMMA_SHARED(96, "f16", "%48", "%49", "%50");
  } else if constexpr (kN == 112) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(112, "bf16", "%56", "%57", "%58");
    else
      FSA_WGMMA_SHARED(112, "f16", "%56", "%57", "%58");
  } else if constexpr (kN == 128) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(128, "bf16", "%64", "%65", "%66");
    else
      FSA_WGMMA_SHARED(128, "f16", "%64", "%65", "%66");
  } else if constexpr (kN == 160) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(160, "bf16", "%80", "%81", "%82");
    else
      FSA_WGMMA_SHARED(160, "f16", "%80", "%81", "%82");
  } else if constexpr (kN == 176) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(176, "bf16", "%88", "%89", "%90");
    else
      FSA_WGMMA_SHARED(176, "f16", "%88", "%89", "%90");
  } else if constexpr (kN == 192) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(192, "bf16", "%96", "%97", "%98");
    else
      FSA_WGMMA_SHARED(192, "f16", "%96", "%97", "%98");
  } else if constexpr (kN == 256) {
    if constexpr (kBf16)
      FSA_WGMMA_SHARED(256, "bf16", "%128", "%129", "%130");
    else
      FSA_WGMMA_SHARED(256, "f16", "%128", "%129", "%130");
  } else {
    static_assert(kN == 0, "add this width to ptx/wgmma.cuh");
  }
}

#define FSA_WGMMA_SHARED_ROWS(N, A, B, P)            \
  if constexpr (kBf16 && kRowsOfA)                   \
    FSA_WGMMA_SHARED_AS(N, "bf16", A, B, P, "1, 1"); \
  else if constexpr (kBf16)                          \
    FSA_WGMMA_SHARED_AS(N, "bf16", A, B, P, "0, 1"); \
  else if constexpr (kRowsOfA)                       \
    FSA_WGMMA_SHARED_AS(N, "f16", A, B, P, "1, 1");  \
  else                                               \
    FSA_WGMMA_SHARED_AS(N, "f16", A, B, P, "0, 1")

// Both operands in shared memory, B with the N values contiguous; A with the 64 values contiguous if kRowsOfA.
template <ElementType kElement, int32 kN, bool kRowsOfA>
FSA_DEVICE void multiply_shared_rows(float (&d)[kN / 2], uint64 a, uint64 b, uint32 accumulate) {
  constexpr bool kBf16 = kElement == ElementType::bf16;
  if constexpr (kN == 32) {
    FSA_WGMMA_SHARED_ROWS(32, "%16", "%17", "%18");
  } else if constexpr (kN == 64) {
    FSA_WGMMA_SHARED_ROWS(64, "%32", "%33", "%34");
  } else if constexpr (kN == 128) {
    FSA_WGMMA_SHARED_ROWS(128, "%64", "%65", "%66");
  } else {
    static_assert(kN == 0, "add this width to ptx/wgmma.cuh");
  }
}

// The same, of 128 columns whose halves lie in two arrays; both operands as rows.
template <ElementType kElement>
FSA_DEVICE void multiply_shared_rows_halves(float (&left)[32], float (&right)[32], uint64 a, uint64 b,
                                            uint32 accumulate) {
#define FSA_WGMMA_HALVES(TYPE)                                                        \
  asm volatile(                                                                       \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" FSA_TEXT_N128 \
      "}, %64, %65, accumulate, 1, 1, 1, 1;\n}\n"                                     \
      : FSA_LIST_N64(left), FSA_LIST_N64(right)                                       \
      : "l"(a), "l"(b), "r"(accumulate)                                               \
      : "memory")
  if constexpr (kElement == ElementType::bf16)
    FSA_WGMMA_HALVES("bf16");
  else
    FSA_WGMMA_HALVES("f16");
#undef FSA_WGMMA_HALVES
}

// A in registers, B in shared memory with the N values contiguous; always accumulates.
template <ElementType kElement, int32 kN>
FSA_DEVICE void multiply_registers(float (&d)[kN / 2], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint64 b) {
  constexpr bool kBf16 = kElement == ElementType::bf16;
  if constexpr (kN == 64) {
    if constexpr (kBf16)
      FSA_WGMMA_REGISTERS(64, "bf16", "%32", "%33", "%34", "%35", "%36");
    else
      FSA_WGMMA_REGISTERS(64, "f16", "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (kN == 96) {
    if constexpr (kBf16)
      FSA_WGMMA_REGISTERS(96, "bf16", "%48", "%49", "%50", "%51", "%52");
    else
      FSA_WGMMA_REGISTERS(96, "f16", "%48", "%49", "%50", "%51", "%52");
  } else if constexpr (kN == 128) {
    if constexpr (kBf16)
      FSA_WGMMA_REGISTERS(128, "bf16", "%64", "%65", "%66", "%67", "%68");
    else
      FSA_WGMMA_REGISTERS(128, "f16", "%64", "%65", "%66", "%67", "%68");
  } else if constexpr (kN == 192) {
    if constexpr (kBf16)
      FSA_WGMMA_REGISTERS(192, "bf16", "%96", "%97", "%98", "%99", "%100");
    else
      FSA_WGMMA_REGISTERS(192, "f16", "%96", "%97", "%98", "%99", "%100");
  } else if constexpr (kN == 256) {
    if constexpr (kBf16)
      FSA_WGMMA_REGISTERS(256, "bf16", "%128", "%129", "%130", "%131", "%132");
    else
      FSA_WGMMA_REGISTERS(256, "f16", "%128", "%129", "%130", "%131", "%132");
  } else {
    static_assert(kN == 0, "add this width to ptx/wgmma.cuh");
  }
}

#define FSA_WGMMA_REGISTERS_COLUMNS(N, A0, A1, A2, A3, B)           \
  if constexpr (kBf16 && kAccumulate)                               \
    FSA_WGMMA_REGISTERS_AS(N, "bf16", A0, A1, A2, A3, B, "1", "0"); \
  else if constexpr (kBf16)                                         \
    FSA_WGMMA_REGISTERS_AS(N, "bf16", A0, A1, A2, A3, B, "0", "0"); \
  else if constexpr (kAccumulate)                                   \
    FSA_WGMMA_REGISTERS_AS(N, "f16", A0, A1, A2, A3, B, "1", "0");  \
  else                                                              \
    FSA_WGMMA_REGISTERS_AS(N, "f16", A0, A1, A2, A3, B, "0", "0")

// A in registers, B in shared memory with the 16 inner values contiguous.
template <ElementType kElement, int32 kN, bool kAccumulate>
FSA_DEVICE void multiply_registers_columns(float (&d)[kN / 2], uint32 a0, uint32 a1, uint32 a2, uint32 a3,
                                           uint64 b) {
  constexpr bool kBf16 = kElement == ElementType::bf16;
  if constexpr (kN == 8) {
    FSA_WGMMA_REGISTERS_COLUMNS(8, "%4", "%5", "%6", "%7", "%8");
  } else if constexpr (kN == 32) {
    FSA_WGMMA_REGISTERS_COLUMNS(32, "%16", "%17", "%18", "%19", "%20");
  } else if constexpr (kN == 64) {
    FSA_WGMMA_REGISTERS_COLUMNS(64, "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (kN == 128) {
    FSA_WGMMA_REGISTERS_COLUMNS(128, "%64", "%65", "%66", "%67", "%68");
  } else {
    static_assert(kN == 0, "add this width to ptx/wgmma.cuh");
  }
}

#undef FSA_TEXT_0
#undef FSA_TEXT_1
#undef FSA_TEXT_2
#undef FSA_TEXT_3
#undef FSA_TEXT_4
#undef FSA_TEXT_5
#undef FSA_TEXT_6
#undef FSA_TEXT_7
#undef FSA_TEXT_8
#undef FSA_TEXT_9
#undef FSA_TEXT_10
#undef FSA_TEXT_11
#undef FSA_TEXT_12
#undef FSA_TEXT_13
#undef FSA_TEXT_14
#undef FSA_TEXT_15
#undef FSA_TEXT_N8
#undef FSA_LIST_N8
#undef FSA_TEXT_N32
#undef FSA_LIST_N32
#undef FSA_TEXT_N64
#undef FSA_LIST_N64
#undef FSA_TEXT_N80
#undef FSA_LIST_N80
#undef FSA_TEXT_N96
#undef FSA_LIST_N96
#undef FSA_TEXT_N112
#undef FSA_LIST_N112
#undef FSA_TEXT_N128
#undef FSA_LIST_N128
#undef FSA_TEXT_N160
#undef FSA_LIST_N160
#undef FSA_TEXT_N176
#undef FSA_LIST_N176
#undef FSA_TEXT_N192
#undef FSA_LIST_N192
#undef FSA_TEXT_N256
#undef FSA_LIST_N256
#undef FSA_LIST_8
#undef FSA_WGMMA_SHARED
#undef FSA_WGMMA_SHARED_AS
#undef FSA_WGMMA_SHARED_ROWS
#undef FSA_WGMMA_REGISTERS
#undef FSA_WGMMA_REGISTERS_AS
#undef FSA_WGMMA_REGISTERS_COLUMNS

}  // namespace fsa::kernels::ptx
