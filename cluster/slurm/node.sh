#!/usr/bin/env bash
# One Ray node, for as long as its step lasts, with what Slurm gives the step of its machine.
# Words go to `ray start`.
set -euo pipefail

exec ray start --block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" \
  --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats "$@"
