"""A captured step replays what it computes eagerly, and what a graph would freeze does not go unseen."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lacfast import ops
from lacfast.config import GraphConfig
from lacfast.records import NoiseKey, TrajectorySlab
from lacfast.runtime.fake_graph import CaptureError, FakeGraph
from lacfast.runtime.graph import GraphRunner, StaticStep

FAKE = GraphConfig(mode="fake", strict=True)


def step_of(run: Callable[[], None], *written: Tensor, **read: Tensor) -> StaticStep:
    return StaticStep("a test's step", run, lambda: written, lambda: read)


class Walk:
    """x <- x w + b_k, kept in slice k, with k on the device."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(4, 4, generator=generator)
        self.weight = torch.randn(4, 4, generator=generator) / 4
        self.bias = torch.randn(9, 4, generator=generator)
        self.kept = torch.zeros(9, 4, 4)
        self.k = torch.zeros(1, dtype=torch.int64)
        self.step = step_of(self.run, self.x, self.kept, self.k, weight=self.weight)

    def run(self) -> None:
        moved = self.x @ self.weight + self.bias.index_select(0, self.k)
        self.kept.index_copy_(0, self.k, moved[None])
        self.x.copy_(moved)
        self.k.add_(1)

    def begin(self, value: float) -> None:
        self.x.fill_(value)
        self.kept.zero_()
        self.k.zero_()


def assert_walks_alike(runner: GraphRunner, ours: Walk, eager: Walk, *, times: int) -> None:
    for walk in (ours, eager):
        walk.begin(0.5)
    runner.run(ours.step, times)
    for _ in range(times):
        eager.run()
    assert torch.equal(ours.kept, eager.kept)
    assert torch.equal(ours.x, eager.x)
    assert int(ours.k) == times


def test_replay_equals_eager_for_any_number_of_steps_and_any_weights() -> None:
    runner = GraphRunner(FAKE)
    ours, eager = Walk(), Walk()
    for times in (9, 5, 1, 8):
        for walk in (ours, eager):
            walk.weight.mul_(0.9)
            walk.bias.add_(0.1)
        assert_walks_alike(runner, ours, eager, times=times)
    assert runner.statistics.captures == 1


def test_warm_up_and_the_check_of_a_graph_lose_no_step() -> None:
    runner = GraphRunner(GraphConfig(mode="fake", strict=True, warmup_steps=3))
    ours, eager = Walk(), Walk()
    assert_walks_alike(runner, ours, eager, times=2)
    assert (runner.statistics.eager_steps, runner.statistics.captures) == (2, 0)
    assert_walks_alike(runner, ours, eager, times=5)
    # One warm-up is left, the first graph is checked against an eager step, three replays follow.
    assert (runner.statistics.eager_steps, runner.statistics.captures) == (4, 1)
    assert runner.statistics.replays == 4


def test_capture_leaves_no_trace_in_memory() -> None:
    walk = Walk()
    x, k = walk.x.clone(), walk.k.clone()
    graph = FakeGraph(walk.run, [walk.x, walk.kept, walk.k])
    assert torch.equal(walk.x, x)
    assert torch.equal(walk.k, k)
    assert not walk.kept.any()
    # The product, the row of the table and their sum.
    assert graph.num_bytes == (16 + 4 + 16) * 4


def test_addresses_stay_while_steps_are_replayed() -> None:
    walk, runner = Walk(), GraphRunner(FAKE)
    before = [tensor.data_ptr() for tensor in walk.step.written()]
    runner.run(walk.step, 8)
    assert [tensor.data_ptr() for tensor in walk.step.written()] == before


def test_operations_in_our_own_kernels_are_recorded() -> None:
    table = torch.tensor([[0.9, -0.2, 0.3], [0.8, -0.1, 0.2], [0.7, -0.3, 0.1], [0.9, 0.1, 0.2]])
    latents = []
    for runner in (GraphRunner(GraphConfig(mode="fake", strict=True, warmup_steps=1)), GraphRunner()):
        slab = TrajectorySlab(torch.zeros(5, 2, 7), torch.zeros(4, 2, 7), torch.zeros(4, 2))
        sample, k, key = torch.ones(2, 7), torch.zeros(1, dtype=torch.int64), NoiseKey.create(3, range(2))

        def run(sample=sample, k=k, key=key, slab=slab) -> None:
            ops.gaussian_step_(sample, torch.tanh(sample), table, k, noise=key, slab=slab)
            k.add_(1)

        step = step_of(run, sample, k, *vars(slab).values())
        runner.run(step, 4)
        for tensor in (k, sample):
            tensor.zero_()
        key.seed.add_(1)
        runner.run(step, 4)
        latents.append(slab.latents)
    assert torch.equal(*latents)


def train_step(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor, StaticStep]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 1))
    inputs, loss = torch.randn(5, 6), torch.zeros(())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = model(inputs).square().mean()
        value.backward()
        loss.copy_(value.detach())

    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return model, inputs, loss, step_of(run, loss, *gradients, **dict(model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_replays_its_backward_pass_after_updates(dtype: torch.dtype) -> None:
    runners = [GraphRunner(FAKE), GraphRunner()]
    losses: list[list[Tensor]] = []
    for runner in runners:
        model, inputs, loss, step = train_step(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad(set_to_none=False)
            runner.run(step)
            optimizer.step()
            inputs.mul_(1.1)
            losses[-1].append(loss.clone())
    assert runners[0].statistics.replays == 5
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert losses[0][-1] < losses[0][0]


def changing_number() -> StaticStep:
    x, count = torch.zeros(3), [0]

    def run() -> None:
        count[0] += 1
        x.add_(count[0])

    return step_of(run, x)


def new_tensor_every_step() -> StaticStep:
    x, source = torch.zeros(3), [torch.ones(3)]

    def run() -> None:
        source[0] = source[0] + 1
        x.add_(source[0])

    return step_of(run, x)


@pytest.mark.parametrize("make", [changing_number, new_tensor_every_step])
def test_a_value_that_changes_outside_the_device_is_found_at_first_use(
    make: Callable[[], StaticStep],
) -> None:
    with pytest.raises(RuntimeError, match=r"a test's step replays to other values.*0 of shape \(3,\)"):
        GraphRunner(FAKE).run(make(), 8)


def test_a_step_that_cannot_be_captured_runs_eagerly_after_one_warning() -> None:
    x = torch.zeros(3)
    step = step_of(lambda: x.add_(float(x.sum()) + 1), x)
    runner = GraphRunner(GraphConfig(mode="fake"))
    with pytest.warns(RuntimeWarning, match=r"cannot be captured.*makes the host wait") as caught:
        runner.run(step, 5)
    runner.run(step, 2)
    assert len(caught) == 1
    assert runner.is_eager(step)
    assert (runner.statistics.fallbacks, runner.statistics.captures) == (1, 0)
    expected = torch.zeros(3)
    for _ in range(7):
        expected.add_(float(expected.sum()) + 1)
    assert torch.equal(x, expected)


def test_the_check_of_a_graph_does_not_need_the_memory_of_a_step_twice() -> None:
    x, activations = torch.zeros(3), []

    def run() -> None:
        # What an earlier run allocated is gone when the next one allocates.
        assert all(activation() is None for activation in activations)
        activation = x + 1
        activations.append(weakref.ref(activation))
        x.copy_(activation)
        runs.append("capture" if is_in_torch_dispatch_mode() else "eager")

    runs: list[str] = []
    GraphRunner(replace(FAKE, warmup_steps=1)).run(step_of(run, x), 3)
    assert runs == ["eager", "eager", "capture"]
    assert torch.equal(x, torch.full((3,), 3.0))


def test_a_replay_that_differs_leaves_the_eager_result() -> None:
    step = changing_number()
    runner = GraphRunner(GraphConfig(mode="fake"))
    with pytest.warns(RuntimeWarning, match="It runs eagerly from here on"):
        runner.run(step, 6)
    # 1 to 7 without 5, the number that the capture saw.
    assert step.written()[0].tolist() == [23.0] * 3


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: x.add_(x.sum().item()), "_local_scalar_dense.*makes the host wait"),
        (lambda x: x.add_(x[x > 0].sum()), "makes the host wait"),
        (lambda x: x.add_(torch.randn(3)), "randn.*torch's generator"),
        (lambda x: x.add_(nn.functional.dropout(x, 0.5)), "torch's generator"),
        (lambda x: x.add_(torch.tensor(2.0)), r"torch\.tensor"),
    ],
    ids=["item", "mask", "randn", "dropout", "tensor"],
)
def test_what_a_graph_cannot_hold_is_an_error_that_says_what(
    run: Callable[[Tensor], None], message: str
) -> None:
    x = torch.ones(3)
    with pytest.raises(CaptureError, match=message):
        FakeGraph(lambda: run(x), [x])
    assert torch.equal(x, torch.ones(3))


def test_fused_attention_without_dropout_is_captured() -> None:
    query, out = torch.randn(1, 2, 5, 8), torch.zeros(1, 2, 5, 8)

    def run() -> None:
        out.copy_(nn.functional.scaled_dot_product_attention(query, query, query))

    graph = FakeGraph(run, [out])
    query.mul_(2)
    graph.replay()
    assert torch.equal(out, nn.functional.scaled_dot_product_attention(query, query, query))


def test_indexing_by_numbers_is_captured() -> None:
    x, rows, out = torch.randn(2, 5), torch.tensor([3, 0]), torch.zeros(2, 2)
    graph = FakeGraph(lambda: out.copy_(x[:, rows]), [out])
    rows.add_(1)
    graph.replay()
    assert torch.equal(out, x[:, [4, 1]])


def test_a_tensor_that_the_step_writes_unannounced_is_named() -> None:
    x, hidden = torch.ones(3), torch.ones(2, 2)

    def run() -> None:
        x.add_(1)
        hidden.add_(1)

    with pytest.raises(CaptureError, match=r"add_.*shape \(2, 2\).*not among the step's written tensors"):
        FakeGraph(run, [x])
    assert torch.equal(hidden, torch.ones(2, 2))
    assert torch.equal(x, torch.ones(3))


def test_an_intermediate_tensor_does_not_outlive_its_replay() -> None:
    x, kept = torch.ones(3), []

    def run() -> None:
        kept.append(x * 2)
        x.copy_(kept[-1])

    graph = FakeGraph(run, [x])
    graph.replay()
    assert torch.equal(x, torch.full((3,), 2.0))
    assert kept[0].isnan().all()


def test_memory_that_was_replaced_is_still_the_one_that_is_read() -> None:
    x, weight = torch.ones(3), nn.Parameter(torch.ones(3))

    def run() -> None:
        with torch.no_grad():
            x.mul_(weight)

    graph = FakeGraph(run, [x])
    weight.data = torch.full((3,), 5.0)
    graph.replay()
    assert torch.equal(x, torch.ones(3))


def test_a_parameter_that_moved_is_named_with_the_remedy() -> None:
    model, _, _, step = train_step()
    runner = GraphRunner(FAKE)
    runner.run(step, 4)
    with torch.no_grad():
        model[0].weight.mul_(2)
    runner.check_addresses(step)
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(ValueError, match=r"0\.weight is not where the graph.*load_in_place.*close\(\)"):
        runner.check_addresses(step)
    runner.close()
    runner.run(step, 4)
    runner.check_addresses(step)
    assert runner.statistics.captures == 2


def test_autocast_around_a_captured_step_is_refused() -> None:
    step = train_step()[3]
    runner = GraphRunner(FAKE)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="autocast is on around a test's step; enter it inside"),
    ):
        runner.run(step)


def test_closing_frees_the_graphs_and_a_later_run_captures_again() -> None:
    walk, runner = Walk(), GraphRunner(FAKE)
    runner.run(walk.step, 5)
    assert runner.statistics.graph_bytes == (16 + 4 + 16) * 4
    runner.close()
    assert runner.statistics.graph_bytes == 0
    assert_walks_alike(runner, walk, Walk(), times=6)
    assert runner.statistics.captures == 2


def test_on_a_cpu_auto_runs_eagerly_in_silence_and_on_says_so() -> None:
    walk = Walk()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner = GraphRunner(GraphConfig())
        runner.run(walk.step, 5)
    assert runner.is_eager(walk.step)
    assert (runner.statistics.eager_steps, runner.statistics.fallbacks) == (5, 0)
    with pytest.warns(RuntimeWarning, match="graph mode 'on' needs a CUDA device, not cpu"):
        assert GraphRunner(GraphConfig(mode="on")).statistics.fallbacks == 1
    with pytest.raises(ValueError, match="use 'auto', 'off' or 'fake'"):
        GraphRunner(GraphConfig(mode="on", strict=True))


def test_settings_out_of_range_are_named() -> None:
    for settings, message in (
        ({"mode": "always"}, "mode='always' must be one of 'auto', 'on', 'off', 'fake'"),
        ({"warmup_steps": 0}, "warmup_steps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            GraphConfig(**settings)  # type: ignore[arg-type]
