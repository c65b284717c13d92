"""A repair of vLLM 0.32 on the CPU: a request with a seed and a prompt of several chunks ends the engine.

After a chunk that is not the prompt's last, the runner takes back the random numbers that sampling drew in vain, by moving
the generator's offset; the CPU's generators have none. Their state before the step is put back instead.
"""

import functools

from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def install() -> None:
    """Wrap two methods of the model runner where the platform is the CPU, once per process."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or getattr(GPUModelRunner._bookkeeping_sync, "_quantspec", False):
        return
    prepare_inputs = GPUModelRunner._prepare_inputs
    bookkeeping_sync = GPUModelRunner._bookkeeping_sync

    @functools.wraps(prepare_inputs)
    def prepare_and_remember(self, *args, **kwargs):
        result = prepare_inputs(self, *args, **kwargs)
        in_vain = self.discard_request_mask.np
        generators = self.input_batch.generators
        self._quantspec_rewind = {i: g.get_state() for i, g in generators.items() if in_vain[i]}
        return result

    @functools.wraps(bookkeeping_sync)
    def bookkeep_and_rewind(self, *args, **kwargs):
        generators = self.input_batch.generators
        held = {i: generators.pop(i) for i in getattr(self, "_quantspec_rewind", {}) if i in generators}
        try:
            return bookkeeping_sync(self, *args, **kwargs)
        finally:
            generators.update(held)
            for i, generator in held.items():
                generator.set_state(self._quantspec_rewind[i])
            self._quantspec_rewind = {}

    bookkeep_and_rewind._quantspec = True
    GPUModelRunner._prepare_inputs = prepare_and_remember
    GPUModelRunner._bookkeeping_sync = bookkeep_and_rewind
