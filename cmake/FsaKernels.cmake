# SPDX-License-Identifier: Apache-2.0
# Embeds kernels/ in the library as text: fsa_kernel_bundle is the .cpp file that the build writes. As a script
# (-P, with OUT, ROOT and FILES) it writes that file.
if(CMAKE_SCRIPT_MODE_FILE)
  set(digests "")
  set(entries "")
  foreach(name IN LISTS FILES)
    file(READ ${ROOT}/${name} text)
    file(SHA256 ${ROOT}/${name} digest)
    string(APPEND digests "${digest}  ${name}\n")
    # No string literal of the standard is longer than 64 KiB; a file that is should be split anyway.
    string(APPEND entries "    {\"${name}\", R\"fsa_source(${text})fsa_source\"},\n")
  endforeach()
  string(SHA256 bundle_hash "${digests}")
  string(SUBSTRING ${bundle_hash} 0 16 bundle_hash)
  file(WRITE ${OUT}
    "// Written by cmake/FsaKernels.cmake.\n"
    "#include \"jit/source_bundle.h\"\n\n"
    "namespace fsa::jit {\n\n"
    "std::span<const SourceFile> source_bundle() {\n"
    "  static const SourceFile files[] = {\n"
    "${entries}"
    "  };\n"
    "  return files;\n"
    "}\n\n"
    "std::string_view source_bundle_hash() { return \"${bundle_hash}\"; }\n\n"
    "}  // namespace fsa::jit\n")
  return()
endif()

set(fsa_kernel_bundle ${PROJECT_BINARY_DIR}/kernels/source_bundle.cpp)
file(GLOB_RECURSE fsa_kernel_files RELATIVE ${PROJECT_SOURCE_DIR}/kernels CONFIGURE_DEPENDS
     ${PROJECT_SOURCE_DIR}/kernels/*.h ${PROJECT_SOURCE_DIR}/kernels/*.cuh)
list(SORT fsa_kernel_files)
list(TRANSFORM fsa_kernel_files PREPEND ${PROJECT_SOURCE_DIR}/kernels/ OUTPUT_VARIABLE fsa_kernel_paths)
add_custom_command(
  OUTPUT ${fsa_kernel_bundle}
  COMMAND ${CMAKE_COMMAND} -DOUT=${fsa_kernel_bundle} -DROOT=${PROJECT_SOURCE_DIR}/kernels
          "-DFILES=${fsa_kernel_files}" -P ${CMAKE_CURRENT_LIST_FILE}
  DEPENDS ${fsa_kernel_paths} ${CMAKE_CURRENT_LIST_FILE}
  COMMENT "Embedding kernels/"
  VERBATIM)
