"""What computes here, in words: certificates of engines are bound to it."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

# Flags of x86 and Arm processors that decide how a runtime computes, hence how it rounds.
_TELLING = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


@lru_cache(maxsize=1)
def processor() -> str:
    """Return architecture, model and the telling abilities of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts = {key.strip().lower(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = set(facts.get("flags", facts.get("features", "")).split())
    name = facts.get("model name", facts.get("cpu part", platform.processor()))
    return " ".join([platform.machine(), name, *(flag for flag in _TELLING if flag in flags)])
