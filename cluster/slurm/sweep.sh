#!/usr/bin/env bash
# Run a study on Slurm: start a Ray cluster for the duration of the job, and run the sweep on it.
#
#   sbatch --nodes 4 --gpus-per-node 4 --cpus-per-task 32 --time 08:00:00 \
#     cluster/slurm/sweep.sh --study mine --num-trials 200 --dataset fashion_mnist
#
# Submit it from the checkout, on a file system shared by all nodes. Arguments are passed to
# studies/bcpl_sweep.py. The study is resumed when Slurm requeues the job, or when it is submitted
# again with --resume. cluster/slurm/join.sh adds nodes.
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

# Derive ports from the job number, so that two jobs on one node do not use the same ports.
offset=$((SLURM_JOB_ID % 10000))
RAY_ADDRESS="$(python -c 'import ray.util; print(ray.util.get_node_ip_address())'):$((20000 + offset))"
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_ADDRESS RAY_AUTH_MODE RAY_AUTH_TOKEN

# Address and token for join.sh, readable by this user only.
connection_file="$HOME/.batchcam/slurm-$SLURM_JOB_ID"
(umask 077 && mkdir -p "${connection_file%/*}" &&
  declare -p RAY_ADDRESS RAY_AUTH_TOKEN > "$connection_file")

# shellcheck disable=SC2317,SC2329 # The trap calls it.
clean_up() {
  rm -f "$connection_file"
  jobs -p | xargs --no-run-if-empty kill 2> /dev/null || true
  wait
}
trap clean_up EXIT

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

arguments=("$@")
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  arguments+=(--resume)
fi
# Restore SIGINT's default handling: non-interactive shells make background processes ignore it.
env --default-signal=INT python studies/bcpl_sweep.py --address "$RAY_ADDRESS" "${arguments[@]}" &
driver=$!
# Slurm sends SIGTERM two minutes before the time limit: the driver stops and prints how to resume.
trap 'kill -INT "$driver"' TERM
status=0
wait "$driver" || status=$?
if kill -0 "$driver" 2> /dev/null; then # The signal interrupted `wait`; the driver still runs.
  status=0
  wait "$driver" || status=$?
fi
exit "$status"
