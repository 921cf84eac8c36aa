"""``ztok train`` and ``ztok pretrain``."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from ztok_fast.cli import common


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a codec with the settings of a YAML file",
        description="Train a codec. After an interruption, the same command resumes from the last checkpoint. "
        "`accelerate launch -m ztok_fast.cli train CONFIG.yaml` runs several processes.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("--max-minutes", type=float, help="save a checkpoint and stop after this time")
    parser.set_defaults(run=train)

    parser = commands.add_parser(
        "pretrain",
        help="pretrain a small base model with the settings of a YAML file",
        description="Pretrain a small base model from scratch. "
        "After an interruption, the same command resumes from the last checkpoint.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.set_defaults(run=pretrain)


def train(options: argparse.Namespace) -> int:
    common.check_input(options.config)
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise common.UsageError(f"--max-minutes: expected more than 0, got {options.max_minutes}")
    from ztok_fast.train.loop import Trainer
    from ztok_fast.train.settings import TrainSettings

    settings = TrainSettings.load(options.config)
    if options.max_minutes is not None:
        settings = dataclasses.replace(settings, max_minutes=options.max_minutes)
    _check_data(settings)
    trainer = Trainer(settings)
    try:
        folder = trainer.run()
    except KeyboardInterrupt:
        print(f"ztok: stopped after step {trainer.step:,}; the same command goes on from there", file=sys.stderr)
        return common.INTERRUPTED
    if trainer.accelerator.is_main_process:
        print(f"{folder}: codec after step {trainer.step:,} of {settings.steps:,}")
    return 0


def pretrain(options: argparse.Namespace) -> int:
    common.check_input(options.config)
    from ztok_fast.train.pretrain import PretrainConfig, pretrain

    config = PretrainConfig.load(options.config)
    _check_data(config)
    print(f"{pretrain(config)}: base model after step {config.steps:,}")
    return 0


def _check_data(settings) -> None:
    """Refuse files that are not there before a model is loaded."""
    for name in (*settings.train_files, *settings.dev_files):
        common.check_input(name)
