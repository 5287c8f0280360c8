# TC_OPENAPI_SOURCE: C++ with the text of runtime/server/api/openapi/*.json.

set(TC_OPENAPI_SOURCE ${CMAKE_BINARY_DIR}/openapi_source.cc)
foreach(part paths requests replies)
  set(file ${CMAKE_SOURCE_DIR}/runtime/server/api/openapi/${part}.json)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  file(READ ${file} text)
  string(TOUPPER ${part} name)
  set(TC_OPENAPI_${name} "${text}")
endforeach()
configure_file(${CMAKE_SOURCE_DIR}/runtime/server/api/openapi/source.cc.in ${TC_OPENAPI_SOURCE} @ONLY)
