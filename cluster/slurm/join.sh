#!/usr/bin/env bash
# Add nodes to a study that runs on Slurm.
#
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 32 cluster/slurm/join.sh JOB
#
# JOB is the job number of cluster/slurm/sweep.sh. The nodes leave the cluster when this job ends or
# is preempted; other nodes then resume their trials from the checkpoints.
#SBATCH --job-name=batchcam-join
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=batchcam-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the checkout}"
PATH="$PWD/.venv/bin:$PATH"
connection_file="$HOME/.batchcam/slurm-${1:?the job number of the study is missing}"
if [ ! -r "$connection_file" ]; then
  echo "job $1 is not one of your running studies: $connection_file does not exist" >&2
  exit 2
fi
# shellcheck source=/dev/null
. "$connection_file"
export RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_MODE=token

exec srun --ntasks-per-node=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" \
  cluster/slurm/node.sh "--address=$RAY_ADDRESS"
