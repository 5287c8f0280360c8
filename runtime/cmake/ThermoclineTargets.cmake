# How a Thermocline target is made: warnings as errors on our code, sanitizers, and ISA flags for single units.

add_library(tc_options INTERFACE)
target_include_directories(tc_options INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(tc_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow=local -Wnon-virtual-dtor -Werror
                       $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized$<SEMICOLON>-Wno-restrict>)  # false positives of GCC 12
target_compile_definitions(tc_options INTERFACE TC_VERSION="${PROJECT_VERSION}" TC_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
                           SPDLOG_FMT_EXTERNAL)
if(CMAKE_UNITY_BUILD)  # sources included by another are no headers, which this warning takes them for
  target_compile_options(tc_options INTERFACE -Wno-subobject-linkage)
endif()
if(TC_SANITIZE)
  # Without vptr: its check opens a pipe, and where no descriptor is left (a test) it takes sound objects for none.
  target_compile_options(tc_options INTERFACE -fsanitize=${TC_SANITIZE} -fno-omit-frame-pointer
                         -fno-sanitize-recover=all -fno-sanitize=vptr)
  target_link_options(tc_options INTERFACE -fsanitize=${TC_SANITIZE})
  target_compile_definitions(tc_options INTERFACE TC_SANITIZED)
  find_program(TC_MOLD mold)  # a third of the time for each of thirty programs
  if(TC_MOLD)
    target_link_options(tc_options INTERFACE -fuse-ld=mold)
  endif()
endif()
if(TC_SANITIZE OR CMAKE_BUILD_TYPE STREQUAL "Debug")
  target_compile_definitions(tc_options INTERFACE TC_SIMT_CHECKS)  # every access of an interpreted kernel is checked
endif()

# tc_library(name SOURCES... LINK targets...)
function(tc_library name)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_library(tc_${name} STATIC ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(tc_${name} PUBLIC tc_options ${ARG_LINK})
endfunction()

# add_isa_kernels(name FLAGS ... SOURCES ...): units of kernels_cpu built with that instruction set's flags.
function(add_isa_kernels name)
  cmake_parse_arguments(ARG "" "" "FLAGS;SOURCES" ${ARGN})
  add_library(tc_kernels_${name} OBJECT ${ARG_SOURCES})
  set_target_properties(tc_kernels_${name} PROPERTIES UNITY_BUILD OFF)  # long enough one by one
  target_link_libraries(tc_kernels_${name} PRIVATE tc_options)
  target_compile_options(tc_kernels_${name} PRIVATE ${ARG_FLAGS} -O3
                         -Wno-uninitialized -Wno-maybe-uninitialized)  # GCC 12 warns inside its own AVX-512 headers
  target_sources(tc_kernels_cpu PRIVATE $<TARGET_OBJECTS:tc_kernels_${name}>)
endfunction()
