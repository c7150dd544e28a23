#!/bin/bash
# Train on slurm and be started again until done:
#
#     sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 tools/slurm_train.sh CONFIG [ARGUMENTS]
#
# One task a GPU. Arguments are those of tools/train.py; PYTHON names the interpreter. Submit it from
# the checkout, or from anywhere if internlm_mm is installed. Options of sbatch override these:
#
#SBATCH --job-name=internlm_mm
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM to every task this many seconds before the time limit: at least one step and one save.
#SBATCH --signal=TERM@300

set -uo pipefail

if [[ -z "${SLURM_JOB_ID:-}" || $# -eq 0 ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

# srun does not inherit this from sbatch since slurm 22.05.
[[ -n "${SLURM_CPUS_PER_TASK:-}" ]] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, nodes $SLURM_JOB_NODELIST, $(date)"
# A task that fails ends the others. --resume begins where the last start saved, if there was one.
srun --kill-on-bad-exit=1 --label \
    "${PYTHON:-python}" -m internlm_mm train "$@" --launcher slurm --resume
code=$?

if [[ $code -eq 75 ]]; then # stopped by SIGTERM after saving
    echo "job $SLURM_JOB_ID saved its state and goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
