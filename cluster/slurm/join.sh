#!/usr/bin/env bash
# More nodes for a study that runs on Slurm.
#
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 32 cluster/slurm/join.sh JOB
#
# JOB is the number of the job of cluster/slurm/sweep.sh. The nodes leave when this job ends or is
# cancelled, as spot or preemptible ones do: their trials go on elsewhere from their checkpoints.
#SBATCH --job-name=batchcam-join
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=batchcam-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the checkout}"
PATH="$PWD/.venv/bin:$PATH"
memory="$HOME/.batchcam/slurm-${1:?the number of the job to join}"
if [ ! -r "$memory" ]; then
  echo "job $1 runs no study of yours: there is no $memory" >&2
  exit 2
fi
# shellcheck source=/dev/null
. "$memory"
export RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_MODE=token

exec srun --ntasks-per-node=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" \
  cluster/slurm/node.sh "--address=$RAY_ADDRESS"
