// Read before each C++ file of llama.cpp, see llama.cmake. GCC's older headers (11.3 and 12.2, no longer 13.3) tell the
// optimizer that ldtilecfg reads 8 bytes of memory (GCC bug 114098). At -O3 most of the 64 bytes that describe the tiles
// are then never written, and the first prompt crashes in ggml_backend_amx_mul_mat.
#ifdef __AMX_TILE__
#if !__has_builtin(__builtin_ia32_ldtilecfg)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" : : "m"(*(const char(*)[64])(config)))
#endif
#endif
