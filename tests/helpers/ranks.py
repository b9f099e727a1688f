"""Two processes of a trainer on CPUs, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from awares_bench.training import recipe

FSDP2 = """
# accelerate starts FSDP on accelerators only; on CPUs it drops the plugin (state.py), though PyTorch's FSDP2 runs there
from accelerate.state import AcceleratorState, DistributedType, PartialState
start = AcceleratorState.__init__
def forced(self, *args, fsdp_plugin=None, **more):
    start(self, *args, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
AcceleratorState.__init__ = forced
"""


def launched(name: str) -> dict[str, str]:
    """What ``accelerate launch`` puts into the environment for ``training/launch/NAME.yaml``."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = Path(recipe.__file__).parent / "launch" / f"{name}.yaml"
    told = ["--config_file", str(path), "--num_processes", "2", "--main_process_port", "0", "train.py"]
    env = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(told))[0])
    return {k: v for k, v in env.items() if k.startswith(("FSDP_", "ACCELERATE_"))}


def ranks(code: str, said: dict, env: dict[str, str] | None = None) -> list[int]:
    """Run ``code`` with ``json.loads(sys.argv[1]) == said`` in two processes -> their exit statuses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    known = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"} | (env or {})
    both = [
        subprocess.Popen([sys.executable, "-c", code, json.dumps(said)], env=known | {"RANK": r, "LOCAL_RANK": r}) for r in "01"
    ]
    return [p.wait(600) for p in both]
