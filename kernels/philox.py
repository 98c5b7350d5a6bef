"""Counter-based normal noise: the same number for the same (seed, sample, step, element) on every backend.

    words  = Philox4x32-10 of key (seed low, seed high)
             and counter (element // 4, step, sample_id low, sample_id high)
    u_i    = (words_i >> 8) 2^-24 + 2^-25
    eps_4q, eps_4q+1   = sqrt(-2 ln u_0) (cos, sin)(2 pi u_1)
    eps_4q+2, eps_4q+3 = sqrt(-2 ln u_2) (cos, sin)(2 pi u_3)

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The initial latent has step -1.
`normal_noise` reads nothing of latent size and writes 4 bytes per element. The other kernels call
`innovation_block` and draw the noise again in registers: it costs no memory and no traffic.
"""

# Constants of a kernel are upper case.
# ruff: noqa: N803

from typing import Any

import triton
import triton.language as tl

from . import compiled, launch


@triton.jit
def wide_product(word, FACTOR: tl.constexpr):
    """High and low word of a 64-bit product: one instruction, where a product and a high product are two."""
    product = word.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox_words(seed, sample_id, step, offs_q):
    """Four uint32 words per quad of elements. seed, sample_id, step: int64 scalars; offs_q: int32 block."""
    seed_bits, sample_bits = seed.to(tl.uint64), sample_id.to(tl.uint64)
    key_0, key_1 = (seed_bits & 0xFFFFFFFF).to(tl.uint32), (seed_bits >> 32).to(tl.uint32)
    word_0 = offs_q.to(tl.uint32)
    zeros = word_0 * 0
    word_1 = zeros + step.to(tl.int32).to(tl.uint32, bitcast=True)
    word_2 = zeros + (sample_bits & 0xFFFFFFFF).to(tl.uint32)
    word_3 = zeros + (sample_bits >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high_0, low_0 = wide_product(word_0, 0xD2511F53)
        high_2, low_2 = wide_product(word_2, 0xCD9E8D57)
        word_0 = high_2 ^ word_1 ^ key_0
        word_2 = high_0 ^ word_3 ^ key_1
        word_1, word_3 = low_2, low_0
        key_0 += 0x9E3779B9
        key_1 += 0xBB67AE85
    return word_0, word_1, word_2, word_3


@triton.jit
def radius_of(word):
    """sqrt(-2 ln u), u = (word >> 8) 2^-24 + 2^-25, with an error of 2e-7 of it.

    The library's logarithm asks for zeros, infinities and subnormal numbers first. u is none of them, so its
    exponent comes off in integers, which leaves m of [2/3, 4/3), and a polynomial gives -2 ln m / (m - 1).
    """
    u = tl.fma((word >> 8).to(tl.int32).to(tl.float32), 5.9604644775390625e-08, 2.98023223876953125e-08)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    ratio = tl.fma(f, 0.3073139341764306, -0.342223754635344)
    ratio = tl.fma(f, ratio, 0.3284017213153263)
    ratio = tl.fma(f, ratio, -0.39590073199150094)
    ratio = tl.fma(f, ratio, 0.5001524347435282)
    ratio = tl.fma(f, ratio, -0.6667597743416065)
    ratio = tl.fma(f, ratio, 0.9999987551994435)
    ratio = tl.fma(f, ratio, -1.999999672427396)
    # -2 ln 2 2^-23
    return tl.sqrt(tl.fma(exponent.to(tl.float32), -1.6525917e-07, f * ratio))


@triton.jit
def turn_of(word):
    """cos and sin of 2 pi u, u = (word >> 8) 2^-24 + 2^-25, with an error of 1e-7.

    The two highest bits, rounded, are the nearest quarter of a turn. What is left of it, as a signed integer,
    wraps into [-1/2, 1/2) quarters by itself, so nothing is lost before the polynomials.
    """
    rest = ((word & 0xFFFFFF00) << 2).to(tl.int32, bitcast=True).to(tl.float32)
    rest = tl.fma(rest, 2.3283064365386963e-10, 1.1920928955078125e-07)
    square = rest * rest
    sine = tl.fma(square, -0.004592331658109811, 0.07967592316744289)
    sine = tl.fma(square, sine, -0.645962941038817)
    sine = tl.fma(square, sine, 1.5707963051998401) * rest
    cosine = tl.fma(square, -0.020408352541813817, 0.25359864416612843)
    cosine = tl.fma(square, cosine, -1.233697014261482)
    cosine = tl.fma(square, cosine, 0.9999999724239551)
    quadrant = word + 0x20000000
    is_odd = (quadrant & 0x40000000) != 0
    cos_bits = tl.where(is_odd, sine, cosine).to(tl.uint32, bitcast=True)
    sin_bits = tl.where(is_odd, cosine, sine).to(tl.uint32, bitcast=True)
    cos_bits = cos_bits ^ ((quadrant + 0x40000000) & 0x80000000)
    sin_bits = sin_bits ^ (quadrant & 0x80000000)
    return cos_bits.to(tl.float32, bitcast=True), sin_bits.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(word_radius, word_angle):
    """Two independent normals from two words."""
    radius = radius_of(word_radius)
    cosine, sine = turn_of(word_angle)
    return radius * cosine, radius * sine


@triton.jit
def block_offsets(first, BLOCK_N: tl.constexpr):
    """Elements first .. first + BLOCK_N - 1, int32, four in a row per thread.

    The hint keeps every dtype in the layout in which one Philox counter gives its normals. Eight numbers of a
    half type per thread would be one load less, but then the noise travels through shared memory.
    """
    return first + tl.max_contiguous(tl.arange(0, BLOCK_N), 4)


@triton.jit
def normal_block(seed, sample_id, step, first, BLOCK_N: tl.constexpr):
    """Normals of the elements first .. first + BLOCK_N - 1 of one latent; first is a multiple of 4."""
    offs_q = first // 4 + tl.arange(0, BLOCK_N // 4)
    word_0, word_1, word_2, word_3 = philox_words(seed, sample_id, step, offs_q)
    eps_0, eps_1 = box_muller(word_0, word_1)
    eps_2, eps_3 = box_muller(word_2, word_3)
    # join appends the fastest dimension: [q, i, j] is element 4q + 2i + j.
    return tl.reshape(tl.join(tl.join(eps_0, eps_2), tl.join(eps_1, eps_3)), (BLOCK_N,))


@triton.jit
def load_key(seed_ptr, sample_ids_ptr, i_b, HAS_NOISE: tl.constexpr):
    """seed and sample id; 0 where the noise is given and there is no key."""
    if HAS_NOISE:
        seed = tl.full((), 0, tl.int64)
        sample_id = tl.full((), 0, tl.int64)
    else:
        seed = tl.load(seed_ptr)
        sample_id = tl.load(sample_ids_ptr + i_b)
    return seed, sample_id


@triton.jit
def innovation_block(
    noise_ptr, seed, sample_id, step, row, first, N, BLOCK_N: tl.constexpr, HAS_NOISE: tl.constexpr
):
    """The noise of one block, float32: read when it was given, else drawn again from its key."""
    if HAS_NOISE:
        offs_n = block_offsets(first, BLOCK_N)
        b_eps = tl.load(noise_ptr + row + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    else:
        b_eps = normal_block(seed, sample_id, step, first, BLOCK_N)
    return b_eps


@triton.jit
def normal_noise_kernel(
    steps_ptr, seed_ptr, sample_ids_ptr, out_ptr, N, num_splits, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr
):
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + i_b)
    seed, sample_id = load_key(seed_ptr, sample_ids_ptr, i_b, False)
    for i_block in tl.static_range(BLOCKS):
        first = (i_split * BLOCKS + i_block) * BLOCK_N
        offs_n = block_offsets(first, BLOCK_N)
        tl.store(out_ptr + row + offs_n, normal_block(seed, sample_id, step, first, BLOCK_N), mask=offs_n < N)


def normal_noise(inputs: Any, outputs: Any) -> None:
    """Fill noise (B, ...) float32 with the normals of steps (B,), seed (1,), sample_ids (B,), all int64."""
    steps, out = inputs.steps, outputs.noise
    batch = steps.numel()
    num_elements = out.numel() // batch
    architecture = launch.architecture_of(out.device)
    block_n, blocks, num_warps, num_splits = launch.pick_launch("normal_noise", num_elements, architecture)
    compiled.run(
        normal_noise_kernel, (batch * num_splits,),
        steps, inputs.seed, inputs.sample_ids, out, num_elements, num_splits,
        BLOCK_N=block_n, BLOCKS=blocks, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
