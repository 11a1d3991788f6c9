# Sourced by the batch scripts, from the repository's root: `on_every_node COMMAND…` starts a training script once per
# node of the job, with the variables that scripts/launch.sh reads. A SIGTERM (sent by Slurm some minutes before the
# time limit) lets a training save its checkpoint; submitted again, the same script resumes.
mkdir -p log
NNODES=$SLURM_JOB_NUM_NODES
NPROC_PER_NODE=${SLURM_GPUS_ON_NODE:-1}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# Since Slurm 22.05 srun does not read the job's --cpus-per-task, so all processes of a node would share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
export NNODES NPROC_PER_NODE MASTER_ADDR MASTER_PORT

on_every_node() {
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 sh -c 'NODE_RANK=$SLURM_NODEID exec sh "$@"' node "$@"
}
