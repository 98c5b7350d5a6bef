# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Write a reward
#
# A reward is a function of images (B, 3, H, W) in [0, 1], prompts and metadata. It gives a number per
# image; more is better. Nothing has to be registered.

# %%
import torch

from lacfast.rewards.jpeg import jpeg_compressibility
from lacfast.rewards.registry import RewardSet


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


# %% [markdown]
# ## Try it before you train with it
#
# `RewardSet` scores as the trainer does, and refuses what the trainer would: a wrong shape, a NaN, a
# missing score. Take images whose order you know.

# %%
red, grey, blue = torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.5), torch.zeros(3, 8, 8)
red[0], blue[2] = 1.0, 1.0
images, prompts = torch.stack([red, grey, blue]), ["anything"] * 3
scores = RewardSet.create([redness]).score(images, prompts, [{}] * 3)
print(scores)
assert scores["redness"].argsort(descending=True).tolist() == [0, 1, 2]


# %% [markdown]
# ## A function that knows its prompt
#
# The row of a prompt's file is its metadata: `{"prompt": "a red cat", "channel": 0}` in a .jsonl file.


# %%
def obeys(images, prompts, metadata):
    wanted = torch.tensor([row["channel"] for row in metadata])
    shares = images.mean(dim=(2, 3)) / images.mean(dim=(1, 2, 3))[:, None].clamp(min=1e-6)
    return shares.gather(1, wanted[:, None])[:, 0]


rows = [{"channel": channel} for channel in (0, 1, 2)]
print(RewardSet.create([obeys]).score(images, ["red", "green", "blue"], rows))

# %% [markdown]
# ## Several, with weights
#
# In Python a dict of functions and weights; on the command line `--rewards mypackage.rewards:obeys 1.0
# jpeg_compressibility 0.2`. Each has a head of the critic and statistics of its own. A score that only
# reports, and is not trained, shows hacking: give it as an evaluation reward.

# %%
both = RewardSet.create({redness: 1.0, jpeg_compressibility: 0.2})
print(both.names, both.score(images, prompts, [{}] * 3))
