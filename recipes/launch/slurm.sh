#!/bin/bash
# Slurm: one machine for the teacher, one for rollouts, the rest train. Not tried on a real cluster; change what is yours.
#
#   STUDENT=folder sbatch --nodes 4 recipes/launch/slurm.sh recipes/several-machines.yaml
#
# A requeued job continues: on SIGTERM the run ends its step and saves, and --resume takes the newest intact checkpoint.
#SBATCH --job-name=kibitz
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

recipe=${1:?write the recipe behind the script}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
(( ${#hosts[@]} >= 3 )) || { echo "one machine each for teacher, rollouts and training: ask for --nodes 3 or more" >&2; exit 1; }
teacher=${hosts[0]} writer=${hosts[1]} trainers=("${hosts[@]:2}")

on() { srun --overlap --nodes 1 --ntasks 1 --nodelist "$1" "${@:2}"; }
up() { until curl -sf "http://$1/health" >/dev/null; do sleep 5; done; }

# `kibitz serve RECIPE` prints the flags that each of the two needs; these are the ones that a cluster adds.
on "$teacher" vllm serve "${TEACHER:-Qwen/Qwen3-32B}" --host "$teacher" --port 8001 --tensor-parallel-size 8 --max-logprobs 64 &
on "$writer" env VLLM_SERVER_DEV_MODE=1 vllm serve "${STUDENT:?the folder or name of the student}" \
  --host "$writer" --port 8000 --data-parallel-size 8 --served-model-name student &
up "$teacher:8001" && up "$writer:8000"

srun --overlap --nodes "${#trainers[@]}" --ntasks-per-node 1 --nodelist "$(IFS=,; echo "${trainers[*]}")" \
  torchrun --nnodes "${#trainers[@]}" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "${trainers[0]}:29500" \
  -m kibitz train "$recipe" "teacher.url=http://$teacher:8001" "rollout.urls=[http://$writer:8000]" --resume
