"""Train a recipe: accelerate launch tools/train.py recipes/quickstart.yaml."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse the command line and train; errors of users are one sentence and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file, such as recipes/quickstart.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key, such as pruning.amount=0.7 (repeatable)",
    )
    parser.add_argument(
        "--output", type=_folder, help="folder of the run; default: runs/<name of the recipe>"
    )
    parser.add_argument("--resume", action="store_true", help="refuse to start from nothing")
    parser.add_argument(
        "--fork",
        type=_folder,
        metavar="RUN",
        help="folder of a run that differs in pruning alone: take over the epochs before the era",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print and check the plan, and train nothing"
    )
    arguments = parser.parse_args()
    folder = arguments.output or Path("runs") / arguments.recipe.stem
    try:
        from starfire_prune.recipe.load import load_recipe
        from starfire_prune.utils.settings import RecipeError

        recipe = load_recipe(arguments.recipe, arguments.overrides)  # before the slow imports

        from starfire_prune.data import DataError, error_sentence
        from starfire_prune.runs.folder import RunError
        from starfire_prune.training.train import train
        from starfire_prune.utils.errors import PruningError, RanksError
    except ModuleNotFoundError as error:
        return _fail(f"{error}: pip install 'starfire-prune[train]'")
    except RecipeError as error:
        return _fail(str(error))
    try:
        train(
            recipe,
            folder,
            resume=arguments.resume,
            fork=arguments.fork,
            dry_run=arguments.dry_run,
        )
    except DataError as error:
        return _fail(error_sentence(error))
    except (
        *(RunError, PruningError, RanksError),
        *(ValueError, OSError, ModuleNotFoundError),
    ) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint", status=130)
    return 0


def _folder(text: str) -> Path:
    if not text:  # such as a variable that is not set
        raise argparse.ArgumentTypeError("is empty; name a folder, or leave it out")
    return Path(text)


def _fail(message: str, status: int = 2) -> int:
    print(f"train.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
