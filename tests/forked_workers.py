"""What the process has imported whose copies are vLLM's workers: each would import it for itself, for 10 seconds."""

import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

# Workers that share memory wait for each other in a loop, most of the time for one that has no core. Gloo's wait asleep.
CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
