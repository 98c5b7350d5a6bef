"""Train Stable Diffusion 1.5 towards pictures that JPEG compresses well: [model] [output] [iterations]."""

import sys

import torch

import lacfast
from lacfast.config import Ratio

given = dict(enumerate(sys.argv))
model, out = given.get(1, "stable-diffusion-v1-5/stable-diffusion-v1-5"), given.get(2, "sd15_jpeg")
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
prompts = [f"a photo of a {animal}" for animal in ("cat", "dog", "horse", "fox", "owl", "whale", "hen")]
backbone = lacfast.load_backbone(model, device=device, dtype=dtype, lora=lacfast.LoRAConfig(rank=16))
sampler = lacfast.SamplerConfig(kind="ddim", num_steps=20, noise_level=1.0, guidance_scale=5.0)
ppo = lacfast.PPOConfig(clip=Ratio(1e-5), microbatch_size=8, timestep_fraction=0.5)
config = lacfast.TrainConfig(batch_size=16, sampler=sampler, ppo=ppo)
trainer = lacfast.LatentActorCriticTrainer(backbone, "jpeg_compressibility", prompts, config)
trainer.train(int(given.get(3, 100)), on_iteration=lambda m: print(m["reward/jpeg_compressibility"]))
trainer.save(out)
