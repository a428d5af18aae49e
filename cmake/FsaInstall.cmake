# SPDX-License-Identifier: Apache-2.0
# find_package(fsa) -> fsa::fsa. All paths are relative to the package file, so the tree can be moved.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(fsa_config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fsa)
install(TARGETS fsa EXPORT fsaTargets FILE_SET HEADERS)
if(FSA_CUDA)
  install(TARGETS fsa-kernels)
endif()
install(EXPORT fsaTargets NAMESPACE fsa:: DESTINATION ${fsa_config_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/fsaConfig.cmake.in
  ${PROJECT_BINARY_DIR}/fsaConfig.cmake INSTALL_DESTINATION ${fsa_config_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fsaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fsaConfig.cmake ${PROJECT_BINARY_DIR}/fsaConfigVersion.cmake
        DESTINATION ${fsa_config_dir})
