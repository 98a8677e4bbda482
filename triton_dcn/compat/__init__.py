"""Drop-in replacements for deformable convolutions of torchvision, mmcv and the DCNv2 extension.

`compat.torchvision` and `compat.mmcv` have `patch()`, which replaces the library's functions everywhere until it is
undone, and `convert(model)`, which replaces the layers of one model until `revert(model)`. Parameters, their names,
hooks and optimizers stay as they are. The libraries themselves are imported when one of these functions is called,
never before.

`compat.dcnv2` has the layers of the extension, to be imported in its place.
"""
