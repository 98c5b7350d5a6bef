"""A check is made once for tensors that are alike, and what is not alike is found as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast import ops
from lacfast.ops import checks
from lacfast.ops.backend import layout_reader
from lacfast.records import NoiseKey, TrajectorySlab

LATENTS = torch.ones(2, 4, 3)
TABLE = torch.tensor([[1.0, 0.5, 0.2], [1.0, 0.4, 0.1]])
STEPS = torch.zeros(2, dtype=torch.int64)
KEY = NoiseKey.create(0, range(2))


def slab() -> TrajectorySlab:
    return TrajectorySlab(torch.empty(3, 2, 4, 3), torch.empty(2, 2, 4, 3), torch.empty(2, 2))


CALLS: dict[str, tuple[Callable[..., object], dict[str, object]]] = {
    "gaussian_step": (
        ops.gaussian_step,
        {"sample": LATENTS, "model_output": LATENTS, "coefficients": TABLE, "steps": STEPS, "noise": LATENTS},
    ),
    "gaussian_step_": (
        ops.gaussian_step_,
        {
            "sample": LATENTS.clone(),
            "model_output": LATENTS,
            "coefficients": TABLE,
            "steps": STEPS,
            "noise": LATENTS,
            "slab": slab(),
        },
    ),
    "step_log_prob": (
        ops.step_log_prob,
        {
            "sample": LATENTS,
            "model_output": LATENTS,
            "prev_sample": LATENTS,
            "coefficients": TABLE,
            "steps": STEPS,
        },
    ),
    "log_ratio": (
        ops.log_ratio,
        {
            "model_output": LATENTS,
            "old_model_output": LATENTS,
            "coefficients": TABLE,
            "steps": STEPS,
            "noise": LATENTS,
            "anchor_output": LATENTS,
        },
    ),
    "ppo_loss": (
        ops.ppo_loss,
        {
            "model_output": LATENTS,
            "old_model_output": LATENTS,
            "advantages": torch.ones(2),
            "coefficients": TABLE,
            "steps": STEPS,
            "noise": LATENTS,
            "clip_range": 1e-4,
            "weights": torch.ones(2),
            "step_weights": torch.ones(2),
            "mask": torch.ones(2, dtype=torch.bool),
        },
    ),
    "normalized_advantages": (
        ops.normalized_advantages,
        {
            "rewards": torch.ones(2, 1),
            "values": torch.ones(2, 3, 1),
            "reward_mean": torch.zeros(1),
            "reward_std": torch.ones(1),
            "weights": torch.ones(1),
            "mask": torch.ones(2, dtype=torch.bool),
        },
    ),
}
# A table may have any number of steps where nothing else has as many, and one number is always in order.
SPOILT = [
    (op, name, how)
    for op, (_, given) in CALLS.items()
    for name, value in given.items()
    if isinstance(value, Tensor)
    for how in ("dtype", "shape", "order", "device")
    if (name, how) != ("coefficients", "shape") or op in ("gaussian_step_", "ppo_loss")
    if how != "order" or value.numel() > 1
]
seen_by_dlpack = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no exchange of DLPack in C"
)


def spoilt(tensor: Tensor) -> dict[str, Tensor]:
    """The tensor in another dtype, shape, memory order and on another device."""
    other = torch.int32 if tensor.dtype != torch.int32 else torch.int64
    spread = torch.ones((*tensor.shape, 2)).to(tensor.dtype)[..., 0]
    found = {"dtype": tensor.to(other), "shape": torch.cat([tensor, tensor, tensor])}
    return found | {"order": spread, "device": tensor.to("meta")}


@pytest.mark.parametrize(("op", "name", "how"), SPOILT)
def test_an_operand_that_does_not_fit_is_refused_after_a_call_that_did(op: str, name: str, how: str) -> None:
    function, given = CALLS[op]
    function(**given)
    with pytest.raises(ValueError, match=r" has | is on "):
        function(**given | {name: spoilt(given[name])[how]})  # type: ignore[arg-type]
    function(**given)


@pytest.mark.parametrize("op", [op for op in CALLS if "noise" in CALLS[op][1]])
def test_a_key_is_checked_beside_noise_that_fits(op: str) -> None:
    function, given = CALLS[op]
    function(**given)
    function(**given | {"noise": KEY})
    with pytest.raises(ValueError, match=r"noise\.sample_ids has shape"):
        function(**given | {"noise": NoiseKey(KEY.seed, KEY.sample_ids[:1])})
    with pytest.raises(ValueError, match=r"noise\.seed has dtype"):
        function(**given | {"noise": NoiseKey(KEY.seed.int(), KEY.sample_ids)})
    for absent in (None, NoiseKey(None, KEY.sample_ids), NoiseKey(KEY.seed, None)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="neither a tensor nor a key with a seed and sample ids; pass"):
            function(**given | {"noise": absent})


def test_a_setting_is_a_part_of_what_is_remembered() -> None:
    function, given = CALLS["normalized_advantages"]
    two = given | {name: torch.ones(2) for name in ("reward_mean", "reward_std", "weights")}
    two |= {"rewards": torch.ones(2, 2), "values": torch.ones(2, 3, 1)}
    function(**two, combination="scalarized")
    with pytest.raises(ValueError, match="values has 1 heads for 2 rewards"):
        function(**two)


def counted() -> tuple[Callable[..., None], list[tuple[object, ...]]]:
    """A check that accepts all, and what it was asked."""
    asked: list[tuple[object, ...]] = []

    @checks.once_per_layout
    def check(*tensors: Tensor | None, setting: int = 0) -> None:
        asked.append((*tensors, setting))

    return check, asked


@seen_by_dlpack
def test_what_is_alike_is_checked_once() -> None:
    check, asked = counted()
    for tensor in (LATENTS, LATENTS.clone(), torch.zeros_like(LATENTS).requires_grad_()):
        check(tensor, None)
    assert len(asked) == 1
    check(tensor, tensor)
    check(None, tensor)
    check(tensor, None, setting=1)
    check(tensor, None, setting=1)
    assert len(asked) == 4


def test_what_cannot_be_looked_at_is_checked_each_time() -> None:
    check, asked = counted()
    with FakeTensorMode():
        fake = torch.ones(2, 3)
    for tensor in (fake, LATENTS.mT, torch.nn.Parameter(LATENTS), torch.ones(2, device="meta")):
        assert layout_reader()((tensor,)) is None
        asked.clear()
        check(tensor)
        check(tensor)
        assert len(asked) == 2


def test_what_was_refused_is_refused_again() -> None:
    @checks.once_per_layout
    def check(tensor: Tensor) -> None:
        raise ValueError("never")

    for _ in range(2):
        with pytest.raises(ValueError, match="never"):
            check(LATENTS)


@seen_by_dlpack
def test_what_a_check_found_is_returned_again() -> None:
    @checks.once_per_layout
    def check(tensor: Tensor, *, factor: float) -> list[float]:
        return [factor * tensor.numel()]

    first = check(LATENTS, factor=0.5)
    assert first == [0.5 * LATENTS.numel()]
    assert check(LATENTS.clone(), factor=0.5) is first
    assert check(LATENTS, factor=2.0) == [2.0 * LATENTS.numel()]


@seen_by_dlpack
def test_no_more_layouts_are_kept_than_a_run_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_LAYOUTS", 2)
    check, asked = counted()
    for _ in range(2):
        for size in range(1, 5):
            check(torch.ones(size))
    assert [tensor.numel() for tensor, _ in asked] == [1, 2, 3, 4, 3, 4]  # type: ignore[attr-defined]


@seen_by_dlpack
def test_layouts_tell_devices_dtypes_and_shapes_apart() -> None:
    tensors = [
        *(torch.ones(shape) for shape in ((), (1,), (6,), (2, 3), (3, 2), (0, 3), (1, 2, 3))),
        *(torch.ones(6, dtype=dtype) for dtype in (*checks.FLOATS[1:], torch.int64, torch.int32, torch.bool)),
    ]
    layouts = [layout_reader()((tensor,)) for tensor in tensors]
    assert None not in layouts
    assert len(set(layouts)) == len(tensors)
    one, other = tensors[3], tensors[4]
    pairs = [(one, other), (other, one), (one, None), (None, one), (one,)]
    assert len({layout_reader()(pair) for pair in pairs}) == len(pairs)


def test_ops_refuse_a_traced_operand_too() -> None:
    function, given = CALLS["step_log_prob"]
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    function(**given)
    assert compiled(**given).shape == (2,)
    with pytest.raises(Exception, match=r"steps has dtype torch\.int32"):
        compiled(**given | {"steps": STEPS.int()})
