// One spelling for functions that are compiled into every caller: for the host, for CUDA, and once per instruction
// set. They must never be merged across objects: a copy built for AVX2 would then run on a machine without it.
#pragma once

#if defined(__CUDACC__)
#define LACFAST_INLINE_MEMBER __host__ __device__ __forceinline__
#else
#define LACFAST_INLINE_MEMBER inline __attribute__((always_inline))
#endif
#define LACFAST_INLINE static LACFAST_INLINE_MEMBER
