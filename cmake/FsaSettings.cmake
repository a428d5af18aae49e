# SPDX-License-Identifier: Apache-2.0
# What every target of this project is compiled with.
function(fsa_settings target)
  target_compile_features(${target} PRIVATE cxx_std_20)
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
  # kernels/core/{config,params}.h are read by both compilers; they name each other "core/...".
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src
                             ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/kernels)
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # These guess from optimised code and are often wrong inside std::; the sanitizers check the facts.
    target_compile_options(${target} PRIVATE
      -Wno-array-bounds -Wno-maybe-uninitialized -Wno-stringop-overflow -Wno-stringop-overread)
  endif()
  if(FSA_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(FSA_SANITIZE)
    target_compile_options(${target} PRIVATE
      -fsanitize=${FSA_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1)
    target_compile_definitions(${target} PRIVATE _GLIBCXX_ASSERTIONS)
  endif()
endfunction()
