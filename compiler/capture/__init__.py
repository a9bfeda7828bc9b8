"""Capture a model as programs: by torch.export, with fixed sizes, by Dynamo, or by its submodules."""
