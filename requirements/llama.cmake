# Read by CMake right after project(llama_cpp): llama-cpp-python forces this option on in the cache, and a plain variable
# comes before the cache. The library `common` (argument parsing, downloads, an HTTP client) is of llama.cpp's own programs.
set(LLAMA_BUILD_COMMON OFF)
# Without it AMX crashes in what an older GCC builds.
add_compile_options("$<$<COMPILE_LANG_AND_ID:CXX,GNU>:-include${CMAKE_CURRENT_LIST_DIR}/amx.h>")
