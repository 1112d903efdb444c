#!/bin/bash
# On the virtual machines of one Cloud TPU slice:
#
#     TPU=my-slice ZONE=us-east5-b HOSTS=4 experiments/launch/tpu.sh reproduce icl --preset paper --devices data=4,fsdp=4
#
# HOSTS is the number of machines: a v6e-16 has 4, with 4 chips each. Every machine has this
# repository in ~/kreg, with `pip install -e ".[experiments]" "jax[tpu]"`, and sees the same folder
# of runs (a mounted bucket or a Filestore): name it by --out.
set -eu

# JAX finds the other machines by the slice's metadata; that there are HOSTS of them is checked.
# After the machines were taken away and given back, the same command goes on where it was.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
  --command "cd ~/kreg && KREG_PROCESSES=$HOSTS exec python3 -m experiments $(printf '%q ' "$@")"
