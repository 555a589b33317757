"""The reference model of the KL term: what the policy was when training began."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor

from vtfast.model.policy import Policy


class Reference:
    """A frozen copy that shares every frozen weight with the policy; with LoRA the policy itself, adapter off."""

    def __init__(self, policy: Policy, offload: bool = False) -> None:
        """`offload`: keep the copy in CPU memory between uses."""
        self.policy, self.offload = policy, offload
        self.is_adapter_off = bool(getattr(policy.module, "_hf_peft_config_loaded", False))
        if self.is_adapter_off:
            self.copy = policy
            return
        shared = {id(p): p for p in policy.module.parameters() if not p.requires_grad}
        module = copy.deepcopy(policy.module, memo=shared).eval().requires_grad_(False)
        # A frozen tower is the same for both, and so is what it sees; of a trained one only the copy's is remembered.
        self.copy = Policy(module, policy.eos_ids, policy.backend, policy.images)
        self._own = [p for p in module.parameters() if id(p) not in shared]
        if offload:
            # Its weights never change: they stay on the host, and what was fetched is only let go of.
            self._kept = [_on_host(parameter) for parameter in self._own]
            self._let_go()

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[Policy]:
        """The reference as a policy to score with, on the policy's device."""
        if self.is_adapter_off:
            training = self.policy.module.training
            self.policy.module.eval()
            self.policy.module.disable_adapters()
            try:
                yield self.policy
            finally:
                self.policy.module.enable_adapters()
                self.policy.module.train(training)
            return
        if self.offload:
            self._fetch()
        try:
            yield self.copy
        finally:
            if self.offload:
                self._let_go()

    def _fetch(self) -> None:
        for parameter, kept in zip(self._own, self._kept, strict=True):
            parameter.data = kept.to(self.policy.device, non_blocking=True)

    def _let_go(self) -> None:
        for parameter, kept in zip(self._own, self._kept, strict=True):
            parameter.data = kept


def _on_host(weight: Tensor) -> Tensor:
    """In memory that a CUDA device reads by itself."""
    return weight.data.cpu().pin_memory() if weight.is_cuda else weight.data
