# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Read a report
#
# What `lacfast report RUN` draws and `lacfast watch RUN` tells comes from two files, which you can read
# yourself: `run.json`, the settings, and `metrics.jsonl`, a line per iteration, evaluation and iteration
# of value pretraining.

# %%
from pathlib import Path

from lacfast.report.diagnostics import findings
from lacfast.report.progress import duration, progress, read_run
from lacfast.report.records import average, named, phase, recent
from lacfast.report.watch import sparkline

RUN = Path("runs/shapes")  # lacfast train shapes --out runs/shapes
records, settings = read_run(RUN)
train, evaluations = phase(records, "train"), phase(records, "evaluate")
found = progress(records, settings)
print(f"iteration {found.iteration} of {found.planned}, {found.images:,} images")
if found.seconds_left == found.seconds_left:
    print(duration(found.seconds_left), "left")

# %% [markdown]
# ## Does it learn?
#
# The rewards of the run's own images rise by luck of the prompts too; evaluations have the same prompts
# and noise every time, and a standard error. Two evaluations differ where they do by more than 2.8 of
# those.

# %%
for name in named(train[-1], "reward"):
    print(f"{name:20}", sparkline([average([line], f"reward/{name}") for line in train]))
for name in named(evaluations[-1], "standard_error"):
    first, last = evaluations[0][name], evaluations[-1][name]
    print(f"{name:20} {first:.3f} -> {last:.3f} ± {evaluations[-1][f'standard_error/{name}']:.3f}")

# %% [markdown]
# ## Does the critic know anything?
#
# Explained variance per denoising step, on each rollout before the critic learns from it: from pure noise
# only the prompt's difficulty can be known, near the image nearly everything. Near 0 everywhere, a
# group-relative estimator costs less.

# %%
last = recent(train)
steps = len(last[-1]["explained_variance"])
variance = [sum(line["explained_variance"][step] for line in last) / len(last) for step in range(steps)]
print("noise", sparkline(variance, low=0.0, high=1.0), "image")

# %% [markdown]
# ## What went wrong, and what to do
#
# Each sign of failure with its numbers and its remedy. A score that nothing trains on and that falls
# while the trained one rises is hacking: go back to an earlier checkpoint.

# %%
for finding in findings(records):
    print(f"{finding.title} (iteration {finding.iteration}): {finding.evidence}.\n  {finding.remedy}.\n")
