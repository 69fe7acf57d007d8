"""The arguments of each command, in a module of its name. None imports PyTorch: help is quick."""
