"""Starting a command as several processes: on this machine, SLURM, Kubernetes and Cloud TPU."""
