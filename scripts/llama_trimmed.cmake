# Read by CMake inside llama-cpp-python's own project() call
# (CMAKE_PROJECT_llama_cpp_INCLUDE): what of llama.cpp is compiled, and how.

# llama-cpp-python forces LLAMA_BUILD_COMMON on, which compiles a library that its
# wheel does not even contain. A plain variable set here hides that cache entry
# and saves more than a third of the compile time.
set(LLAMA_BUILD_COMMON OFF)

# libmtmd makes embeddings of images. Its helpers decode pictures, sound and video,
# starting ffmpeg for some; we decode pictures ourselves, so they only cost time and
# are one thing less that hostile bytes can reach. The fifty small files of its
# models/ share their headers: as one they compile in 5 s of CPU instead of 50.
function(trim_mtmd)
    get_target_property(sources mtmd SOURCES)
    list(FILTER sources EXCLUDE REGEX "helper")
    set_target_properties(mtmd PROPERTIES
        SOURCES "${sources}"
        UNITY_BUILD ON
        UNITY_BUILD_BATCH_SIZE 0)
    list(FILTER sources EXCLUDE REGEX "^models/")
    get_target_property(folder mtmd SOURCE_DIR)
    list(TRANSFORM sources PREPEND "${folder}/")
    set_source_files_properties(${sources} TARGET_DIRECTORY mtmd
        PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endfunction()
cmake_language(DEFER CALL trim_mtmd)
