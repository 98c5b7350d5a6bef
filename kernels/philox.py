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
def philox_words(seed, sample_id, step, offs_q):
    """Four uint32 words per quad of elements. seed, sample_id, step: int64 scalars; offs_q: int32 block."""
    sample_bits = sample_id.to(tl.uint64)
    sample_low = (sample_bits & 0xFFFFFFFF).to(tl.uint32)
    sample_high = (sample_bits >> 32).to(tl.uint32)
    return tl.philox(seed, offs_q, step.to(tl.int32), sample_low, sample_high)


@triton.jit
def box_muller(word_radius, word_angle):
    """Two independent normals from two words."""
    u_radius = (word_radius >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    u_angle = (word_angle >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    radius = tl.sqrt(-2.0 * tl.log(u_radius))
    # The library's sin and cos keep a table in local memory for large arguments. Here the angle is a fraction
    # of a turn, so its nearest quarter comes off exactly and a short polynomial does the rest (error 2e-8).
    quarters = u_angle * 4.0
    nearest = tl.floor(quarters + 0.5)
    rest = quarters - nearest
    square = rest * rest
    sine = tl.fma(square, 0.00016044118478735982, -0.0046817541353186881)
    sine = tl.fma(square, sine, 0.079692626246167046)
    sine = tl.fma(square, sine, -0.64596409750624625)
    sine = tl.fma(square, sine, 1.5707963267948966) * rest
    cosine = tl.fma(square, -2.5202042373060605e-05, 0.00091926027483942659)
    cosine = tl.fma(square, cosine, -0.020863480763352961)
    cosine = tl.fma(square, cosine, 0.25366950790104802)
    cosine = tl.fma(square, cosine, -1.2337005501361697)
    cosine = tl.fma(square, cosine, 1.0)
    quadrant = nearest.to(tl.int32)
    is_odd = (quadrant & 1) != 0
    cos_angle = tl.where(is_odd, sine, cosine)
    sin_angle = tl.where(is_odd, cosine, sine)
    cos_angle = tl.where(((quadrant + 1) & 2) != 0, -cos_angle, cos_angle)
    sin_angle = tl.where((quadrant & 2) != 0, -sin_angle, sin_angle)
    return radius * cos_angle, radius * sin_angle


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
