"""A recipe's stages in order: what each starts from, its dataset, its program and its files in the workdir."""
