"""The training engine: settings, one loop over plain PyTorch or DeepSpeed, checkpoints and logs.

`loop.train(settings)` runs it; only a `task.TrainingTask` knows what kind of model is trained.
"""
