"""value_pool: the pooled tokens, their gradients, and what a softmax over tokens promises."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import STORAGE_DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast import ops, reference

# lacfast.ops has a function of that name.
value_pool = importlib.import_module("lacfast.ops.value_pool")

# B, L, Q, D: one of each; odd and less than a tile; several tiles and heads; two runs of tokens; one real.
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (3, 33, 5, 70), (1, 530, 2, 17), (2, 16, 4, 96)]
HALVES = (torch.bfloat16, torch.float16)


def _inputs(shape, dtype, *, query_dtype=None, weighted=True, scale=1.0, seed=0):
    """features, query and norm_weight; scores have a standard deviation of `scale`."""
    batch, tokens, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    features = (2 * draw(batch, tokens, dim)).to(dtype)
    query = (scale * draw(batch, heads, dim) / dim**0.5).to(query_dtype or wide)
    return features, query, (1 + 0.3 * draw(dim)).to(wide) if weighted else None


def _incoming(shape):
    """Numbers that every storage dtype holds."""
    return torch.linspace(-1, 1, shape.numel()).view(shape).bfloat16().half().float()


def _gradients(op, inputs, grad=None):
    """The output, and the gradient of every input that is given."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs if tensor is not None]
    out = op(*leaves)
    grad = _incoming(out.shape) if grad is None else grad
    return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))


def _doubles(inputs):
    return tuple(None if tensor is None else tensor.double() for tensor in inputs)


def _skip_wide_triton(backend_name, dtype):
    if backend_name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")


def assert_gradient_near(actual, expected):
    """Sums that cancel are compared in units of the largest element, or of the terms where all of them do."""
    unit = max(expected.abs().max().item(), 1.0)
    relative = {torch.float64: 1e-11, torch.float32: 1e-5}.get(actual.dtype, 2**-7)
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=relative * unit)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_reference(shape, weighted, dtype, backend_name, assert_near, poisoned_memory):
    _skip_wide_triton(backend_name, dtype)
    inputs = _inputs(shape, dtype, weighted=weighted)
    out = ops.value_pool(*inputs)
    assert out.dtype == inputs[1].dtype
    assert_near(out, reference.value_pool(*_doubles(inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_video_s_tokens_are_pooled_to_the_last(dtype, assert_near, poisoned_memory):
    """81 frames of 832 x 480 pixels in Wan: 21 latent frames of 30 x 52 patches."""
    tokens = 21 * 30 * 52
    inputs = _inputs((1, tokens, 4, 48), dtype)
    with ops.backend("cpu"):
        out, gradients = _gradients(ops.value_pool, inputs)
        without_last = ops.value_pool(inputs[0][:, :-1].contiguous(), *inputs[1:])
    expected, exact = _gradients(reference.value_pool, _doubles(inputs))
    assert_near(out, expected)
    assert not torch.equal(out, without_last)
    for actual, gradient in zip(gradients, exact, strict=True):
        assert_gradient_near(actual, gradient)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_backward_equals_the_reference(shape, weighted, dtype, backend_name, poisoned_memory):
    _skip_wide_triton(backend_name, dtype)
    inputs = _inputs(shape, dtype, weighted=weighted)
    out, actual = _gradients(ops.value_pool, inputs)
    expected_out, expected = _gradients(reference.value_pool, _doubles(inputs))
    assert_gradient_near(out, expected_out)
    for one, other in zip(actual, expected, strict=True):
        assert_gradient_near(one, other)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_result_has_the_query_s_dtype(dtype, backend_name, assert_near):
    inputs = _inputs((2, 9, 2, 33), dtype, query_dtype=dtype)
    out, gradients = _gradients(ops.value_pool, inputs)
    expected, expected_gradients = _gradients(reference.value_pool, _doubles(inputs))
    assert out.dtype == gradients[1].dtype == dtype
    assert_near(out, expected)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert_gradient_near(one, other)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 70)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_equals_the_reference_in_cpp(shape, seed):
    inputs = _inputs(shape, torch.float32, seed=seed)
    out, actual = _gradients(ops.value_pool, inputs)
    expected_out, expected = _gradients(reference.value_pool, _doubles(inputs))
    for one, other in zip((out, *actual), (expected_out, *expected), strict=True):
        assert_gradient_near(one, other)


@pytest.mark.parametrize("shape", [(2, 6, 2, 3), (1, 18, 5, 20)])
def test_gradients_pass_gradcheck(shape):
    inputs = [tensor.requires_grad_() for tensor in _inputs(shape, torch.float64)]
    assert torch.autograd.gradcheck(ops.value_pool, inputs, fast_mode=shape[1] > 6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_each_gradient_is_the_same_whichever_others_are_wanted(wanted, backend_name, poisoned_memory):
    inputs = _inputs((2, 19, 3, 24), torch.float32)
    _, together = _gradients(ops.value_pool, inputs)
    some = [
        tensor.detach().requires_grad_() if i in wanted else tensor.detach()
        for i, tensor in enumerate(inputs)
    ]
    out = ops.value_pool(*some)
    gradients = torch.autograd.grad(out, [some[i] for i in wanted], _incoming(out.shape))
    for i, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(gradient, together[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [300.0, -300.0])
def test_large_logits_neither_overflow_nor_vanish(shift, backend_name):
    features, query, _ = _inputs((1, 600, 2, 16), torch.float32, scale=20.0)
    # A component that all tokens share moves every score by about `shift`.
    features[..., 0], query[..., 0] = 2.0, shift
    if backend_name == "triton":
        features = features[:, :40].contiguous()
    out = ops.value_pool(features, query)
    expected = reference.value_pool(features.double(), query.double())
    # The scores themselves are rounded to 2^-24 of several hundred.
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


def test_later_tokens_that_win_replace_earlier_ones(backend_name):
    features = torch.zeros(1, 40, 4)
    features[0, :, 0], features[0, 37, 1] = 1.0, 5.0
    query = torch.zeros(1, 1, 4)
    query[..., 1] = 100.0
    out = ops.value_pool(features, query)
    torch.testing.assert_close(out, ops.value_pool(features[:, 37:38].contiguous(), query))


def test_one_token_is_its_own_pool(backend_name, assert_near):
    features, query, weight = _inputs((3, 1, 4, 35), torch.float32)
    normed = torch.nn.functional.rms_norm(features.double(), (35,), weight.double(), eps=1e-6)
    assert_near(ops.value_pool(features, query, weight), normed.expand(3, 4, 35))


@pytest.mark.parametrize("tokens", [2, 33, 515])
def test_equal_tokens_give_the_token_since_the_weights_sum_to_one(tokens, backend_name):
    if backend_name == "triton" and tokens > 40:
        pytest.skip("too many for the interpreter")
    features, query, weight = _inputs((2, 1, 3, 20), torch.float32)
    repeated = features.expand(2, tokens, 20).contiguous()
    torch.testing.assert_close(
        ops.value_pool(repeated, query, weight), ops.value_pool(features, query, weight), rtol=1e-5, atol=1e-6
    )


def test_scaling_the_tokens_changes_nothing(backend_name):
    features, query, weight = _inputs((2, 21, 3, 20), torch.float32)
    # A power of two moves no mantissa, so only eps would be seen.
    scaled = ops.value_pool(features * 2**7, query, weight, eps=0.0)
    assert torch.equal(scaled, ops.value_pool(features, query, weight, eps=0.0))


def test_nan_in_a_token_is_not_hidden(backend_name):
    features, query, weight = _inputs((2, 21, 3, 20), torch.float32)
    features[1, 17, 3] = torch.nan
    out = ops.value_pool(features, query, weight)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


@pytest.mark.parametrize("tokens", [19, 1100])
def test_a_sample_has_the_same_bits_in_any_batch_and_with_any_threads(tokens):
    inputs = _inputs((5, tokens, 3, 200), torch.bfloat16)
    grad = torch.randn(5, 3, 200)
    out, together = _gradients(ops.value_pool, inputs, grad)
    for part in (slice(0, 2), slice(2, 5)):
        split = (inputs[0][part].contiguous(), inputs[1][part].contiguous(), inputs[2])
        part_out, part_gradients = _gradients(ops.value_pool, split, grad[part])
        assert torch.equal(part_out, out[part])
        for one, other in zip(part_gradients[:2], together[:2], strict=True):
            assert torch.equal(one, other[part])
    torch.set_num_threads(3)
    try:
        again, gradients = _gradients(ops.value_pool, inputs, grad)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(again, out)
    assert all(torch.equal(one, other) for one, other in zip(gradients, together, strict=True))


def test_a_non_contiguous_incoming_gradient_is_read_right(backend_name):
    inputs = _inputs((2, 9, 3, 8), torch.float32)
    strided = torch.randn(2, 8, 3).transpose(1, 2)
    _, from_view = _gradients(ops.value_pool, inputs, strided)
    _, from_copy = _gradients(ops.value_pool, inputs, strided.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(from_view, from_copy, strict=True))


def test_nothing_is_kept_where_nothing_is_trained():
    features, query, weight = _inputs((2, 9, 3, 8), torch.float32)
    assert ops.value_pool(features, query, weight).grad_fn is None
    with torch.no_grad():
        assert ops.value_pool(features, query.requires_grad_(), weight).grad_fn is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
        ops.value_pool(features, query, weight)
    # The three inputs, the pooled tokens, log-sum-exp, and Q + 1 numbers per token.
    assert sorted(tensor.numel() for tensor in kept) == sorted([144, 48, 8, 48, 6, 2 * 4 * 9])


def test_detached_features_have_no_gradient_of_their_size():
    features, query, weight = _inputs((2, 64, 2, 128), torch.float32)
    out = ops.value_pool(features, query.requires_grad_(), weight.requires_grad_())
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(out, (query, weight), torch.ones_like(out))
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert 0 < largest < features.numel() * features.element_size()


def test_autocast_changes_nothing(backend_name):
    inputs = _inputs((2, 9, 3, 40), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.value_pool(*inputs)
    assert torch.equal(inside, ops.value_pool(*inputs))


@pytest.mark.parametrize("trained", [(0, 1, 2), (1, 2), (1,)])
def test_it_compiles_as_one_graph_and_gives_the_same_bits(trained):
    inputs = [
        tensor.requires_grad_(i in trained) for i, tensor in enumerate(_inputs((2, 9, 3, 8), torch.float32))
    ]
    leaves = [inputs[i] for i in trained]
    compiled = torch.compile(ops.value_pool, fullgraph=True, backend="aot_eager")
    out, eager = compiled(*inputs), ops.value_pool(*inputs)
    assert torch.equal(out, eager)
    grad = torch.randn(2, 3, 8)
    for one, other in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(eager, leaves, grad), strict=True
    ):
        assert torch.equal(one, other)


def test_it_runs_under_fake_tensors_and_passes_opcheck():
    inputs = [tensor.requires_grad_() for tensor in _inputs((2, 9, 3, 8), torch.bfloat16)]
    with FakeTensorMode() as mode:
        fake = ops.value_pool(*(mode.from_tensor(tensor) for tensor in inputs))
        assert (fake.shape, fake.dtype) == ((2, 3, 8), torch.float32)
    assert ops.value_pool(*(tensor.to("meta") for tensor in inputs)).shape == (2, 3, 8)
    torch.library.opcheck(torch.ops.lacfast.value_pool.default, (*inputs, 1e-6, True))
    torch.library.opcheck(
        torch.ops.lacfast.value_pool.default, (*(tensor.detach() for tensor in inputs[:2]), None, 1e-6, False)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, q, w: (f[0], q, w), r"features has shape \(6, 8\); it must be \(B, L, D\)"),
        (lambda f, q, w: (f, q[:, 0], w), r"query has shape \(4, 8\); it must be \(B, Q, D\)"),
        (lambda f, q, w: (f, q[:2], w), r"query has shape \(2, 3, 8\).*must be \(4, 3, 8\)"),
        (lambda f, q, w: (f, q, w[:7]), r"norm_weight has shape \(7,\).*must be \(8,\)"),
        (lambda f, q, w: (f, q.double(), w), "query has dtype torch.float64.*must be torch.float32 or"),
        (lambda f, q, w: (f.double(), q, w), "query has dtype torch.float32.*must be torch.float64"),
        (lambda f, q, w: (f.int(), q, w), "features has dtype torch.int32"),
        (lambda f, q, w: (f, q, w.to("meta")), "norm_weight is on meta but features on cpu; move it"),
        (lambda f, q, w: (f.mT.contiguous().mT, q, w), r"pass features.contiguous\(\)"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.value_pool(*change(torch.zeros(4, 6, 8), torch.zeros(4, 3, 8), torch.ones(8)))


def test_tokens_wider_than_the_gpu_kernel_takes_run_the_reference_and_say_so_once(monkeypatch):
    monkeypatch.setattr(value_pool.Op, "chosen", lambda self, features: "triton")
    value_pool._too_wide.cache_clear()
    wide = _inputs((1, 3, 2, value_pool.TRITON_MAX_DIM + 1), torch.bfloat16)
    with pytest.warns(
        RuntimeWarning, match="has 8193 features per token and the Triton kernel .* takes 8192"
    ):
        pooled = ops.value_pool(*wide)
    assert torch.equal(pooled, reference.value_pool(*wide))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.value_pool(*wide)
    monkeypatch.setattr(value_pool, "forced_backend", lambda: "triton")
    with pytest.raises(ValueError, match="leave the backend to lacfast"):
        ops.value_pool(*wide)
