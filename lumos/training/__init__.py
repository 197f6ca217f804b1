"""The training engine: settings, one loop over plain PyTorch or DeepSpeed, checkpoints and logs.

`loop.train(settings)` runs it; only `ardf.py` knows what kind of model is trained.
"""
