// core.inc for x86-64-v2 (SSE4.2).
#define LACFAST_LEVEL v2
#include "core.inc"
