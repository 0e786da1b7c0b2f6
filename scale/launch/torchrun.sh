#!/usr/bin/env bash
# Starts a run on this node, or this node's part of a run on many; the same command again goes on from the newest
# complete checkpoint.
#
#   scale/launch/torchrun.sh llava-1.5-7b-stage1 [--set section.key=value ...]          one node, all its GPUs
#   NNODES=4 HEAD=node1:29500 scale/launch/torchrun.sh llava-1.5-7b-stage1 ...          the same on each of four nodes
#
# What may be set:
#   NNODES     nodes (1)
#   HEAD       HOST:PORT of one of the nodes, where all of them meet; any free port
#   RUN_ID     a name that the nodes of one run share (tinyspeed); another one for a second run that meets at HEAD
#   GPUS       processes a node ("gpu": as many as it has GPUs); on a machine without any, a number
#   RESTARTS   how often all ranks are started again after one has died (3)
set -euo pipefail

if (($# == 0)); then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi

NNODES=${NNODES:-1}
if ((NNODES > 1)); then
    : "${HEAD:?set HEAD=HOST:PORT, one of the nodes and a free port, the same on every node}"
    meet=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-tinyspeed}")
else
    meet=(--standalone) # on a free port: several runs on one node do not meet
fi

# Threads of a rank for what it computes on the CPU (moving weights, exporting). torchrun would say 1.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Seconds that torchrun waits after SIGTERM before it kills: a step and a checkpoint must fit in. It would wait 30, as a
# torchrun that does not know this variable still does (2.13 does).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}
# Fast and slow steps need blocks of different sizes; segments that can grow leave fewer gaps in a GPU's memory.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# NCCL then names the link or the GPU that failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Not set here, for only you know: where a node has several networks, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the
# one that reaches the other nodes (bond0, eth0 ...); where nodes have no way to the internet, HF_HUB_OFFLINE=1.

exec torchrun "${meet[@]}" --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-3}" -m scale "$@"
