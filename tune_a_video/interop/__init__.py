"""diffusers' own doors: the pipeline, folders, single files, LoRA, ControlNets."""
