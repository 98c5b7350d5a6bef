#!/bin/bash
# Train on two machines of eight GPUs: sbatch examples/slurm.sh flux-pickscore --out /shared/flux
# A job that was requeued or whose process died goes on from its last checkpoint.
#SBATCH --job-name lacfast
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --requeue
#SBATCH --signal SIGTERM@120

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29500" \
    --max-restarts 3 \
    -m lacfast train "$@" --resume auto --save-every 1
