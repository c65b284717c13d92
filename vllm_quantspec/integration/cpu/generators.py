"""A repair of vLLM 0.32 on the CPU: a request with a seed and a prompt of several chunks ends the engine.

After a chunk that is not the prompt's last, the runner takes back the random numbers that sampling drew, by moving the
generator's offset; the CPU's generators have none. Their state before the step is put back instead.
"""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_quantspec.integration.startup.replace import replace


def remember(runner: GPUModelRunner) -> None:
    """Keep the states of generators whose requests sample nothing that counts in this step; called once it is prepared."""
    unused = runner.discard_request_mask.np
    runner._quantspec_rewind = {i: g.get_state() for i, g in runner.input_batch.generators.items() if unused[i]}


def _rewinding(bookkeeping_sync):
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

    return bookkeep_and_rewind


def install() -> None:
    """Replace one method of the model runner; ``cpu.runner`` calls ``remember``."""
    replace(GPUModelRunner, "_bookkeeping_sync", _rewinding)
