#!/bin/bash
# Offline work in 16 shares, one job of an array each: sbatch deploy/slurm-array.sh. A killed share goes on where it
# stopped when it is queued again. Check the script without a queue: sbatch --test-only deploy/slurm-array.sh
#SBATCH --job-name=diptych --array=0-15 --gpus=1 --cpus-per-task=8 --mem=64G --time=12:00:00 --requeue
SHARE=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
srun diptych evaluate run runs/mine mini --out runs/mine/scores --shard $SHARE
# srun diptych data precompute mine.yaml --catalog data.yaml --out encoded --shard $SHARE
# srun diptych generate runs/mine --prompts prompts.txt --out pictures --shard $SHARE
# when all shares are done: diptych evaluate merge runs/mine/scores
