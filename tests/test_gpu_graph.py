"""What only a CUDA device can tell of graphs: real captures, their memory, and what goes wrong in one."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lacfast import ops
from lacfast.config import GraphConfig, SamplerConfig
from lacfast.records import NoiseKey, TrajectorySlab
from lacfast.runtime.cuda_graph import CudaCapture
from lacfast.runtime.graph import GraphRunner, StaticStep

pytestmark = pytest.mark.gpu

ON = GraphConfig(mode="on", strict=True, warmup_steps=2)


@pytest.fixture
def make_runner() -> Iterator[Callable[[GraphConfig], GraphRunner]]:
    """Runners on the device that are closed when the test ends."""
    runners: list[GraphRunner] = []

    def make(config: GraphConfig) -> GraphRunner:
        runners.append(GraphRunner(config, "cuda"))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


class Walk:
    """x <- tanh(x w) + k, kept in slice k, with k on the device."""

    def __init__(self, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(4, size, generator=generator).cuda()
        self.weight = (torch.randn(size, size, generator=generator) / size**0.5).cuda()
        self.kept = torch.zeros(12, 4, size, device="cuda")
        self.k = torch.zeros(1, dtype=torch.int64, device="cuda")
        written = (self.x, self.kept, self.k)
        self.step = StaticStep("a walk", self.run, lambda: written, lambda: {"weight": self.weight})

    def run(self) -> None:
        moved = torch.tanh(self.x @ self.weight) + self.k
        self.kept.index_copy_(0, self.k, moved[None])
        self.x.copy_(moved)
        self.k.add_(1)

    def begin(self) -> None:
        self.x.fill_(0.5)
        self.kept.zero_()
        self.k.zero_()


def assert_walks_alike(runner: GraphRunner, ours: Walk, eager: Walk, *, times: int) -> None:
    for walk in (ours, eager):
        walk.begin()
    runner.run(ours.step, times)
    for _ in range(times):
        eager.run()
    assert torch.equal(ours.kept, eager.kept)
    assert int(ours.k) == times


def test_replay_equals_eager_bit_for_bit_after_updates(
    make_runner: Callable[[GraphConfig], GraphRunner],
) -> None:
    runner = make_runner(ON)
    ours, eager = Walk(), Walk()
    for times in (11, 5, 12, 1):
        for walk in (ours, eager):
            walk.weight.mul_(0.9)
        assert_walks_alike(runner, ours, eager, times=times)
    assert runner.statistics.captures == 1
    assert runner.statistics.fallbacks == 0
    assert runner.statistics.graph_bytes > 0


def test_graphs_of_one_runner_share_a_pool_and_do_not_disturb_each_other(
    make_runner: Callable[[GraphConfig], GraphRunner],
) -> None:
    runner = make_runner(ON)
    pairs = [(Walk(size), Walk(size)) for size in (64, 48)]
    for _ in range(3):
        for ours, eager in pairs:
            assert_walks_alike(runner, ours, eager, times=7)
    assert runner.statistics.captures == 2


def test_closing_gives_the_pool_back(make_runner: Callable[[GraphConfig], GraphRunner]) -> None:
    runner, walk = make_runner(ON), Walk(1024)
    runner.run(walk.step, 4)
    torch.cuda.synchronize()
    held = torch.cuda.memory_reserved()
    graph_bytes = runner.statistics.graph_bytes
    assert graph_bytes > 0
    runner.close()
    assert torch.cuda.memory_reserved() <= held - graph_bytes
    assert_walks_alike(runner, walk, Walk(1024), times=6)


def test_a_step_that_waits_for_the_device_falls_back_and_leaves_capture_usable(
    make_runner: Callable[[GraphConfig], GraphRunner],
) -> None:
    runner, x = make_runner(replace(ON, strict=False)), torch.zeros(3, device="cuda")
    step = StaticStep("a waiting step", lambda: x.add_(x.sum().item() + 1), lambda: (x,), dict)
    outer = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="a waiting step cannot be captured"):
        runner.run(step, 5)
    assert torch.cuda.current_stream() == outer
    expected = torch.zeros(3, device="cuda")
    for _ in range(5):
        expected.add_(expected.sum().item() + 1)
    assert torch.equal(x, expected)
    assert runner.statistics.fallbacks == 1
    # The default generator, which a capture registers, draws as before.
    assert torch.isfinite(torch.randn(3, device="cuda")).all()
    assert_walks_alike(runner, Walk(), Walk(), times=6)
    assert runner.statistics.captures == 1


def test_a_device_without_an_index_is_the_one_that_was_current() -> None:
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        capture = CudaCapture(torch.device("cuda"))
    assert capture.device == capture.stream.device == torch.device("cuda", last)


def test_a_number_that_changes_in_python_is_found_at_first_use(
    make_runner: Callable[[GraphConfig], GraphRunner],
) -> None:
    x, count = torch.zeros(3, device="cuda"), [0]

    def run() -> None:
        count[0] += 1
        x.add_(count[0])

    with pytest.raises(RuntimeError, match="a counting step replays to other values"):
        make_runner(ON).run(StaticStep("a counting step", run, lambda: (x,), dict), 5)


def test_auto_captures_what_launches_bound_and_nothing_else(
    make_runner: Callable[[GraphConfig], GraphRunner],
) -> None:
    runner = make_runner(GraphConfig(strict=True))
    small, large = torch.ones(8, device="cuda"), torch.zeros(8192, 8192, device="cuda")

    def many_launches() -> None:
        for _ in range(200):
            small.mul_(1.0)

    def large_products() -> None:
        for _ in range(4):
            torch.mm(large, large, out=large_product)

    large_product = torch.empty_like(large)
    bound = StaticStep("many launches", many_launches, lambda: (small,), dict)
    compute = StaticStep("large products", large_products, lambda: (large_product,), dict)
    for step in (bound, compute):
        runner.run(step, 6)
    assert not runner.is_eager(bound)
    assert runner.is_eager(compute)
    assert (runner.statistics.captures, runner.statistics.fallbacks) == (1, 0)


def test_a_training_step_is_captured_with_its_backward_pass(
    make_runner: Callable[[GraphConfig], GraphRunner],
) -> None:
    losses = []
    for runner in (make_runner(ON), GraphRunner()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 1)).cuda()
        inputs, loss = torch.randn(16, 32).cuda(), torch.zeros((), device="cuda")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

        def run(model: nn.Module = model, inputs: Tensor = inputs, loss: Tensor = loss) -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                value = model(inputs).square().mean()
            value.backward()
            loss.copy_(value.detach())

        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        written, weights = (loss, *gradients), dict(model.named_parameters())
        step = StaticStep(
            "a training step", run, lambda written=written: written, lambda weights=weights: weights
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad(set_to_none=False)
            runner.run(step)
            optimizer.step()
            losses[-1].append(loss.clone())
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_another_thread_may_use_the_device_during_a_capture(
    make_runner: Callable[[GraphConfig], GraphRunner],
) -> None:
    stop, errors = threading.Event(), []

    def score() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                size = 1
                while not stop.is_set():
                    size = size % 4096 + 97
                    torch.ones(size, size, device="cuda").sum().cpu()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    try:
        for _ in range(5):
            assert_walks_alike(make_runner(ON), Walk(), Walk(), times=8)
    finally:
        stop.set()
        thread.join()
    assert errors == []


@pytest.mark.parametrize("family", ["dit", "unet"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_captured_rollouts_are_the_eager_ones(
    family: str, guidance_scale: float, make_runner: Callable[[GraphConfig], GraphRunner]
) -> None:
    # A lent GPU machine may lack diffusers.
    tiny = pytest.importorskip("tiny_backbones")
    build_critic = pytest.importorskip("lacfast.backbone").build_critic
    sampler_of = pytest.importorskip("lacfast.rollout.sampler").RolloutSampler
    backbone = tiny.tiny_backbone(family, size=tiny.models.TINY)
    for module in (backbone.model, backbone.prompt_encoder, backbone.codec):
        module.cuda()
    critic = build_critic(backbone, 2, tiny.tiny_config().critic)
    nn.init.normal_(critic.head.output.weight)
    runner = make_runner(ON)
    captured, eager = (sampler_of(backbone, critic, each) for each in (runner, GraphRunner(device="cuda")))
    for num_steps, noise_level, seed in ((8, 0.7, 0), (6, 0.3, 1), (3, 0.7, 2)):
        config = SamplerConfig(num_steps=num_steps, noise_level=noise_level)
        table = backbone.transition_table(config)
        key = NoiseKey.create(seed, range(4), "cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            ours, exact = (
                sampler.sample(table, tiny.PROMPTS[:4], [{}] * 4, key, guidance_scale=guidance_scale)
                for sampler in (captured, eager)
            )
        for name in ("latents", "model_outputs", "log_probs", "values"):
            assert torch.equal(getattr(ours, name), getattr(exact, name)), name
        with torch.no_grad():
            for parameter in backbone.policy_parameters():
                parameter.mul_(0.99)
    assert runner.statistics.captures == 1


def test_a_step_beyond_the_table_writes_nothing_into_the_slab() -> None:
    table = torch.tensor([[0.9, -0.2, 0.3], [0.8, -0.3, 0.2]], device="cuda")
    buffers = [
        torch.full((12, *shape), 7.0, device="cuda") for shape in ((2, 4, 64, 64), (2, 4, 64, 64), (2,))
    ]
    slab = TrajectorySlab(buffers[0][5:8], buffers[1][5:7], buffers[2][5:7])
    sample = torch.ones(2, 4, 64, 64, device="cuda")
    steps = torch.tensor([2, -1], device="cuda")
    ops.gaussian_step_(
        sample, sample.clone(), table, steps, noise=NoiseKey.create(0, range(2), "cuda"), slab=slab
    )
    assert all(bool((buffer == 7).all()) for buffer in buffers)
    assert sample.isnan().all()


def test_launches_and_graphs_side_by_side_share_no_tickets() -> None:
    """Latents of several parts: a ticket in two hands would leave a part out of a sum, or the whole sum."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(3, 16, 64, 64, generator=generator).cuda() for _ in range(3)]
    coefficients = torch.tensor([[0.9, -0.1, 0.2]]).cuda()
    steps = torch.zeros(3, dtype=torch.int64).cuda()

    def log_prob() -> Tensor:
        return ops.step_log_prob(*latents, coefficients, steps)

    expected, streams = log_prob(), [torch.cuda.Stream() for _ in range(3)]
    graphs = []
    for stream in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            graphs.append((graph, log_prob()))
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, (graph, captured) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                found += [captured.clone(), log_prob()]
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in found)
