"""Every family trains whole or by LoRA, resumes bit for bit, and what it saves plain diffusers loads."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import Refusal
from tiny_pipelines import (
    FAMILIES,
    PROMPTS,
    backbone_of,
    guided,
    load_as_card_says,
    load_pipeline,
    ode_images,
    own_call,
    saved_pipeline,
    settings_of,
    tiny_pipeline,
    use_first_order,
)
from tiny_trainers import anchor_output, clones, differing, trainer_of
from torch import Tensor

from lacfast import (
    CriticConfig,
    LoRAConfig,
    load_backbone,
)
from lacfast.checkpoint import save_backbone
from lacfast.runtime.directories import DamagedError

LORA = LoRAConfig(rank=4, alpha=8)
KINDS = ("sd15", "sd3", "z_image", "wan")
"""A family of each kind of model: UNet, transformer, one with a forward of its own, videos."""
TRUNKS = {
    # An adapter fits the layers of a family, the others ask it for what the branch does.
    "lora": FAMILIES,
    **dict.fromkeys(("shared", "copy"), KINDS),
    # The features of a shared one, with their gradient.
    "joint": ("sd15", "sd3"),
    # Of the model's forward it takes the clean latents alone, which epsilon, flow and frames make different.
    "clean_net": ("sd15", "sd3", "wan"),
}
"""Trunk -> families. The branch learns in test_two_iterations_train_the_policy_and_resume_bit_for_bit."""


def assert_trunk_learned(trunk: str, before: dict[str, Tensor], critic: torch.nn.Module) -> None:
    # The head's last layer starts at zero, so what lies below it learns from the second step on.
    changed = differing(before, dict(critic.named_parameters()))
    assert any(name.startswith("head.output.") for name in changed)
    own_trunk = [name for name in before if name.startswith("trunk.")]
    assert bool(own_trunk) == (trunk not in ("shared", "joint"))
    assert set(changed) & set(own_trunk) == set(changed) - {name for name in changed if "head." in name}
    assert not own_trunk or any(name.startswith("trunk.") for name in changed)


@pytest.mark.parametrize(
    ("lora", "family"),
    [
        *(pytest.param(LORA, family, id=f"lora-{family}") for family in FAMILIES),
        *(pytest.param(None, family, id=f"all weights-{family}") for family in KINDS),
    ],
)
def test_two_iterations_train_the_policy_and_resume_bit_for_bit(
    family: str, lora: LoRAConfig | None, tmp_path: Path
) -> None:
    guidance_scale = 1.0 if lora is None else 4.3
    trainer = trainer_of(backbone_of(tiny_pipeline(family), lora=lora), guidance_scale=guidance_scale)
    before, base = clones(trainer.backbone.policy_state()), anchor_output(trainer)
    frozen = clones(dict(trainer.backbone.model.named_parameters()))
    assert trainer.critic is not None
    untaught = clones(dict(trainer.critic.named_parameters()))
    first = trainer.train_iteration()
    assert first["first_max_abs_log_ratio"] == 0
    assert_trunk_learned("branch", untaught, trainer.critic)
    others = [each for each in trainer.backbone.model.parameters() if not each.requires_grad]
    assert all(parameter.grad is None for parameter in others)
    trainer.save(tmp_path / "run")
    second = trainer.train_iteration()
    assert second["first_max_abs_log_ratio"] == 0
    assert float(second["kl_ref"].nan_to_num().sum()) > 0
    assert differing(before, trainer.backbone.policy_state())
    assert torch.equal(anchor_output(trainer), base)
    if lora is not None:
        trained = differing(frozen, dict(trainer.backbone.model.named_parameters()))
        assert all("lora_" in name for name in trained)

    resumed = trainer_of(backbone_of(tiny_pipeline(family), lora=lora), guidance_scale=guidance_scale)
    resumed.load(tmp_path / "run")
    again = resumed.train_iteration()
    for name in ("policy_loss", "value_loss", "reward/brightness", "policy_grad_norm"):
        assert second[name] == again[name], name
    assert not differing(trainer.backbone.policy_state(), resumed.backbone.policy_state())
    assert torch.equal(anchor_output(resumed), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_lora_gives_the_same_image_in_plain_diffusers(family: str, tmp_path: Path) -> None:
    base, scale = saved_pipeline(family, tmp_path / "base"), guided(family, 2.0)
    trainer = trainer_of(load_backbone(base, lora=LORA, settings=settings_of(family)))
    untrained = ode_images(trainer.backbone, PROMPTS[:1], scale)[1]
    trainer.train_iteration()
    save_backbone(trainer.backbone, tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("**/diffusion_pytorch_model*"))
    latents, images = ode_images(trainer.backbone, PROMPTS[:1], scale)
    assert not torch.allclose(images, untrained, atol=1e-3)

    pipeline = load_as_card_says(tmp_path / "saved", base)
    use_first_order(pipeline)
    torch.testing.assert_close(
        own_call(pipeline, PROMPTS[:1], latents.clone(), scale), images, rtol=0, atol=1e-4
    )

    loaded = load_backbone(tmp_path / "saved")
    assert torch.equal(ode_images(loaded, PROMPTS[:1], scale)[1], images)
    assert loaded.lora == LORA
    assert loaded.critic is not None
    assert not differing(loaded.critic.state_dict(), trainer.backbone.critic.state_dict())


@pytest.mark.parametrize(
    ("family", "freed"), [("sd15", False), ("flux", True)], ids=["whole", "encoders freed"]
)
def test_saved_weights_give_the_same_image_in_plain_diffusers(
    family: str, freed: bool, tmp_path: Path
) -> None:
    base = saved_pipeline(family, tmp_path / "base")
    # The critic's own adapter must leave no trace in the saved model.
    trainer = trainer_of(load_backbone(base, settings=settings_of(family)), trunk="lora")
    if freed:
        trainer.backbone.free_text_encoders()
    trainer.train_iteration()
    save_backbone(trainer.backbone, tmp_path / "saved")
    latents, images = ode_images(trainer.backbone, PROMPTS[:1], 2.0)
    pipeline = load_as_card_says(tmp_path / "saved", base)
    use_first_order(pipeline)
    torch.testing.assert_close(
        own_call(pipeline, PROMPTS[:1], latents.clone(), 2.0), images, rtol=0, atol=1e-4
    )
    loaded = load_backbone(tmp_path / "saved")
    assert torch.equal(ode_images(loaded, PROMPTS[:1], 2.0)[1], images)


@pytest.mark.parametrize(
    ("trunk", "family"), [(trunk, family) for trunk, families in TRUNKS.items() for family in families]
)
def test_every_trunk_values_and_learns_beside_a_lora_policy(family: str, trunk: str) -> None:
    backbone = backbone_of(tiny_pipeline(family), lora=LORA)
    trainer = trainer_of(backbone, trunk=trunk)
    assert trainer.critic is not None
    before, policy = clones(dict(trainer.critic.named_parameters())), clones(backbone.policy_state())
    frozen = {id(parameter) for parameter in backbone.model.parameters() if not parameter.requires_grad}
    metrics = trainer.train_iteration()
    assert metrics["first_max_abs_log_ratio"] == 0
    assert_trunk_learned(trunk, before, trainer.critic)
    assert differing(policy, backbone.policy_state())
    assert all(parameter.grad is None for parameter in backbone.model.parameters() if id(parameter) in frozen)


def test_a_joint_critic_s_value_loss_moves_the_policy_and_a_shared_one_s_does_not() -> None:
    states = {}
    for name, trunk, weight in (
        ("shared", "shared", 1.0),
        ("weak", "joint", 1e-6),
        ("strong", "joint", 10.0),
    ):
        backbone = backbone_of(tiny_pipeline("sd3"), lora=LORA)
        critic = CriticConfig(trunk=trunk, hidden_dim=16, head_dim=8, num_heads=2)
        if trunk == "joint":
            critic = replace(critic, joint_weight=weight)
        trainer = trainer_of(backbone, critic=critic)
        # Two iterations: at first the head is zero and so is the gradient behind it.
        trainer.train(2)
        states[name] = torch.cat([tensor.flatten() for tensor in backbone.policy_state().values()])
    assert (states["weak"] - states["shared"]).norm() < 0.1 * (states["strong"] - states["shared"]).norm()


def test_adapters_of_policy_and_critic_share_one_base() -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=LORA)
    trainer = trainer_of(backbone, trunk="lora")
    assert trainer.critic is not None
    policy = {id(parameter) for parameter in backbone.policy_parameters()}
    critic = {id(parameter) for parameter in trainer.critic.trunk.parameters()}
    assert policy
    assert critic
    assert not policy & critic
    own = {id(parameter) for parameter in backbone.model.parameters()}
    assert policy | critic < own
    assert trainer.learner.anchor is not None
    assert trainer.learner.anchor.backbone.model is backbone.model


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_bfloat16_runs_on_float32_masters(family: str) -> None:
    """A frozen base in bfloat16; a trained one in float32 that runs in bfloat16."""
    rewards = []
    for lora in (LORA, None):
        backbone = backbone_of(tiny_pipeline(family), lora=lora, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in backbone.policy_parameters()} == {torch.float32}
        others = {id(parameter) for parameter in backbone.policy_parameters()}
        frozen = [parameter for parameter in backbone.model.parameters() if id(parameter) not in others]
        assert {parameter.dtype for parameter in frozen} <= {torch.bfloat16}
        inner: list[torch.dtype] = []
        attention = next(module for name, module in backbone.model.named_modules() if name.endswith("to_q"))
        handle = attention.register_forward_hook(
            lambda layer, inputs, output, seen=inner: seen.append(output.dtype)
        )
        trainer = trainer_of(backbone)
        metrics = trainer.train_iteration()
        handle.remove()
        assert set(inner) == {torch.bfloat16}
        assert metrics["first_max_abs_log_ratio"] == 0
        assert trainer.critic is not None
        assert {parameter.dtype for parameter in trainer.critic.parameters()} == {torch.float32}
        rewards.append(next(value for name, value in metrics.items() if name.startswith("reward/")))
    # An adapter that has learnt nothing samples what its base does.
    assert rewards[0] == pytest.approx(rewards[1], rel=2**-10)


@pytest.mark.parametrize(("family", "trunk"), [("sd15", "lora"), ("sd3", "joint")])
def test_gradient_checkpointing_changes_nothing(family: str, trunk: str) -> None:
    """A recomputed block must run with the same adapter and still give the critic its features."""
    states = []
    for is_checkpointed in (False, True):
        backbone = backbone_of(tiny_pipeline(family), lora=LORA)
        if is_checkpointed:
            backbone.enable_gradient_checkpointing()
        # Behind the first of two minibatches the head is no longer zero, nor the gradient behind it.
        trainer_of(backbone, trunk=trunk).train(1)
        states.append(clones(backbone.policy_state()))
    assert not differing(*states)


@pytest.mark.parametrize("owner", ["the trainer", "the pipeline"])
def test_gradient_checkpointing_asks_for_no_generator_s_state(
    owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which could not be read in a capture."""
    pipeline = tiny_pipeline("sd3")
    if owner == "the pipeline":
        pipeline.transformer.enable_gradient_checkpointing()
    backbone = backbone_of(pipeline, lora=LORA)
    if owner == "the trainer":
        backbone.enable_gradient_checkpointing()
    assert backbone.model.is_gradient_checkpointing
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a generator's state was read"))
    sample = torch.zeros(1, *backbone.latent_shape)
    backbone.predict(sample, torch.ones(1), backbone.encode_unconditional(1)).sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
def test_two_iterations_train_on_a_gpu_in_bfloat16(family: str, lora: LoRAConfig | None) -> None:
    backbone = backbone_of(tiny_pipeline(family), lora=lora, device="cuda", dtype=torch.bfloat16)
    trainer = trainer_of(backbone, guidance_scale=4.3)
    before = clones(backbone.policy_state())
    for metrics in (trainer.train_iteration(), trainer.train_iteration()):
        assert metrics["first_max_abs_log_ratio"] < 1e-6
        assert torch.isfinite(torch.tensor([metrics["policy_loss"], metrics["value_loss"]])).all()
    assert differing(before, backbone.policy_state())


def test_adapters_of_somebody_else_are_refused() -> None:
    pipeline = tiny_pipeline("sd3")
    backbone_of(pipeline, lora=LORA)
    with pytest.raises(
        ValueError,
        match=r"already has adapters \['policy'\]; load the pipeline anew and say",
    ):
        backbone_of(pipeline)


def test_a_lora_that_fits_no_module_or_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_modules=\['nothing'\] match no module of SD3Transformer"):
        backbone_of(tiny_pipeline("sd3"), lora=LoRAConfig(target_modules=("nothing",)))
    save_backbone(backbone_of(tiny_pipeline("sd3"), lora=LORA), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"does not know the StableDiffusion3Pipeline .* as base="):
        load_backbone(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"holds a LoRA of .*rank=4.* leave lora out"):
        load_backbone(tmp_path / "saved", base=tiny_pipeline("sd3"), lora=LoRAConfig(rank=5))
    loaded = load_backbone(tmp_path / "saved", base=tiny_pipeline("sd3"))
    assert loaded.lora == LORA


def test_the_example_of_twenty_lines_trains_and_its_lora_loads_in_plain_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "sd15_jpeg.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 20
    base = saved_pipeline("sd15", tmp_path / "base")
    monkeypatch.setattr("sys.argv", [str(script), str(base), str(tmp_path / "out"), "1"])
    runpy.run_path(str(script), run_name="__main__")
    assert float(capsys.readouterr().out) < 0
    pipeline = load_pipeline(base)
    pipeline.load_lora_weights(tmp_path / "out")
    assert pipeline.get_active_adapters()


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(
            "was trained with lora=LoRAConfig(rank=4, alpha=8",
            cause="A checkpoint is loaded into a model whose LoRA has another scale, which no shape tells.",
            remedy="use the same, or start another run from the weights",
        )
    ],
)
def test_a_lora_of_another_scale_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    save_backbone(backbone_of(tiny_pipeline("sd3"), lora=LoRAConfig(rank=4, alpha=8)), tmp_path / "saved")
    with refusal.raised():
        backbone_of(tiny_pipeline("sd3"), lora=LoRAConfig(rank=4, alpha=4)).read_policy(tmp_path / "saved")
    backbone_of(tiny_pipeline("sd3"), lora=LoRAConfig(rank=4, alpha=8, seed=3)).read_policy(
        tmp_path / "saved"
    )


def test_a_damaged_model_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    save_backbone(backbone_of(tiny_pipeline("sd3"), lora=LORA), tmp_path / "saved")
    file = tmp_path / "saved" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"saved is damaged: pytorch_lora_weights\.safetensors has"):
        load_backbone(tmp_path / "saved", base=tiny_pipeline("sd3"))
