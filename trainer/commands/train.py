"""`pediatricsgpt train`: runs the four stages of a recipe."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from rich.console import Console

from trainer.commands.recipes import print_recipes
from trainer.commands.shared import add_recipe, command_parser, default_corpus, fail, work_offline
from trainer.corpus.record import CorpusError
from trainer.recipe import RecipeError, load_recipe


def main(argv: list[str]) -> int:
    """Runs what is left to do of a recipe's run."""
    parser = command_parser(
        "train",
        "Train CPT → SFT → DFPO → MUE from one recipe. Ctrl-C (or SIGTERM) writes a checkpoint; the same command\n"
        "continues exactly, also after a crash. The corpus is built first if it is not there. The run folder gets\n"
        "metrics.jsonl, TensorBoard files, samples.md, plots and report.md.",
        "examples:\n"
        "  pediatricsgpt train --list\n"
        "  pediatricsgpt train demo\n"
        "  pediatricsgpt train qwen3-4b stages.sft.load_in_4bit=true --dry-run\n"
        "  pediatricsgpt train my.yaml stages.sft.learning_rate=1e-5 --output runs/trial\n"
        "  accelerate launch --config_file trainer/recipes/accelerate/fsdp2.yaml -m pediatricsgpt train qwen3-8b",
    )
    add_recipe(parser, optional=True)
    parser.add_argument("-o", "--output", type=Path, help="run folder (default: runs/NAME)")
    parser.add_argument("--corpus", type=Path, help="corpus folder (default: PedCorpus/NAME)")
    parser.add_argument("--list", action="store_true", help="list the shipped recipes")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (`pediatricsgpt plan`) and train nothing"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue a run whose recipe has changed in what is still to come, e.g. another learning rate",
    )
    parser.add_argument("--json", action="store_true", help="print the stages' results as one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.list:
        print_recipes()
        return 0
    if arguments.recipe is None:
        parser.error("give a recipe; --list shows the shipped ones")
    if arguments.dry_run:
        from trainer.commands import plan

        corpus = ["--corpus", str(arguments.corpus)] if arguments.corpus else []
        json_flag = ["--json"] if arguments.json else []
        return plan.main([str(arguments.recipe), *arguments.overrides, *corpus, *json_flag])
    return _train(arguments, argv)


def _train(arguments, argv: list[str]) -> int:  # noqa: ANN001  (argparse.Namespace)
    work_offline()
    os.environ["TQDM_DISABLE"] = "1"  # the live view shows the progress
    console = Console(stderr=True)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        with console.status("loading the training libraries"):
            from trainer.evaluate.likelihood import HeldOutError
            from trainer.folder import RunError
            from trainer.mue import MueError
            from trainer.report import ReportError
            from trainer.run import Run
            from trainer.stages.loop import StageError
            from trainer.stages.watch import Interrupted
        folder = arguments.output or Path("runs") / recipe.name
        run = Run(recipe, folder, arguments.corpus or default_corpus(recipe), console)
    except (RecipeError, OSError) as error:
        return fail(error)
    try:
        run.execute(arguments.accept_changes)
    except StageError as error:  # the process whose batch it was knows most
        return fail(error)
    except (CorpusError, RecipeError, RunError, HeldOutError, MueError, ReportError, OSError) as error:
        return fail(error) if run.processes.is_main_process else 2
    except (Interrupted, KeyboardInterrupt):
        alone = run.processes.num_processes == 1
        command = f"`{shlex.join(['pediatricsgpt', 'train', *argv])}`" if alone else "The same launcher command"
        console.print(f"Stopped. {command} continues from the last checkpoint.", soft_wrap=True)
        return 130
    stages = run.folder.record["stages"]
    for stage, result in stages.items():
        loss = "–" if result["loss"] is None else f"{result['loss']:.3f}"
        console.print(f"{stage.upper():<5} {result['steps']:>6} steps  loss {loss}  {result['seconds']:>7.1f} s")
    console.print(f"wrote {folder} (report.md, samples.md); next: pediatricsgpt quantize {folder}", soft_wrap=True)
    if arguments.json and run.processes.is_main_process:
        print(json.dumps({"folder": str(folder), "stages": stages, "held_out": run.folder.record["held_out"]}))
    return 0
