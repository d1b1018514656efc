"""Options of the commands that run one host of a group."""

from pathlib import Path
from typing import Annotated

import typer

NodeIp = Annotated[str, typer.Option(help="This host's address, as the group's others reach it.", envvar="POD_IP")]
Devices = Annotated[int, typer.Option(min=1, help="Ranks that this host may hold: its GPUs, or CPU threads.")]
GroupSecret = Annotated[Path, typer.Option("--secret-file", help="File with the secret that the group shares.")]
RayTokenFile = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="File with Ray's token, where KubeRay must know it. [made from the secret]"
    ),
]
HealthPort = Annotated[int, typer.Option(help="HTTP port of /livez and /readyz; 0 takes a free one.")]
Topology = Annotated[
    str,
    typer.Option(
        metavar="WIDEST/…/NARROWEST",
        help="Where this host stands, as zone-a/rack-3; neighbouring ranks go on near hosts. Empty names are left out.",
        show_default=False,
    ),
]
