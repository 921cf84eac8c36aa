"""How fast each variant of the int8 products is, in 10⁹ operations a second: `python -m tests.native.int8_rates`.

One thread; a product and its addition are two operations. The weights stay in the cache, but for "from memory".
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.native.test_int8_products import VARIANTS, processor_has
from tests.native.test_simd import CPU, CXX, ROOT, isa_flags


def main() -> None:
    for name, (isa, more) in VARIANTS.items():
        flags = [*isa_flags(isa), *more]
        if not processor_has(flags):
            print(f"{name}: not available here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "int8_rates"
            own = [f'-DZTOK_SOURCE="int8_products_{name}.cpp"', f"-DZTOK_VARIANT=int8_products_{name}"]
            source = ROOT / "tests/native/int8_rates.cpp"
            subprocess.run([CXX, "-std=c++17", "-O3", f"-I{CPU}", *flags, *own, source, "-o", program], check=True)
            print(name, flush=True)
            subprocess.run([program], check=True)


if __name__ == "__main__":
    main()
