"""Hydra launchers of this project: hydra/launcher=slurm and hydra/launcher=ray.

Hydra takes launchers from the namespace `hydra_plugins` alone and imports every module here at each start of a stage:
whatever is slow to import is imported when a launch begins.
"""
