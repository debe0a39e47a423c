"""BitFit (Ben Zaken et al. 2022): the biases of the FM and the head are trained."""

from typing import ClassVar

from fedbench.methods.fedavg_lora import TuningMethod


class MyBitFit(TuningMethod):
    name: ClassVar[str] = "my-bitfit"
    needs: ClassVar[str] = "sum"

    def tuned(self, spec):
        return spec.with_biases()
