#!/usr/bin/env bash
# One trial per array task, from the list that `sweep.py --write-jobs` wrote; adapt the lines below to your cluster.
#   python experiments/sweep.py --space sweeps/aloha.yaml --write-jobs random --trials 16
#   sbatch --array=1-16 sweeps/slurm_array.sh runs/sweeps/aloha/sweep.jsonl       (from the repository's root)
#   python experiments/sweep.py --space sweeps/aloha.yaml --report                (whenever you like)
# Submit it again to go on with what was cut off; finished trials end at once.
#SBATCH --job-name=fpo-sweep
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=02:00:00
##SBATCH --gres=gpu:1
set -euo pipefail

jobs=${1:?give the sweep.jsonl that sweep.py --write-jobs wrote}
[ ! -f .venv/bin/activate ] || . .venv/bin/activate

line=$(sed -n "${SLURM_ARRAY_TASK_ID:?run me by sbatch --array, or set the line number}p" "$jobs")
[ -n "$line" ] || { echo "Error: $jobs has no line $SLURM_ARRAY_TASK_ID." >&2; exit 2; }
entry() { python -c 'import json, sys; print(json.loads(sys.argv[1])[sys.argv[2]])' "$line" "$1"; }

run_dir=$(entry run_dir)
if [ -f "$run_dir/evaluation.json" ] || [ -f "$run_dir/stopped.json" ]; then
  echo "$run_dir has ended."
  exit 0
fi
command=$(entry command)
[ ! -f "$run_dir/config.json" ] || command=$(entry resume)
eval "exec $command" > "$run_dir/trial.log" 2>&1
