#!/usr/bin/env bash
# A study on Slurm: a Ray cluster that lives as long as the job, and the sweep on it.
#
#   sbatch --nodes 4 --gpus-per-node 4 --cpus-per-task 32 --time 08:00:00 \
#     cluster/slurm/sweep.sh --study mine --num-trials 200 --dataset fashion_mnist
#
# Submit it from the checkout, on a file system that all nodes share. Words after the script go to
# studies/bcpl_sweep.py. A job that Slurm starts again, or that is submitted again with --resume,
# goes on where the study was. More nodes join by cluster/slurm/join.sh.
#SBATCH --job-name=batchcam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=batchcam-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the checkout}"
PATH="$PWD/.venv/bin:$PATH"

# One number for each job: two that share a node do not meet.
offset=$((SLURM_JOB_ID % 10000))
RAY_ADDRESS="$(python -c 'import ray.util; print(ray.util.get_node_ip_address())'):$((20000 + offset))"
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_ADDRESS RAY_AUTH_MODE RAY_AUTH_TOKEN

# What join.sh needs to know; for this user's eyes only.
memory="$HOME/.batchcam/slurm-$SLURM_JOB_ID"
(umask 077 && mkdir -p "${memory%/*}" && declare -p RAY_ADDRESS RAY_AUTH_TOKEN > "$memory")

# shellcheck disable=SC2317,SC2329 # The trap calls it.
leave() {
  rm -f "$memory"
  jobs -p | xargs --no-run-if-empty kill 2> /dev/null || true
  wait
}
trap leave EXIT

step=(srun --overlap --ntasks-per-node=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
"${step[@]}" --nodes=1 --ntasks=1 "--nodelist=$head" cluster/slurm/node.sh --head \
  "--node-ip-address=${RAY_ADDRESS%:*}" "--port=${RAY_ADDRESS##*:}" "--temp-dir=/tmp/ray-$UID" \
  --dashboard-host=127.0.0.1 "--dashboard-port=$((30000 + offset))" &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  "${step[@]}" "--nodes=$others" "--ntasks=$others" "--exclude=$head" cluster/slurm/node.sh \
    "--address=$RAY_ADDRESS" &
fi
python -m cluster.wait --nodes "$SLURM_JOB_NUM_NODES"

words=("$@")
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  words+=(--resume)
fi
# What runs in the background ignores SIGINT, if it is not told otherwise.
env --default-signal=INT python studies/bcpl_sweep.py --address "$RAY_ADDRESS" "${words[@]}" &
driver=$!
# Two minutes before the job's end: the driver stops, and says how to go on.
trap 'kill -INT "$driver"' TERM
status=0
wait "$driver" || status=$?
if kill -0 "$driver" 2> /dev/null; then # The signal ended the waiting, not the driver.
  status=0
  wait "$driver" || status=$?
fi
exit "$status"
