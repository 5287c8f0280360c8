# tc_page_files: C++ with the bytes of the page (runtime/server/page), of marked as Debian packs it, and of both gzipped.

find_file(TC_MARKED_JS marked.umd.min.js PATHS /usr/share/javascript/marked REQUIRED)
find_program(TC_GZIP gzip REQUIRED)
set(page ${CMAKE_SOURCE_DIR}/runtime/server/page)
file(GLOB page_files CONFIGURE_DEPENDS ${page}/*.html ${page}/*.css ${page}/*.js ${page}/*.svg)
set(page_out ${CMAKE_BINARY_DIR}/page)
add_custom_command(OUTPUT ${page_out}/page_files.cc
  COMMAND ${CMAKE_COMMAND} "-DFILES=${page_files}" -DMARKED=${TC_MARKED_JS} -DGZIP=${TC_GZIP} -DOUT=${page_out}
          -P ${CMAKE_SOURCE_DIR}/runtime/cmake/embed_files.cmake
  DEPENDS ${page_files} ${TC_MARKED_JS} ${CMAKE_SOURCE_DIR}/runtime/cmake/embed_files.cmake
  COMMENT "Embedding the page" VERBATIM)
add_library(tc_page_files STATIC ${page_out}/page_files.cc)
target_link_libraries(tc_page_files PRIVATE tc_options)
set_target_properties(tc_page_files PROPERTIES UNITY_BUILD OFF)
