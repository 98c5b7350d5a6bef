"""normal_noise: a counter's normals, the same whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast import _C, ops, reference
from lacfast.records import INITIAL_STEP, NoiseKey

# Random123's published vectors for philox4x32, 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEED = 0x0123_4567_89AB_CDEF
STEPS = torch.tensor([3, INITIAL_STEP, 0])
KEY = NoiseKey.create(SEED, torch.tensor([7, 2**40 + 1, 0]))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    assert _C.philox4x32_10(counter, key) == words
    assert tuple(reference.philox(torch.tensor(counter), torch.tensor(key)).tolist()) == words


@pytest.mark.parametrize("shape", [(3, 1), (3, 7, 5), (3, 16, 12, 12)])
def test_normals_equal_the_reference(shape, backend_name, poisoned_memory):
    noise = ops.normal_noise(shape, STEPS, KEY)
    # The words are equal bit for bit; logarithm and cosine differ in their last bits.
    torch.testing.assert_close(noise, reference.normal_noise(shape, STEPS, KEY), rtol=1e-5, atol=1e-5)


def test_normals_are_standard(backend_name):
    noise = ops.normal_noise((3, 30_000), STEPS, KEY).double()
    # Five standard errors of 30,000 draws each.
    assert noise.mean(dim=1).abs().max() < 5 / 30_000**0.5
    assert (noise.var(dim=1) - 1).abs().max() < 5 * (2 / 30_000) ** 0.5
    assert (noise.pow(4).mean(dim=1) - 3).abs().max() < 5 * (96 / 30_000) ** 0.5
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 5 / 30_000**0.5
    assert noise.abs().max() > 3.5


def test_noise_of_a_sample_does_not_depend_on_its_batch(backend_name):
    together = ops.normal_noise((3, 5, 13), STEPS, KEY)
    for row in range(3):
        rows = torch.tensor([row])
        alone = ops.normal_noise((1, 5, 13), STEPS[rows], KEY.select(rows))
        assert torch.equal(alone, together[rows])
    order = torch.tensor([2, 0, 1])
    assert torch.equal(ops.normal_noise((3, 5, 13), STEPS[order], KEY.select(order)), together[order])


def test_noise_of_an_element_does_not_depend_on_the_latents_size(backend_name):
    # Across the kernels' blocks of 1024 elements and an incomplete quad.
    long = ops.normal_noise((3, 4099), STEPS, KEY)
    assert torch.equal(ops.normal_noise((3, 1027), STEPS, KEY), long[:, :1027])


def test_seed_step_and_sample_each_change_the_noise(backend_name):
    base = ops.normal_noise((1, 64), torch.tensor([1]), NoiseKey.create(1, range(1)))
    for step, seed, sample_id in [(2, 1, 0), (1, 2, 0), (1, 1, 1), (1, 1 + 2**32, 0), (1, 1, 2**32)]:
        key = NoiseKey.create(seed, torch.tensor([sample_id]))
        assert (ops.normal_noise((1, 64), torch.tensor([step]), key) == base).sum() <= 1


def test_many_threads_draw_the_same_noise():
    shape = (3, 400_000)
    alone = ops.normal_noise(shape, STEPS, KEY)
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.normal_noise(shape, STEPS, KEY), alone)
    finally:
        torch.set_num_threads(1)


def test_noise_runs_under_fake_tensors_compiles_and_passes_opcheck():
    expected = ops.normal_noise((3, 5), STEPS, KEY)
    compiled = torch.compile(
        lambda steps, seed, ids: ops.normal_noise((3, 5), steps, NoiseKey(seed, ids)), fullgraph=True
    )
    assert torch.equal(compiled(STEPS, KEY.seed, KEY.sample_ids), expected)
    with FakeTensorMode() as mode:
        key = NoiseKey(mode.from_tensor(KEY.seed), mode.from_tensor(KEY.sample_ids))
        assert ops.normal_noise((3, 5), mode.from_tensor(STEPS), key).shape == (3, 5)
    torch.library.opcheck(torch.ops.lacfast.normal_noise.default, (STEPS, KEY.seed, KEY.sample_ids, [3, 5]))


@pytest.mark.parametrize(
    ("shape", "steps", "key", "message"),
    [
        ((3,), STEPS, KEY, r"shape is \(3,\); it must be"),
        ((3, 0), STEPS, KEY, r"none of them 0|at least one element"),
        ((2, 5), STEPS, KEY, r"steps has shape \(3,\).*must be \(2,\)"),
        ((3, 5), STEPS.int(), KEY, "steps has dtype torch.int32.*must be torch.int64"),
        ((3, 5), STEPS, NoiseKey(KEY.seed.float(), KEY.sample_ids), "key.seed has dtype torch.float32"),
        ((3, 5), STEPS, NoiseKey(KEY.seed, KEY.sample_ids.to("meta")), "key.sample_ids is on meta but"),
    ],
)
def test_bad_input_is_named(shape, steps, key, message):
    with pytest.raises(ValueError, match=message):
        ops.normal_noise(shape, steps, key)
