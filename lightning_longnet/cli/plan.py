"""`longnet plan`: print the memory, messages and time of a run before it is launched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_longnet.cli.counts import plain_counts, token_count

if TYPE_CHECKING:
    import argparse

    from lightning_longnet.planning.devices import Device

DESCRIPTION = """Predict the memory, messages and time of a run, and the longest sequence that fits, before any launch.

  longnet plan --config configs/longnet/2_7b.yaml --nodes 8 --gpus-per-node 8 --device h200
  longnet plan --config configs/quickstart.yaml --device cpu --model.config.dim 256
  longnet plan --scale                     8K to 1B tokens, dense attention beside dilated

The configuration files and overrides are those of longnet fit.  Times follow from the peak and the links in the data
sheet of the device, and from the shares of them that --efficiency gives."""

EXAMPLE = "longnet plan --config quickstart.yaml --device cpu"
TAKES_OVERRIDES = True
_PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--config", action="append", default=[], help="a file of longnet fit; later ones override earlier ones"
    )
    parser.add_argument("--nodes", type=int, help="number of machines; by default that of the file")
    parser.add_argument("--gpus-per-node", type=int, help="devices of each machine; by default those of the file")
    parser.add_argument(
        "--tokens",
        type=token_count,
        help="tokens of a sequence, such as 64k (65,536) or 1M (1,048,576); by default those of the data",
    )
    parser.add_argument("--device", default="h200", help="h200 (by default), h100, a100, rtx 4090, ..., cpu")
    parser.add_argument("--memory-gib", type=float, help="memory of a device, instead of the data sheet's")
    parser.add_argument("--peak-tflops", type=float, help="peak of a device, instead of the data sheet's")
    parser.add_argument("--link-gbps", type=float, help="gigabits a second between devices")
    parser.add_argument(
        "--efficiency", type=float, nargs=2, metavar="SHARE", help="share of the peak: linear, attention"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--picture", metavar="PNG", help="write a picture (needs the extra plots)")
    parser.add_argument("--scale", action="store_true", help="8K to 1B tokens, at a constant number of tokens a device")


def _check_picture(path: str) -> None:
    """Refuse a picture that cannot be written, before the plan is made."""
    from pathlib import Path

    if Path(path).suffix not in _PICTURES:
        raise ValueError(f"--picture must be a file that ends with one of {', '.join(_PICTURES)}, got {path}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"--picture must be in a folder that exists, got {path}")


def run(arguments: argparse.Namespace) -> None:
    """Plan the run, and print the plan."""
    import json
    from dataclasses import replace

    from lightning_longnet.planning.devices import named

    device = named(arguments.device)
    overrides: dict[str, Any] = {}
    for name in ("memory_gib", "peak_tflops", "link_gbps"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name.replace('_', '-')} must be more than 0, got {value:g}")
    if arguments.memory_gib is not None:
        overrides["memory"] = arguments.memory_gib * 2**30
    if arguments.link_gbps is not None:
        overrides["node_link"] = overrides["network"] = arguments.link_gbps * 1e9 / 8
    if arguments.efficiency is not None:
        if not all(0 < share <= 1 for share in arguments.efficiency):
            raise ValueError(f"efficiency must be two shares, more than 0 and at most 1, got {arguments.efficiency}")
        overrides |= {"efficiency": tuple(arguments.efficiency), "source": "given by --efficiency"}
    device = replace(device, **overrides)
    peak = None if arguments.peak_tflops is None else arguments.peak_tflops * 1e12
    if arguments.picture is not None:
        _check_picture(arguments.picture)
    if arguments.scale:
        _show_scale(arguments, device)
        return
    if not arguments.config:
        files = [word for word in arguments.overrides if word.endswith((".yaml", ".yml"))]
        question = f"; did you mean --config {files[0]}?" if files else ""
        raise ValueError(f"--config must name a file, as of longnet fit{question or f': {EXAMPLE}'}")
    from lightning_longnet.cli.configured import read_job
    from lightning_longnet.cli.progress import steps
    from lightning_longnet.planning.run import plan_run

    words = [word for path in arguments.config for word in ("--config", path)] + plain_counts(arguments.overrides)
    job = read_job(words, arguments.nodes, arguments.gpus_per_node, arguments.tokens)
    with steps("planning") as report:
        plan = plan_run(job, device, peak, report)
    print(json.dumps(plan.to_dict(), indent=1) if arguments.json else plan)  # noqa: T201
    if arguments.picture is not None:
        from lightning_longnet.planning.picture import draw

        draw(plan).savefig(arguments.picture, dpi=120)


def _show_scale(arguments: argparse.Namespace, device: Device) -> None:
    """Print the table of `--scale`."""
    import json

    from lightning_longnet.planning import scale

    rows = scale.simulate(device)
    print(json.dumps(scale.values(rows), indent=1) if arguments.json else scale.table(rows))  # noqa: T201
    if arguments.picture is not None:
        scale.draw(rows, device).savefig(arguments.picture, dpi=120)
