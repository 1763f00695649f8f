"""The training shell: one Ray Train + DeepSpeed loop for both stages."""
