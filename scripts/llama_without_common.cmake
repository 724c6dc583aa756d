# Read by CMake inside llama.cpp's own project() call (CMAKE_PROJECT_llama_cpp_INCLUDE).
# llama-cpp-python forces LLAMA_BUILD_COMMON on, which compiles a library that its
# wheel does not even contain. A plain variable set here hides that cache entry
# and saves more than a third of the compile time.
set(LLAMA_BUILD_COMMON OFF)
