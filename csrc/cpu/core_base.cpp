// core.inc for the compiler's baseline of other processors.
#define LACFAST_LEVEL base
#include "core.inc"
