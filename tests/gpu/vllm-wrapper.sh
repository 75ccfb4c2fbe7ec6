#!/bin/bash
# ``vllm`` for the packed vLLM on a lent machine: the panel's runner passes no PYTHONPATH on, so it is set here.
export PYTHONPATH=/opt/vsite VLLM_USE_FLASHINFER_SAMPLER=0 PYTHONUNBUFFERED=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
[ -d /opt/stubs ] && export PYTHONPATH=/opt/stubs:$PYTHONPATH
exec python3 -m vllm.entrypoints.cli.main "$@"
