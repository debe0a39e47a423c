"""FFA-LoRA (Sun et al. 2024): A is drawn once and fixed, B and head are trained."""

from typing import ClassVar

from fedbench.methods.fedavg_lora import AdapterServer, LoraMethod


class MyFFA(LoraMethod):
    name: ClassVar[str] = "my-ffa"
    needs: ClassVar[str] = "sum"

    def server(self, fm, public, ctx):
        return MyServer(self, fm, ctx)


class MyServer(AdapterServer):
    def __init__(self, method, fm, ctx):
        super().__init__(method, fm, ctx)
        self.fixed = {n: v for n, v in self.values.items() if ".lora_A." in n}
        self.values = {n: v for n, v in self.values.items() if ".lora_A." not in n}
