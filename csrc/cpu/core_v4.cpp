// core.inc for x86-64-v4 (AVX-512).
#define LACFAST_LEVEL v4
#include "core.inc"
