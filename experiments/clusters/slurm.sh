#!/bin/bash
# A Slurm job: Ray on two nodes with eight GPUs each, the driver on the first of them.
#
#     sbatch experiments/clusters/slurm.sh meta-llama/Llama-2-7b-chat-hf [more words of the command]
#
# Submit it from the project's folder, with the environment active that has caa-lens[cluster] on every node. The run
# folder must lie where the first node keeps it (a shared file system, or its own disk); other nodes never look there. The
# model must be at the same path, or in the Hugging Face cache, of every node. Requeued or submitted again, it goes on.
#SBATCH --job-name=caa-lens
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
set -eu
MODEL=${1:-meta-llama/Llama-2-7b-chat-hf}
[ $# -eq 0 ] || shift
cd "$SLURM_SUBMIT_DIR"
export RAY_USAGE_STATS_ENABLED=0

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(echo "$nodes" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --overlap -w "$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs may share a node

# `--block` keeps Ray in the step, so that Slurm ends it with the job.
srun --nodes=1 --ntasks=1 --overlap -w "$head" ray start --head --block --include-dashboard=false \
    --node-ip-address="$address" --port="$port" \
    --num-gpus="${SLURM_GPUS_ON_NODE:-8}" --num-cpus="$SLURM_CPUS_PER_TASK" &
sleep 20
n_others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$n_others" -gt 0 ]; then
    srun --nodes="$n_others" --ntasks="$n_others" --overlap --exclude="$head" ray start --block \
        --address="$address:$port" --num-gpus="${SLURM_GPUS_ON_NODE:-8}" --num-cpus="$SLURM_CPUS_PER_TASK" &
    sleep 20
fi
# On the first node, as the driver has to be on one of the cluster's. Nodes that come later, or again, get workers, too.
srun --nodes=1 --ntasks=1 --overlap -w "$head" \
    python -m experiments all --model "$MODEL" --engine ray --address "$address:$port" --num-gpus-per-worker 1 "$@"
