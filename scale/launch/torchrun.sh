#!/usr/bin/env bash
# Starts a run on this node, or this node's part of a run on many nodes. The same command goes on from the newest
# complete checkpoint.
#
#   scale/launch/torchrun.sh llava-1.5-7b-stage1 [--set section.key=value ...]          one node, all its GPUs
#   NNODES=4 HEAD=node1:29500 scale/launch/torchrun.sh llava-1.5-7b-stage1 ...          the same on each of four nodes
#
# Variables, and their defaults:
#   NNODES     the number of nodes (1)
#   HEAD       HOST:PORT of one of the nodes, where all of them meet; any free port
#   RUN_ID     a name that the nodes of one run share (tinyspeed); a second run that meets at HEAD needs another one
#   GPUS       processes per node ("gpu": as many as it has GPUs); a number on a machine without GPUs
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
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a node that comes back waits for an address that nobody tells it
else
    meet=(--standalone) # on a free port, so that several runs on one node do not meet
fi

# CPU threads of each rank, for moving weights and exporting. torchrun's default is 1.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# How many seconds torchrun waits after SIGTERM before it kills: long enough for a step and a checkpoint. Its default is
# 30, which a torchrun that does not know this variable still uses (torch 2.13 knows it).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}
# Fast and slow steps need memory blocks of different sizes; segments that can grow leave fewer gaps between them.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# With this NCCL names the link or the GPU that failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Two things only you know. Where a node has several networks, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the one
# that reaches the other nodes (bond0, eth0 ...). Where nodes have no internet, set HF_HUB_OFFLINE=1.

exec torchrun "${meet[@]}" --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-3}" -m scale "$@"
