"""Builds the native attribution; everything else is in pyproject.toml.

Plain flags on purpose: `-Ofast` or `-ffast-math` would change float behaviour of the whole engine
process, and contracted multiply-adds would break bit equality with the Python twin.
`COST_METER_SANITIZE=1` builds with address and undefined-behaviour sanitizers.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

FLAGS = ["-O2", "-ffp-contract=off", "-Wall"]
if os.environ.get("COST_METER_SANITIZE") == "1":
    FLAGS += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

setup(
    ext_modules=cythonize(
        [
            Extension(
                "vllm_cost_meter.attribution._native",
                ["csrc/attribution.pyx"],
                extra_compile_args=FLAGS,
                extra_link_args=[flag for flag in FLAGS if flag.startswith("-fsanitize")],
            )
        ],
        build_dir="build/cython",
        compiler_directives={"language_level": 3},
    )
)
