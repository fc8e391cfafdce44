"""A CPU as a platform of verl, which knows accelerators alone.

verl loads this module in every process through the entry point ``verl.plugins``; a process that has
an accelerator goes on to find it first. Import it before anything of verl that computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

# verl warns of each of its engines whose library is not installed; ours needs none of them.
warnings.filterwarnings("ignore", message=".* engine is not available", category=UserWarning)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The host itself: one device, no streams, collectives through gloo."""

    device_name = "cpu"
    vendor_name = "cpu"
    # What verl asks of torch.cuda and torch.cpu does not have; there is no device memory to report.
    device_module = SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in torch.cpu.__all__},
        max_memory_allocated=lambda device=None: 0,  # noqa: ARG005
        max_memory_reserved=lambda device=None: 0,  # noqa: ARG005
        memory_allocated=lambda device=None: 0,  # noqa: ARG005
        memory_reserved=lambda device=None: 0,  # noqa: ARG005
        mem_get_info=lambda device=None: (0, 0),  # noqa: ARG005
        empty_cache=lambda: None,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )

    def is_available(self) -> bool:
        """Return True."""
        return True

    def current_device(self) -> Any:
        """Return what ``Tensor.to`` takes for the CPU: it has no index."""
        return "cpu"

    def device_count(self) -> int:
        """Return 1."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Do nothing: there is one device."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Do nothing: work is done when its call returns."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch's generator."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch's generator."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Do nothing: the allocator is the system's."""

    def empty_cache(self) -> None:
        """Do nothing: nothing is cached."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:  # noqa: ARG002
        """Return that there is none."""
        return None, None

    def communication_backend_name(self) -> str:
        """Return gloo."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Return CUDA's: Ray's workers set it, to nothing where they have no GPU."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:  # noqa: ARG002
        """Do nothing: there is no device trace."""
        yield

    def profiler_start(self) -> None:
        """Do nothing: there is no device trace."""

    def profiler_stop(self) -> None:
        """Do nothing: there is no device trace."""

    def ray_resource_name(self) -> str:
        """Return CPU."""
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        """Return none."""
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        """Return that many CPUs."""
        return {"num_cpus": num_gpus}

    def is_ipc_supported(self) -> bool:
        """Return False: there are no device handles to share."""
        return False

    def cudart(self) -> None:
        """Return that there is none."""
