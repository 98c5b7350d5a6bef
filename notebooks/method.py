# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # The method in 100 lines
#
# A toy whose every part fits on this page, trained by the reference: `lacfast.reference.train_iteration`
# is the algorithm in eager PyTorch, which the trainer's kernels are tested against. No GPU, no download,
# seconds.
#
# The "images" are 2 x 2 pixels of one channel, the "prompt" is a number that says how bright one should
# be.

# %%
import torch
from torch import Tensor, nn

from lacfast.records import Conditioning, NoiseKey
from lacfast.reference import train_iteration
from lacfast.schedule import flow_table, uniform_sigmas

torch.manual_seed(0)
SHAPE, BATCH, STEPS = (1, 2, 2), 64, 4

# %% [markdown]
# ## A sampler is a table
#
# Each denoising step is x' = a x + b v + std eps. The last one has std 0: it draws no noise, so it has no
# log-prob and is not trained.

# %%
table = flow_table("flow_sde", uniform_sigmas(STEPS), 0.7, window=(0, STEPS - 1))
for a, b, std in zip(table.a, table.b, table.std, strict=True):
    print(f"a {a:6.3f}   b {b:6.3f}   std {std:6.3f}")


# %% [markdown]
# ## Actor and critic
#
# Both see a noisy latent, its time and the prompt. The actor gives an output of the latent's shape, the
# critic one number: the reward that is still to be expected, in standard deviations.


# %%
class Net(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4 + 2, 64), nn.SiLU(), nn.Linear(64, outputs))
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        told = torch.stack([timestep / 1000, conditioning.tensors["brightness"][:, 0]], dim=1)
        return self.layers(torch.cat([sample.flatten(1), told], dim=1))


class Actor(Net):
    def forward(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return super().forward(sample, timestep, conditioning).view_as(sample)


actor, critic = Actor(4), Net(1)


# %% [markdown]
# ## A reward, and its running statistics
#
# Any function of the finished latents. The critic predicts standardised rewards, so it needs mean and
# deviation.


# %%
def reward_of(wanted: Tensor):
    return lambda images: -(images.mean(dim=(1, 2, 3), keepdim=False) - wanted).abs()[:, None]


seen: list[Tensor] = []


def statistics(rewards: Tensor) -> tuple[Tensor, Tensor]:
    seen.append(rewards)
    known = torch.cat(seen[-8:])
    return known.mean(dim=0), known.std(dim=0)


# %% [markdown]
# ## Train
#
# One image per prompt: what it is compared with is what the critic expected of the same noisy latent. The
# noise of a step is a function of (seed, sample id, step), so nothing of it is stored.

# %%
policy_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-2, eps=1e-15)
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
means = []
for iteration in range(40):
    wanted = torch.rand(BATCH, generator=torch.Generator().manual_seed(iteration)) * 2 - 1
    rewards, learned = train_iteration(
        actor,
        critic,
        reward_of(wanted),
        statistics,
        table,
        Conditioning({"brightness": wanted[:, None]}),
        NoiseKey.create(0, range(iteration * BATCH, (iteration + 1) * BATCH)),
        latent_shape=SHAPE,
        weights=torch.ones(1),
        policy_optimizer=policy_optimizer,
        critic_optimizer=critic_optimizer,
        iteration=iteration,
        clip_range=5e-2,
    )
    means.append(float(rewards.mean()))
    if iteration % 10 == 9:
        print(f"iteration {iteration + 1:3}: mean reward {sum(means[-10:]) / 10:.3f}")

# %% [markdown]
# The mean distance from the wanted brightness falls. To see what the method is worth against others, and
# where it loses, read the results; to use it on a diffusion model, `lacfast.LatentActorCriticTrainer` is
# this loop with fused kernels, captured graphs and many GPUs.
