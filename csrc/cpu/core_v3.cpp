// core.inc for x86-64-v3 (AVX2, FMA).
#define LACFAST_LEVEL v3
#include "core.inc"
