# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Steer your own pipeline with a critic file
#
# A critic that was trained with a model says of any noisy latent what its image will be worth. Here one
# is trained briefly, saved as one file, and put on a plain pipeline, whose weights nobody touched.

# %%
import torch

import lacfast

MODEL = "stabilityai/stable-diffusion-3.5-medium"
DEVICE = "cuda"


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


# %% [markdown]
# ## A critic
#
# Value pretraining alone makes one: the actor stays as it is. `critic.safetensors` in the saved directory
# says how it is built, of which rewards it speaks and in which units.

# %%
sampler = lacfast.SamplerConfig(num_steps=10, noise_level=0.7)
config = lacfast.TrainConfig(batch_size=96, rollout_batch_size=24, sampler=sampler)
backbone = lacfast.load_backbone(MODEL, device=DEVICE, dtype=torch.bfloat16, lora=lacfast.LoRAConfig(rank=32))
trainer = lacfast.LatentActorCriticTrainer(backbone, redness, ["a cat", "the sky", "a tree"], config)
result = trainer.pretrain_critic()
print("explained variance per step:", result.explained_variance)
trainer.save("runs/critic")

# %% [markdown]
# ## The pipeline with it
#
# Eight trajectories of an image compete; at a quarter, half and three quarters of the steps those that
# the critic expects least of are left out.

# %%
plain = lacfast.load_backbone(
    MODEL, device=DEVICE, dtype=torch.bfloat16, critic_file="runs/critic/critic.safetensors"
)
prompts = ["a dog", "a house"]
settings = lacfast.SteeringConfig(method="pruning", particles=8, prune_fractions=(0.25, 0.5, 0.75))
steered, stats = lacfast.steer(plain, prompts, settings, sampler=sampler)
unsteered, _ = lacfast.steer(plain, prompts, lacfast.SteeringConfig(particles=1), sampler=sampler)

# %% [markdown]
# What it reached, what it cost. A critic that explains nothing steers nowhere: look at its explained
# variance first.

# %%
for name, images in (("unsteered", unsteered), ("steered", steered)):
    print(f"{name:10} {float(redness(images, prompts, None).mean()):.4f}")
print("forwards per image:", stats.evaluations.per_image)
