"""Training: the loop, tasks, engines, checkpoints, optimizers and logs.

trainer      the training loop (`train`, `train_stage`)      task        what a training defines
run          base of the trainings with Hydra settings       engine      plain torch and DeepSpeed
checkpoint   layout, writing, resuming                       config      settings
optimizers   AdamW, Muon, moving average                     schedules   learning rates
metrics      log lines of a run                              plots       curves from logs
distributed  processes, SIGTERM, errors                      torchrun    launcher
codebook     stages of models with a codebook                frozen_models  teachers
cli          all Hydra trainings      llm, pixel_decoder  tasks of several families
"""
