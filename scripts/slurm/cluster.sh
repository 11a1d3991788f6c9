# Sourced by the batch scripts, from the repository's root: `on_every_node COMMAND…` starts a training script once per
# node of the job, with the variables that scripts/launch.sh reads. Slurm sends SIGTERM some minutes before the time limit
# (--signal): the training saves a checkpoint and ends with 143, and the job is queued again and resumes.
NNODES=$SLURM_JOB_NUM_NODES
NPROC_PER_NODE=${SLURM_GPUS_ON_NODE:-1}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
SEED_RDZV_MINUTES=${SEED_RDZV_MINUTES:-15}  # nodes of a job may start minutes apart
# Since Slurm 22.05 srun does not read the job's --cpus-per-task, so all processes of a node would share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
export NNODES NPROC_PER_NODE MASTER_ADDR MASTER_PORT SEED_RDZV_MINUTES

on_every_node() {
    # A node that fails ends the others itself; Slurm must not kill one that still saves.
    code=0
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 sh -c 'NODE_RANK=$SLURM_NODEID exec sh "$@"' node "$@" || code=$?
    # A job that was cancelled does not run any more.
    if [ "$code" = 143 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
        echo "$0: stopped by SIGTERM after a checkpoint; job $SLURM_JOB_ID is queued again." >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
