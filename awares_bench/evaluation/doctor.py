"""What is installed here, what is known not to work, and the command that mends it. Imports nothing that may be broken.

Versions come from the packages' metadata, and whether a package can be imported is tried in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

SHOWN = (
    "lmms-eval",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface-hub",
    "filelock",
    "numpy",
)
"""Packages whose versions are always told."""

IMPORTS = {
    "torch": "import torch",
    "torchvision": "import torchvision; torchvision.ops.nms",
    "transformers": "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "lmms-eval": "import lmms_eval.evaluator as e; e._enable_reentrant_filelocks(); e.TaskManager()",
    "awares-bench": "import awares_bench.evaluation.lmms_model",
}
"""What is tried in a process of its own: package -> code."""

DATA_SETS = {
    "ChartQA": "lmms-lab-encoder/ChartQA",
    "DocVQA": "lmms-lab-encoder/DocVQA",
    "OCRBench": "echo840/OCRBench",
    "POPE": "lmms-lab-encoder/POPE",
    "RealWorldQA": "lmms-lab-encoder/RealWorldQA",
    "V*": "lmms-lab-encoder/vstar-bench",
}
"""The six official data sets, by the hub names in lmms-eval's task files."""

_TORCH = """
import json, os, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
device, dtype = ("cuda", torch.bfloat16) if gpus else ("cpu", torch.float32)
x, kernels = torch.zeros(1, 2, 64, 64, device=device, dtype=dtype), []
for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
    try:
        with sdpa_kernel(getattr(SDPBackend, name)):
            attend(x, x, x)
        kernels.append(name.lower())
    except Exception:
        pass
free = [torch.cuda.mem_get_info(i)[0] for i in range(len(gpus))]
print(json.dumps({"gpus": gpus, "free": free, "cpu": torch.backends.cpu.get_cpu_capability(), "kernels": kernels}))
"""


@dataclass(frozen=True)
class Fault:
    """Something known not to work."""

    sentence: str
    mend: str
    """The command that mends it."""


def installed(names) -> dict[str, str | None]:
    """Package names -> versions, None where a package is not installed."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def tested_set(text: str | None = None) -> dict[str, str]:
    """The tested set as it applies to this Python: package -> version. Empty when constraints.txt cannot be read.

    text: of a constraints file, in place of the package's.
    """
    if text is None:
        try:
            text = (files("awares_bench") / "constraints.txt").read_text(encoding="utf-8")
        except OSError:
            return {}
    exact_versions = {}
    for line in text.splitlines():
        try:
            wanted = Requirement(line.split("#")[0].strip())
        except InvalidRequirement:  # a comment, an empty line, or a link that was checked out as text
            continue
        exact = [s.version for s in wanted.specifier if s.operator == "=="]
        if exact and (wanted.marker is None or wanted.marker.evaluate()):
            exact_versions[wanted.name] = exact[0]
    return exact_versions


def known_bad(versions: dict[str, str | None]) -> list[Fault]:
    """Combinations that are known not to work, of the versions that are given."""
    has = {name: Version(v) for name, v in versions.items() if v}
    faults = []

    def fault(sentence: str, *mend: str) -> None:
        faults.append(Fault(sentence, "pip install " + " ".join(f"'{m}'" for m in mend)))

    lmms, lock, transformers, torch = (has.get(n) for n in ("lmms-eval", "filelock", "transformers", "torch"))
    if lmms and lock and lock >= Version("4") and lmms < Version("0.8"):
        fault(
            f"filelock {lock} with lmms-eval {lmms}: lmms-eval imports filelock._api, which filelock 4 removed, and no task runs",
            "filelock<4",
        )
    if lmms and lock and lock < Version("3.16"):
        fault(f"filelock {lock} with lmms-eval {lmms}: lmms-eval needs FileLockMeta, which 3.16 brought", "filelock>=3.16,<4")
    if transformers and transformers >= Version("5.40"):
        fault(
            f"transformers {transformers}: 5.40 removes names that its models deprecate since 5.24; this release is made for earlier ones",
            "transformers<5.40",
        )
    if transformers and transformers < Version("5.17"):
        fault(f"transformers {transformers}: this release is made for 5.17 and later", "transformers>=5.17,<5.40")
    if lmms and lmms < Version("0.7.3"):
        fault(
            f"lmms-eval {lmms}: the packages of 0.7.1 and 0.7.2 lack files of tasks, and no task loads", "lmms-eval>=0.7.3,<0.8"
        )
    if torch and transformers and torch < Version("2.6"):
        fault(f"torch {torch}: transformers takes a PyTorch before 2.6 for none (5.24 does)", "torch>=2.6", "torchvision>=0.21")
    for name in ("lmms-eval", "torch", "torchvision", "transformers"):
        if name in versions and not versions[name]:
            fault(f"{name} is not installed", name)
    return faults


def unmet(name: str = "awares-bench", needs: list[str] | None = None, versions=None) -> list[Fault]:
    """Bounds of a package that what is installed here does not keep.

    needs: requirements in place of those in the package's metadata. versions: package -> version, in place of those installed here.
    """
    if needs is None:
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            return [Fault(f"{name} is not installed as a package", "pip install -e .")]
    faults = []
    for line in needs:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        have = _version(need.name) if versions is None else versions.get(need.name)
        if have is None:
            faults.append(Fault(f"{need.name} is not installed; {name} needs {need.name}{need.specifier}", _pip(need)))
        elif not need.specifier.contains(have, prereleases=True):
            faults.append(Fault(f"{need.name} is {have}; {name} needs {need.name}{need.specifier}", _pip(need)))
    return faults


def _pip(need: Requirement) -> str:
    return f"pip install '{need.name}{need.specifier}'"


def compare(versions: dict[str, str | None], tested: dict[str, str]) -> list[str]:
    """-> a sentence for each package whose version is not that of the tested set."""
    differ = [
        f"{n} {v} (tested: {tested[n]})" for n, v in versions.items() if v and n in tested and Version(v) != Version(tested[n])
    ]
    return sorted(differ)


def tried(code: str) -> str | None:
    """Run ``code`` in a process of its own -> None, or the last line of what it said when it failed."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | quiet, cwd=Path.home(), timeout=300
        )
    except subprocess.TimeoutExpired:
        return "no end after 300 seconds"
    if not done.returncode:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


def caches() -> list[Path]:
    """The folders in which datasets and huggingface_hub keep data sets, by the environment's names or their defaults."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    sets = os.environ.get("HF_DATASETS_CACHE") or home / "datasets"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    return [Path(sets), Path(hub)]


def cached(repository: str, sets: Path, hub: Path) -> bool:
    """Whether a data set of the hub is in the cache of datasets (prepared) or of the hub (downloaded)."""
    owner, name = repository.split("/")
    words = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)).lower()  # as datasets names it
    folders = (sets / f"{owner}___{words}", hub / f"datasets--{owner}--{name}" / "snapshots")
    return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)


def free_memory() -> int | None:
    """Bytes of memory that a new process may have, None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def device() -> dict | str:
    """GPUs, their free memory in bytes, CPU capability, attention kernels; or the last line of the error when PyTorch fails."""
    done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, cwd=Path.home())
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def run() -> int:
    """Print what there is -> 1 when something is known not to work, else 0."""
    tested = tested_set()
    versions = installed(dict.fromkeys([*SHOWN, *tested]))
    print(f"Python {sys.version.split()[0]}, awares-bench {_version('awares-bench') or 'not installed as a package'}")
    for name in SHOWN:
        print(f"  {name:<16}{versions[name] or 'not installed'}")
    if not tested:
        print("tested set: constraints.txt is not in the package, so versions are not compared with it")
    elif differ := compare(versions, tested):
        print(f"tested set: {len(differ)} of {len(tested)} differ, which need not be a fault: {', '.join(differ)}")
    else:
        print(f"tested set: all of its packages that are installed here have its versions ({len(tested)} packages)")

    faults = known_bad({n: versions.get(n) for n in SHOWN})
    known = {f.sentence.split()[0] for f in faults}  # told already, with the reason
    faults += [f for name in ("awares-bench", "torchvision") for f in unmet(name) if f.sentence.split()[0] not in known]
    for name, code in IMPORTS.items():
        if (message := tried(code)) is not None:
            mend = faults[0].mend if faults else "pip install --upgrade --force-reinstall -c constraints.txt -e ."
            faults.append(Fault(f"{name} does not work: {message}", mend))

    hardware = device()
    if isinstance(hardware, str):
        print(f"device: unknown, PyTorch fails: {hardware}")
    else:
        gpus = [f"{name}, {_gib(free)} free" for name, free in zip(hardware["gpus"], hardware["free"], strict=True)]
        print(f"device: {'; '.join(gpus) or 'no GPU that PyTorch can use'}; CPU with {hardware['cpu']}, {os.cpu_count()} cores")
        flash = _version("flash-attn")
        print(f"attention: sdpa with {', '.join(hardware['kernels'])}; flash-attn {flash or 'not installed'}")
    print(f"free: {_gib(free_memory())} of memory, {_gib(shutil.disk_usage(Path.cwd()).free)} of disk in this folder")
    sets, hub = caches()
    here = [name for name, repository in DATA_SETS.items() if cached(repository, sets, hub)]
    gone = [f"{name} ({DATA_SETS[name]})" for name in DATA_SETS if name not in here]
    print(f"official data sets in the cache: {', '.join(here) or 'none'}; to download on first use: {', '.join(gone) or 'none'}")

    for fault in faults:
        print(f"fault: {fault.sentence}\n  mend: {fault.mend}")
    if not faults:
        print("nothing here is known not to work")
    return 1 if faults else 0
