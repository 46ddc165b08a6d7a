"""Fills in gke_jobset.yaml, the manifest of a run on TPU slices of a GKE cluster, and prints it.

Example, two slices of 256 v5e chips each, image as launch/Dockerfile makes it:

  python launch/gke_jobset.py --name=xl --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/t5x_lite \\
    --target=2xv5e:16x16 --queue=multislice-queue \\
    train --gin_file=gin_configs/models/t5_1_1/xl.gin --gin_file=gin_configs/runs/pretrain.gin \\
    --gin.MODEL_DIR="'gs://bucket/xl'" --gin.DCN_MESH="{'data': 2}" ... | kubectl apply -f -
  kubectl delete jobset xl

It prints and starts nothing; kubectl does. Gin files are those of the image: build it again after a
change. --node_pools prints instead the commands that make the
node pools for such a run, one for each slice.
"""

import argparse
import json
import pathlib
import re
import shlex
import string
import sys
from collections.abc import Sequence

from command_line import REPO, check_command
from tpu_target import TpuTarget, parse_target

TEMPLATE = pathlib.Path(__file__).with_name("gke_jobset.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the manifest, or the commands for its node pools."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", type=_name, required=True, help="of the JobSet")
    parser.add_argument("--image", help="the container image, with its registry")
    parser.add_argument("--target", type=parse_target, required=True, help="2xv5e:16x16 or so")
    parser.add_argument("--queue", type=_name, help="Kueue's LocalQueue")
    parser.add_argument("--service_account", type=_name, default="default", help="of Kubernetes")
    parser.add_argument("--max_restarts", type=int, default=50)
    parser.add_argument(
        "--node_pools", action="store_true", help="print how to make the node pools"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="as the other launchers have it; this one only prints",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="train, eval or infer ...")
    args = parser.parse_args(argv)
    if args.node_pools:
        print("\n".join(node_pool_commands(args.name, args.target)))
        return 0
    if not (args.image and args.queue and args.command):
        parser.error("give --image, --queue, and a verb of t5x_lite with its arguments: train ...")
    check_command(parser, args.command, (REPO,))
    print(render(args), end="")
    return 0


def render(args: argparse.Namespace) -> str:
    """The manifest, as YAML."""
    target: TpuTarget = args.target
    # Pods start minutes apart. Whoever says --distributed_timeout himself has the last word.
    verb, *rest = args.command
    flags = ("--distributed", "--distributed_timeout=600")
    command = ["python", "-m", "t5x_lite", verb, *flags, *rest]
    return string.Template(TEMPLATE.read_text()).substitute(
        name=args.name,
        queue=args.queue,
        max_restarts=args.max_restarts,
        num_slices=target.num_slices,
        hosts_per_slice=target.hosts_per_slice,
        chips_per_host=target.chips_per_host,
        accelerator=target.generation.gke_accelerator,
        topology=target.topology,
        service_account=args.service_account,
        image=json.dumps(args.image),
        # A JSON list is a YAML list. Kubernetes would expand $(NAME); $$ is a dollar to it.
        command=json.dumps([word.replace("$", "$$") for word in command]),
    )


def node_pool_commands(name: str, target: TpuTarget) -> list[str]:
    """The gcloud commands that make a node pool for each slice, with CLUSTER to be filled in."""
    # The API refuses a topology for one host: its machine type says it.
    topology = [f"--tpu-topology={target.topology}"] if target.hosts_per_slice > 1 else []
    return [
        shlex.join(
            [
                *("gcloud", "container", "node-pools", "create", f"{name}-{i}"),
                *("--cluster=CLUSTER", "--location=REGION", "--node-locations=ZONE"),
                f"--machine-type={target.gke_machine_type}",
                f"--num-nodes={target.hosts_per_slice}",
                *topology,
            ]
        )
        for i in range(target.num_slices)
    ]


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: Kubernetes allows small letters, digits and, inside, '-'; and because "
            "JobSet makes longer names of it, at most 40 of them"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
