"""Counts the steps of a program, and ends it when enough were seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from predictor_onnx.dry_run.card import CardRecorder
from predictor_onnx.dry_run.finding import Ending, Finding
from predictor_onnx.trace.summary import summarise

#: Forward passes after which a program that has made no optimizer is known to be one that trains nothing.
_FORWARDS: Final = 16


class StopRun(BaseException):
    """Enough was seen. Not an ``Exception``, so that no program takes it for a failure and goes on."""


class Steps:
    """What a program has done so far.

    Attributes:
        finding: what was found, once the program was stopped; None before.
    """

    def __init__(self, recorder: CardRecorder, most: int, told: Callable[[Finding], None]) -> None:
        """Nothing was seen yet.

        Args:
            recorder: what is on the card.
            most: optimizer steps to see.
            told: is given the finding, once.
        """
        self._recorder = recorder
        self._most = most
        self._told = told
        self._steps = self._forwards = self._depth = 0
        self._trains = False
        self._parameters: dict[int, int] = {}
        self.finding: Finding | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts whatever runs inside."""
        real = Optimizer.__init__

        def made(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self._trains = True
            real(optimizer, *args, **kwargs)

        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._begins),
                register_module_forward_hook(self._ends, always_call=True),
                register_optimizer_step_post_hook(self._stepped),
            ):
                stack.callback(handle.remove)
            Optimizer.__init__ = made
            stack.callback(setattr, Optimizer, "__init__", real)
            yield

    def _begins(self, module: torch.nn.Module, _: Any) -> None:
        self._depth += 1
        if self._depth == 1 and any(self._recorder.holds(weight) for weight in module.parameters()):
            self._recorder.began()

    def _ends(self, module: torch.nn.Module, _: Any, __: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or not self._weigh(module):
            return
        self._forwards += 1
        if self._forwards >= _FORWARDS and not self._trains and not torch.is_grad_enabled():
            self.stop(Ending.INFERENCE_ONLY)

    def _weigh(self, module: torch.nn.Module) -> bool:
        """Whether a module has weights on the card; how many is remembered."""
        found = {self._recorder.living(weight): weight.numel() for weight in module.parameters()}
        found.pop(None, None)
        self._parameters.update({number: count for number, count in found.items() if number is not None})
        return bool(found)

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if not any(self._recorder.holds(weight) for weight in weights):
            return
        self._steps += 1
        if self._steps >= self._most:
            self.stop(Ending.STEPS_SEEN)

    def stop(self, ending: Ending) -> None:
        """Tells what was found and ends the program.

        Raises:
            StopRun: always; to a program that takes it for something else, no second time.
        """
        if self.finding is not None:
            os._exit(0)
        self._tell(ending)
        raise StopRun

    def ended(self, failure: str = "") -> None:
        """The program ended by itself, or failed; tells what was found until then."""
        if self.finding is not None:
            return
        if failure:
            ending = Ending.FAILED
        elif self._steps:
            ending = Ending.PROGRAM_ENDED
        elif self._forwards:
            ending = Ending.INFERENCE_ONLY
        else:
            ending = Ending.NO_CARD_USED
        self._tell(ending, failure)

    def _tell(self, ending: Ending, reason: str = "") -> None:
        steps = self._steps or (0 if self._trains or ending is Ending.FAILED else self._forwards)
        step = None
        if steps:
            living = set(self._recorder.numbers())
            parameters = sum(count for number, count in self._parameters.items() if number in living)
            step = summarise(self._recorder.events, self._recorder.work, parameters, steps)
        self.finding = Finding(ending, reason, steps, step)
        self._told(self.finding)
