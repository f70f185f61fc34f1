"""One side of ``python -m benchmarks compare``: times what it is asked to, in a process of its own.

The file is copied away from the package and runs with another commit's ``scalelong_fast`` on the path, so it imports
nothing of ours but the public interface, and that only to build a case. Requests and answers are lines of JSON, on
standard input and on what was standard output; everything printed goes to standard error.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Worker:
    """Builds cases and takes timed visits.

    Args:
        device: where.
    """

    def __init__(self, device: str):
        self.device = torch.device(device)
        self._steps: dict[str, Callable[[], Any]] = {}

    def hello(self, root: str) -> dict[str, Any]:
        """Make sure that the package would be imported from ``root``."""
        found = importlib.util.find_spec("scalelong_fast")
        if found is None or not Path(found.origin or "").resolve().is_relative_to(Path(root).resolve()):
            raise RuntimeError(f"there is no scalelong_fast in {root}")
        return {}

    def build(self, name: str, case: dict[str, Any]) -> dict[str, Any]:
        """Make a case ready; answers with ``value``, a number that both sides should agree on, and a call's seconds."""
        torch.manual_seed(0)
        make = {"step": self._step, "forward": self._forward, "op": self._op}[case["kind"]]
        step = make(case)
        value = float(step())
        self._steps[name] = step
        step()
        return {"value": value, "seconds": self.visit(name, 1)["seconds"]}

    def visit(self, name: str, steps: int) -> dict[str, Any]:
        """Mean seconds of ``steps`` calls, after one that is not timed."""
        step = self._steps[name]
        step()
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        self._wait()
        return {"seconds": (time.perf_counter() - start) / steps}

    def drop(self, name: str) -> dict[str, Any]:
        """Forget a case."""
        self._steps.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _model(self, case: dict[str, Any]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """A model on the device and the inputs of a call: images, times, and labels where it takes them."""
        from scalelong_fast import create_model

        model = create_model(case["preset"], **case["options"])
        with torch.no_grad():
            for parameter in model.parameters():  # a last layer of zeros would make every output 0
                if not parameter.any():
                    parameter.normal_(std=0.02)
        inputs = torch.randn(case["shape"]), torch.rand(case["shape"][0]) * 999
        if case.get("classes"):
            inputs += (torch.randint(case["classes"], case["shape"][:1]),)
        return model.to(self.device), tuple(tensor.to(self.device) for tensor in inputs)

    def _step(self, case: dict[str, Any]) -> Callable[[], torch.Tensor]:
        """Forward, mean square error, backward, AdamW."""
        model, inputs = self._model(case)
        target = torch.randn_like(inputs[0])
        update = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> torch.Tensor:
            with self._autocast():
                loss = torch.nn.functional.mse_loss(model(*inputs), target)
            loss.backward()
            update.step()
            update.zero_grad()
            return loss.detach()

        return step

    def _forward(self, case: dict[str, Any]) -> Callable[[], torch.Tensor]:
        """The network alone, as samplers call it."""
        model, inputs = self._model(case)
        model.eval()

        def step() -> torch.Tensor:
            with torch.no_grad(), self._autocast():
                return model(*inputs).float().square().mean()

        return step

    def _op(self, case: dict[str, Any]) -> Callable[[], torch.Tensor]:
        """One call of an op, forward and backward."""
        from scalelong_fast import ops
        from scalelong_fast.ops.examples import example_arguments

        dtype = getattr(torch, case["dtype"])
        example = example_arguments(case["op"], tuple(case["shape"]), dtype, self.device, **case["options"])
        tensors = example.tensors()

        def step() -> torch.Tensor:
            outputs = getattr(ops, case["op"])(*example.args, **example.kwargs)
            outputs = [one for one in (outputs if isinstance(outputs, tuple) else (outputs,)) if one.requires_grad]
            ones = [torch.ones_like(one) for one in outputs]
            torch.autograd.grad(outputs, tensors, ones, allow_unused=True)
            return outputs[0].detach().float().square().mean()

        return step


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # an older commit may lack anything; the other cases are still wanted
            lines = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
