"""Builds the native attribution; everything else is in pyproject.toml.

What an earlier build left in the checkout is neither shipped nor imported: `build/lib*` is made
anew, and a native module among the sources that is not built here is removed.

Plain flags on purpose: `-Ofast` or `-ffast-math` would change float behaviour of the whole engine
process, and contracted multiply-adds would break bit equality with the Python twin.
`COST_METER_SANITIZE=1` builds with address and undefined-behaviour sanitizers.
"""

import os
import shutil
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

PACKAGE = "vllm_cost_meter"

FLAGS = ["-O2", "-ffp-contract=off", "-Wall"]
if os.environ.get("COST_METER_SANITIZE") == "1":
    FLAGS += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class FreshBuild(build):
    """Builds into an empty folder: setuptools ships all that lies there."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class OnlyNative(build_ext):
    """Builds the native modules and removes those that are none of ours any more."""

    def run(self):
        ours = {extension.name for extension in self.extensions}
        for path in Path(PACKAGE).rglob("*.so"):
            if ".".join((*path.parts[:-1], path.name.partition(".")[0])) not in ours:
                print(f"removing {path}, which is not built any more")
                path.unlink()
        super().run()


setup(
    cmdclass={"build": FreshBuild, "build_ext": OnlyNative},
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
    ),
)
