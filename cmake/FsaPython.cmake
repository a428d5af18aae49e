# SPDX-License-Identifier: Apache-2.0
# The extension module flash_sparse_attention._C. It holds the library's objects, so a wheel has one binary.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module
             OPTIONAL_COMPONENTS Development.SABIModule)
if(NOT nanobind_ROOT AND NOT nanobind_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m nanobind --cmake_dir
                  OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE
                  COMMAND_ERROR_IS_FATAL ANY)
endif()
find_package(nanobind CONFIG REQUIRED)

file(GLOB fsa_binding_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/python/bindings/*.cpp)
nanobind_add_module(_C NOMINSIZE STABLE_ABI NB_STATIC NB_SUPPRESS_WARNINGS ${fsa_binding_sources})
target_compile_features(_C PRIVATE cxx_std_20)
target_compile_options(_C PRIVATE -Wall -Wextra $<$<BOOL:${FSA_WERROR}>:-Werror>)
target_include_directories(_C PRIVATE ${PROJECT_SOURCE_DIR}/python/bindings ${PROJECT_SOURCE_DIR}/third_party)
target_link_libraries(_C PRIVATE fsa_internal)
target_link_options(_C PRIVATE LINKER:--exclude-libs,ALL)

set(package flash_sparse_attention)
set(package_dir ${PROJECT_BINARY_DIR}/python/${package})
set_target_properties(_C PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${package_dir})
nanobind_add_stub(_C_stub MODULE _C OUTPUT ${package_dir}/_C.pyi PYTHON_PATH ${package_dir} DEPENDS _C)

if(DEFINED SKBUILD)
  install(TARGETS _C LIBRARY DESTINATION ${package})
  install(FILES ${package_dir}/_C.pyi DESTINATION ${package})
  if(FSA_CUDA)
    install(TARGETS fsa-kernels DESTINATION ${SKBUILD_SCRIPTS_DIR})
  endif()
else()
  # Makes <build>/python importable (PYTHONPATH): the sources are linked in beside the extension.
  file(MAKE_DIRECTORY ${package_dir})
  file(GLOB package_files CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/python/${package}/*)
  list(FILTER package_files EXCLUDE REGEX "/__pycache__$")
  foreach(file IN LISTS package_files)
    cmake_path(GET file FILENAME name)
    file(CREATE_LINK ${file} ${package_dir}/${name} SYMBOLIC)
  endforeach()
endif()
