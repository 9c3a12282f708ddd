"""The field's own doors: timm's names, OpenMMLab's registries, other reducers on trained ViTs."""
