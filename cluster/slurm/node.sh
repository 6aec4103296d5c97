#!/usr/bin/env bash
# Run a Ray node for the duration of its Slurm step, with the CPUs and GPUs of the step.
# Arguments are passed to `ray start`.
set -euo pipefail

exec ray start --block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" \
  --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats "$@"
