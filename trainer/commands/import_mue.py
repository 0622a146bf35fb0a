"""`pediatricsgpt import-mue`: an adapter saved by the paper's released code, as a MUE adapter of ours."""

from __future__ import annotations

from pathlib import Path

from trainer.commands.shared import command_parser, fail


def main(argv: list[str]) -> int:
    """Converts one adapter folder."""
    parser = command_parser(
        "import-mue",
        "Convert an adapter saved by the paper's released code (tensors lora_moe_A/B, lora_route, w_noise) into the\n"
        "standard PEFT files of trainer.mue. The base model is not touched.",
        "example:\n  pediatricsgpt import-mue downloads/MoE-Adapter runs/paper/4-mue",
    )
    parser.add_argument("source", type=Path, help="folder with adapter_config.json and the weights")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument(
        "--uniform-gates",
        action="store_true",
        help="if the router's weights were not saved, give every specific expert the same gate",
    )
    arguments = parser.parse_args(argv)
    from trainer.mue.released import import_released

    try:
        import_released(arguments.source, arguments.target, uniform_gates=arguments.uniform_gates)
    except (ValueError, OSError) as error:
        return fail(error)
    print(f"wrote {arguments.target}")
    return 0
