"""The peers' loops do what lacfast does: same trajectories from the same noise, same gradients."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear

from bench.equal_results import (
    both_gradients,
    both_trajectories,
    relative,
    sampling_differences,
    scored_rollout,
)
from bench.matched_loops import PEER_BATCH, Match, counted_noise, engine, peer_loop, plain_score, tiny_match
from bench.peer_loops import PeerModel
from lacfast.backbones.lora import tuner_layers
from lacfast.backbones.lora_linear import LoRALinear
from tests.tiny_backbones import SMALLEST, tiny_backbone

SAME_NOISE = 1e-6
"""Two backends' normals are as far from each other: 5e-7, relative."""


@pytest.fixture(scope="module", params=["dit", "unet"])
def match(request: pytest.FixtureRequest) -> Match:
    return tiny_match(request.param, batches=2, num_steps=3, size=SMALLEST)


def test_trajectories_are_equal_on_the_same_noise(match: Match) -> None:
    rollout = scored_rollout(engine(match, microbatch_size=64), match)
    for batch_size in (PEER_BATCH[match.peer], match.trajectories):
        differences = sampling_differences(rollout, peer_loop(match, batch_size=batch_size), match)
        # Either is 4e-7 (flow) or 2.2e-6 (ddim) from the float64 trajectory.
        assert differences["latents"] < (1e-6 if match.peer == "flow_grpo" else 4e-6)
        # Of values around 1; the peer recovers the noise from a difference, at ddim's last step of std 0.02.
        assert differences["log_probs"] < (1e-6 if match.peer == "flow_grpo" else 2e-5)


def test_trajectories_are_equal_in_float64_and_ours_rounds_no_worse_than_the_peer_s(match: Match) -> None:
    exact, theirs = both_trajectories(match, batch_size=match.trajectories)
    assert exact.dtype == theirs.dtype == torch.float64
    assert relative(theirs, exact) < SAME_NOISE
    rollout = scored_rollout(engine(match, microbatch_size=64), match)
    batches = peer_loop(match, batch_size=match.trajectories).sample(list(match.prompts), counted_noise(0))
    peer_error = relative(torch.cat([batch["latents_clean"] for batch in batches]), exact)
    assert relative(rollout.clean_latents, exact) < 1.2 * peer_error


def test_a_peer_runs_peft_s_layers_and_the_engine_its_own(match: Match) -> None:
    loop, trainer = peer_loop(match, batch_size=8), engine(match, microbatch_size=8)
    for backbone, kind in ((loop.model.backbone, PeftLinear), (trainer.backbone, LoRALinear)):
        assert {type(layer) for layer in tuner_layers(backbone.model).values()} == {kind}


def test_gradients_are_equal_in_float64(match: Match) -> None:
    size = PEER_BATCH[match.peer]
    own, theirs = both_gradients(match, batch_size=size, microbatch_size=10, dtype=torch.float64)
    assert float(own.norm()) > 1e-4
    # The adapters' weights and gradients are float32 in both.
    assert relative(own, theirs) < SAME_NOISE


def test_gradients_of_float32_are_equal_up_to_rounding(match: Match) -> None:
    size = match.trajectories
    own, theirs = both_gradients(match, batch_size=size, microbatch_size=64)
    exact, _ = both_gradients(match, batch_size=size, microbatch_size=64, dtype=torch.float64)
    assert relative(own, exact) < 2e-5
    # The peer takes the noise from x' - mu, and its forward rounds otherwise than ours that sampled x': at
    # ddim's last step, of std 0.02, that is where digits are lost.
    assert relative(theirs, exact) < (2e-5 if match.peer == "flow_grpo" else 2e-4)


def test_an_iteration_of_a_peer_moves_the_weights_and_reports(match: Match) -> None:
    loop = peer_loop(match, batch_size=PEER_BATCH[match.peer])
    before = [parameter.detach().clone() for parameter in loop.parameters]
    (metrics,) = loop.iteration(list(match.prompts), plain_score)
    assert metrics["approx_kl"] < 1e-9
    assert metrics["clipfrac"] == 0
    assert any(not torch.equal(old, new.detach()) for old, new in zip(before, loop.parameters, strict=True))


def test_peers_reference_needs_an_adapter() -> None:
    model = PeerModel(tiny_backbone("dit"))
    with pytest.raises(ValueError, match="train a LoRA"), model.without_adapter():
        pass
