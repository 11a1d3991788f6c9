"""Training: the loop, tasks, engines, checkpoints, optimizers and logs.

trainer      the training loop (`train`, `train_stage`)      task         what a training defines
hydra_task   base of the trainings with Hydra settings       config       settings
engine       plain torch                                     zero_engine  DeepSpeed
checkpoint   layout, writing, resuming                       schedules    learning rates
optimizers   AdamW, Muon, moving average                     codebook     stages with a codebook
meters       numbers of steps → of log lines                 run_log      console, JSON, TensorBoard
distributed  processes, SIGTERM, errors                      torchrun     launcher
cli          all Hydra trainings      llm, pixel_decoder  tasks of several families
"""
