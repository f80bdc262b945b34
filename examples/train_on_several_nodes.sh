#!/usr/bin/env bash
# LayerSkip training on several nodes of a Slurm cluster: one torchrun on each node, which meet at the first node.
#
#   sbatch --nodes 4 --gpus-per-node 8 examples/train_on_several_nodes.sh CONFIG [key=value ...]
#
# CONFIG is a name or file for `tune run layerskip_finetune`. Model, data and output_dir have to be in folders that all
# nodes see. A job that is requeued goes on from its newest complete checkpoint; set save_every_n_steps.
#SBATCH --job-name=layerskip
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

config=${1:?usage: train_on_several_nodes.sh CONFIG [key=value ...]}
shift

read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on a node do not meet

# A job that is started again resumes, if it got as far as a checkpoint.
output_dir=$(layerskip cat "$config" "$@" | sed -n 's/^output_dir: //p')
resume=false
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && compgen -G "$output_dir/[es][pt]*_[0-9]*" > /dev/null; then resume=true; fi

srun --kill-on-bad-exit=1 tune run \
  --nnodes "$SLURM_NNODES" \
  --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$first_node:$port" \
  layerskip_finetune --config "$config" "resume_from_checkpoint=$resume" "$@"
