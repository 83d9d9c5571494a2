"""Python runs this first in every process on the null GPU: once PyTorch is imported, it does without cuDNN (or asks for
it in vain, where NULLGPU_CUDNN is set), and nobody looks at numbers that nobody computed: neither the guard of the
training step, nor the tuning, nor Inductor where it times whether to pad a product.

Where NULLGPU_COMPILED names a file, every kernel that Triton compiles or finds in its cache is appended to it, one JSON
line each: {"kernel", "hash", "hit", "seconds"}.
"""

import importlib.util
import json
import os
import sys


class _After:
    """Finds a module as it would be found, and calls a function with it once it is executed."""

    def __init__(self, name, then):
        self.name, self.then, self.busy = name, then, False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):  # some only ask where a module is
                sys.meta_path.remove(self)
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module
        return spec


def _cudnn(torch):
    if os.environ.get("NULLGPU_CUDNN"):
        import nullgpu_cudnn  # beside this file

        nullgpu_cudnn.pretend()
    else:
        torch.backends.cudnn.enabled = False
        torch.backends.cuda.enable_cudnn_sdp(False)


def _unpadded(pad_mm):
    pad_mm.is_padded_faster = lambda key, *times: False  # Inductor would time it


def _listening(triton):
    path = os.environ["NULLGPU_COMPILED"]

    def listener(*, src, metadata, metadata_group, times, cache_hit):
        spent = times.ir_initialization + sum(took for _, took in times.lowering_stages) + times.store_results
        line = {"kernel": src.name, "hash": metadata["hash"], "hit": cache_hit, "seconds": round(spent / 1e6, 3)}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    triton.knobs.compilation.listener = listener


def _unguarded(step):
    step.FiniteGuard.read = lambda self: None


def _unmatched(measure):
    measure.agree = lambda found, known: True


sys.meta_path.insert(0, _After("torch", _cudnn))
sys.meta_path.insert(0, _After("torch._inductor.fx_passes.pad_mm", _unpadded))
sys.meta_path.insert(0, _After("simmp_fast.training.step", _unguarded))
sys.meta_path.insert(0, _After("simmp_fast.kernels.measure", _unmatched))
if os.environ.get("NULLGPU_COMPILED"):
    sys.meta_path.insert(0, _After("triton", _listening))
