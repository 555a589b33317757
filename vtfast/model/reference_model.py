"""The reference model of the KL term: the policy as it was when training began."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor

from vtfast.model.policy import Policy


class ReferenceModel:
    """A frozen copy that shares every frozen weight with the policy; with LoRA the policy itself, adapter disabled."""

    def __init__(self, policy: Policy, offload: bool = False) -> None:
        """`offload`: keep the copy's own weights in CPU memory between uses."""
        self._trained, self._offload = policy, offload
        self._disables_adapter = bool(getattr(policy.module, "_hf_peft_config_loaded", False))
        if self._disables_adapter:
            self.copy = policy
            return
        shared = {id(p): p for p in policy.module.parameters() if not p.requires_grad}
        module = copy.deepcopy(policy.module, memo=shared).eval().requires_grad_(False)
        # A frozen vision encoder is the same in both, and so are its features; of a trained one, only the copy's
        # features are cached.
        self.copy = Policy(module, policy.eos_ids, policy.attention_backend, policy.feature_cache)
        self._own = [p for p in module.parameters() if id(p) not in shared]
        if offload:
            # The copy's weights never change, so they stay on the host, and the fetched ones are simply dropped.
            self._host_weights = [_to_host(parameter) for parameter in self._own]
            self._drop()

    @contextlib.contextmanager
    def policy(self) -> Iterator[Policy]:
        """The reference as a policy to score with, on the device of the trained one."""
        if self._disables_adapter:
            module = self._trained.module
            was_training = module.training
            module.eval()
            module.disable_adapters()
            try:
                yield self._trained
            finally:
                module.enable_adapters()
                module.train(was_training)
            return
        try:
            if self._offload:
                self._fetch()
            yield self.copy
        finally:
            if self._offload:
                self._drop()

    def _fetch(self) -> None:
        for parameter, weight in zip(self._own, self._host_weights, strict=True):
            parameter.data = weight.to(self._trained.device, non_blocking=True)

    def _drop(self) -> None:
        for parameter, weight in zip(self._own, self._host_weights, strict=True):
            parameter.data = weight


def _to_host(weight: Tensor) -> Tensor:
    """Return the weight in host memory: pinned if it is on a CUDA device, which then copies asynchronously."""
    return weight.data.cpu().pin_memory() if weight.is_cuda else weight.data
