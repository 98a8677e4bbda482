"""Drop-in replacements for other libraries' deformable convolutions: `compat.torchvision` and `compat.mmcv`.

Each has `patch()`, which replaces the library's function everywhere until it is undone, and `convert(model)`, which
replaces the layers of one model until `revert(model)`. Parameters, their names, hooks and optimizers stay as they are.
The libraries themselves are imported when one of these functions is called, never before.
"""
