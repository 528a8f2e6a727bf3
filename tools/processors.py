"""What tells torch, MKL and oneDNN to use no wider vector unit than a given one, as on
an older x86-64 processor. They then add in another order.
"""

import platform

IS_X86_64 = platform.machine() in ("x86_64", "AMD64")
# What each vector unit of such a processor is called by torch, twice by Intel's MKL,
# and by oneDNN. On AMD's processors MKL heeds none of its own names but COMPATIBLE,
# which is SSE.
PROCESSORS = {
    "SSE": ("default", "SSE4_2", "COMPATIBLE", "SSE41"),
    "AVX2": ("avx2", "AVX2", None, "AVX2"),
    "AVX-512": ("avx512", "AVX512", None, "AVX512_CORE"),
}


def processor(name: str, threads: int) -> dict[str, str | None]:
    """Return the environment variables for a vector unit; None takes one away."""
    torch, mkl, everywhere, onednn = PROCESSORS[name]
    return {
        "ATEN_CPU_CAPABILITY": torch,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "MKL_CBWR": everywhere,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
