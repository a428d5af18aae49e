# SPDX-License-Identifier: Apache-2.0
# src/backend/cpu/simd/{kernels,nsa_kernels}.cpp, once per instruction set. cpu_backend.cpp learns from FSA_HAS_<TARGET>
# which ones this build holds and chooses between them at run time.
set(fsa_simd_sources ${PROJECT_SOURCE_DIR}/src/backend/cpu/simd/kernels.cpp
                     ${PROJECT_SOURCE_DIR}/src/backend/cpu/simd/nsa_kernels.cpp)

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" fsa_processor)
if(fsa_processor MATCHES "^(x86_64|amd64)$")
  set(fsa_simd_targets sse4 avx2 avx512)
  set(fsa_simd_flags_sse4 -march=x86-64-v2 -maes -mpclmul)  # Highway's SSE4 counts AES and PCLMUL in.
  set(fsa_simd_flags_avx2 -march=haswell -maes -mpclmul)
  set(fsa_simd_flags_avx512 -march=skylake-avx512 -mprefer-vector-width=512)
elseif(fsa_processor MATCHES "^(aarch64|arm64)$")
  set(fsa_simd_targets neon)
else()
  set(fsa_simd_targets generic)
endif()
set(FSA_SIMD_TARGETS "" CACHE STRING "Instruction sets to build, of ${fsa_simd_targets}; empty: all of them")
foreach(name IN LISTS FSA_SIMD_TARGETS)
  if(NOT name IN_LIST fsa_simd_targets)
    message(FATAL_ERROR "FSA_SIMD_TARGETS: ${name}, but this processor family has ${fsa_simd_targets}")
  endif()
endforeach()
if(FSA_SIMD_TARGETS)
  set(fsa_simd_targets ${FSA_SIMD_TARGETS})
endif()

# Appends the objects to the list `out`, and sets fsa_simd_definitions.
function(fsa_add_simd_targets out)
  set(objects "")
  set(definitions "")
  if(FSA_SIMD)
    find_path(FSA_HIGHWAY_INCLUDE_DIR hwy/highway.h DOC "Folder that holds hwy/highway.h")
    if(NOT FSA_HIGHWAY_INCLUDE_DIR)
      message(FATAL_ERROR "hwy/highway.h (Google Highway, headers only) was not found. Install libhwy-dev, "
                          "or set FSA_HIGHWAY_INCLUDE_DIR to the folder that holds hwy/.")
    endif()
    foreach(name IN LISTS fsa_simd_targets)
      set(target fsa_simd_${name})
      add_library(${target} OBJECT ${fsa_simd_sources})
      fsa_settings(${target})
      target_include_directories(${target} SYSTEM PRIVATE ${FSA_HIGHWAY_INCLUDE_DIR})
      # Headers only: one static target per compilation, and no HWY_DASSERT, whose failure path is in libhwy.
      target_compile_definitions(${target} PRIVATE
        FSA_SIMD_TARGET=${name} HWY_COMPILE_ONLY_STATIC HWY_IS_DEBUG_BUILD=0)
      # FMAs are written out, never left to the compiler, so that results are the same whatever it is.
      target_compile_options(${target} PRIVATE
        $<IF:$<CONFIG:Debug>,-O1,-O3> -fno-math-errno -ffp-contract=off ${fsa_simd_flags_${name}})
      list(APPEND objects $<TARGET_OBJECTS:${target}>)
      string(TOUPPER ${name} upper)
      list(APPEND definitions FSA_HAS_${upper}=1)
    endforeach()
  endif()
  set(${out} "${objects}" PARENT_SCOPE)
  set(fsa_simd_definitions "${definitions}" PARENT_SCOPE)
endfunction()
