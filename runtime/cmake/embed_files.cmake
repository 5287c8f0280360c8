# cmake -DFILES=a;b -DMARKED=FILE -DGZIP=PROGRAM -DOUT=FOLDER -P embed_files.cmake: OUT/page_files.cc, which defines
# page_files() of runtime/server/page/page_files.h. The order is that of the names, so the same files give the same bytes.

# bytes_of(out FILE): its bytes as a C++ list.
function(bytes_of out file)
  file(READ ${file} hex HEX)
  string(REGEX REPLACE "(..)" "0x\\1," list "${hex}")
  set(${out} "${list}" PARENT_SCOPE)
endfunction()

file(MAKE_DIRECTORY ${OUT})
file(COPY_FILE ${MARKED} ${OUT}/marked.js)
list(APPEND FILES ${OUT}/marked.js)
set(arrays "")
set(table "")
set(index 0)
foreach(file IN LISTS FILES)
  get_filename_component(name ${file} NAME)
  execute_process(COMMAND ${GZIP} -9 -n -c ${file} OUTPUT_FILE ${OUT}/${name}.gz COMMAND_ERROR_IS_FATAL ANY)
  bytes_of(plain ${file})
  bytes_of(packed ${OUT}/${name}.gz)
  file(SHA256 ${file} hash)
  string(SUBSTRING ${hash} 0 16 hash)
  string(APPEND arrays "const unsigned char kPlain${index}[] = {${plain}};\n"
                       "const unsigned char kPacked${index}[] = {${packed}};\n")
  string(APPEND table "    {\"${name}\", \"${hash}\", text(kPlain${index}), text(kPacked${index})},\n")
  math(EXPR index "${index} + 1")
endforeach()
file(WRITE ${OUT}/page_files.cc "// Made by runtime/cmake/embed_files.cmake.
#include \"runtime/server/page/page_files.h\"

namespace thermocline::server {
namespace {

${arrays}
template <size_t N>
std::string_view text(const unsigned char (&bytes)[N]) {
  return {reinterpret_cast<const char*>(bytes), N};
}

const PageFile kFiles[] = {
${table}};

}  // namespace

std::span<const PageFile> page_files() { return kFiles; }

}  // namespace thermocline::server
")
