// core.inc for x86-64-v4 with AVX-512 BF16.
#define LACFAST_LEVEL v4bf16
#include "core.inc"
