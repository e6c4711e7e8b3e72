"""Collect the zoo if it is missing, train a generator on it, evaluate it, write the report.

python main.py                                   the embedded default, configs/digits_loss.yaml
python main.py --config-name mnist_loss          another configuration; --help lists them
python main.py dry_run=true                      check everything, train nothing
python main.py test_only=true                    evaluate again from the trained generator
torchrun --nproc-per-node 2 main.py …            the same, spread over two processes
"""

import dataclasses
import faulthandler
import sys
import time
from typing import Any

from Gpt.checkpoint import TrainingState
from Gpt.distributed import on_first_process, primary, processes, world
from Gpt.evaluation.beside import Others, read_runs, side_by_side
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.results import Results
from Gpt.files import write_json
from Gpt.interruption import held_back
from Gpt.report.figures import save_figures
from Gpt.report.html import write_report
from Gpt.report.logger import Loggers, open_loggers
from Gpt.report.text import print_table
from Gpt.run.command_line import compose_beside, help_text, launch
from Gpt.run.dry_run import dry_run
from Gpt.run.experiment import Experiment, describe
from Gpt.run.folder import choose_folder, create_folder, occupied, open_folder
from Gpt.training import train


def run(experiment: Experiment) -> Results | None:
    """The main job. Returns what the evaluation found, or None where there was nothing left to do."""
    config = experiment.config
    if config.dry_run:
        dry_run(experiment)
        return None
    if config.collect_only:
        zoo = experiment.zoo
        on_first_process(lambda: print(describe(zoo)))
        return None
    experiment.folder = on_first_process(lambda: choose_folder(config, experiment.folder))
    summary = on_first_process(lambda: open_folder(config, experiment.folder))
    if summary.get("finished") and not config.test_only:
        if primary():
            print(f"This run is finished: {experiment.folder / 'report.html'}")
            print("Evaluate it again with test_only=true, or train another with run.name=NAME or resume=never.")
        return None
    experiment.check_trainable()  # this and the folder before the zoo, which can take hours
    others = run_beside(experiment)
    with occupied(experiment.folder):
        # Read again, as another process may have been at work there until now.
        summary = on_first_process(lambda: open_folder(config, experiment.folder))
        if not summary:
            on_first_process(lambda: create_folder(config, experiment.folder))
            summary = {"zoo_seconds": experiment.zoo.seconds}
        return train_and_judge(experiment, summary, others)


def run_beside(experiment: Experiment) -> Others:
    """What the runs of `beside`, which are finished first where they are not, and of `evaluation.beside` found."""
    found = [experiment.beside(*compose_beside(entry)) for entry in experiment.config.beside]
    for other in found:
        if primary():
            print(f"\nbeside {experiment.name}: {other.name}", flush=True)
        run(other)
    folders = [*experiment.config.evaluation.beside, *(other.folder for other in found)]
    return on_first_process(lambda: read_runs(folders, experiment.judging.column(experiment.task)))


def train_and_judge(experiment: Experiment, summary: dict[str, Any], others: Others) -> Results:
    """The generator trained, judged and reported on; `summary` is what earlier sessions left in summary.json."""
    config, folder = experiment.config, experiment.folder
    resumed = experiment.checkpoints.latest_step()
    logger = open_loggers(config.logger, folder, dataclasses.asdict(config), resumed) if primary() else Loggers([])
    try:
        keep_summary(experiment, summary)
        if not config.test_only:
            summary |= train_generator(experiment, logger)
            keep_summary(experiment, summary)
        elif "step" not in summary:  # the run was killed
            summary |= paid(experiment.checkpoints.latest_state())
            if primary() and not config.resume_path:
                print(f"not trained to the end: step {summary['step']} of {config.trainer.steps}", flush=True)
        if experiment.stream:
            experiment.stream.finish(summary["step"])
        results = side_by_side(judge(experiment, summary), others)
        on_first_process(lambda: report(experiment, results, logger))
        if not config.test_only:  # which may have been of a run that was killed, or of published weights
            keep_summary(experiment, summary | {"finished": True})
        return results
    finally:
        logger.finish()


def keep_summary(experiment: Experiment, summary: dict[str, Any]) -> None:
    on_first_process(lambda: write_json(experiment.folder / "summary.json", summary))


def train_generator(experiment: Experiment, logger: Loggers) -> dict[str, float]:
    """Train, or go on from the latest checkpoint. Returns what it took, see `paid`."""
    experiment.fit()
    with held_back(tells=primary()) as signalled:
        state = train(
            experiment.generator,
            experiment.sampler("train"),
            experiment.sampler("validation"),
            experiment.score,
            experiment.config.trainer,
            experiment.checkpoints,
            logger,
            experiment.device,
            experiment.config.seed,
            experiment.stream or (lambda step: None),
            signalled,
        )
    return paid(state)


def paid(state: TrainingState) -> dict[str, float]:
    """What the summary keeps of a training: all processes' seconds, the steps."""
    return {"training_seconds": world() * state.seconds, "step": state.step}


def judge(experiment: Experiment, summary: dict[str, Any]) -> Results:
    """The evaluation that fits the task, of the best weights."""
    spent = Spent(
        zoo_seconds=summary.get("zoo_seconds", 0.0),
        training_seconds=summary.get("training_seconds", 0.0),
        training_examples=summary.get("step", 0) * experiment.config.trainer.batch_size,
    )

    begun = time.monotonic()

    def progress(phrase: str) -> None:
        if primary():
            print(f"evaluating: {phrase} … ({time.monotonic() - begun:.0f} s)", flush=True)

    return experiment.judge(experiment.trained()).evaluate(spent, progress)


def report(experiment: Experiment, results: Results, logger: Loggers) -> None:
    """What a run leaves behind: results.json, figures, report.html, the logged charts, the table on the terminal."""
    folder = experiment.folder
    figures = save_figures(results, folder / "metrics.jsonl", folder / "figures")
    page = write_report(folder, results, dataclasses.asdict(experiment.config), folder / "metrics.jsonl", figures)
    for name, path in figures.items():
        logger.figure(name, path)
    logger.results(results)
    print(f"\n{print_table(results)}\n\nreport: {page}")


def main() -> None:
    """Command-line entry."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(__doc__ or ""))
        return
    with processes():
        launch(lambda config, name: run(Experiment(config, name)), sys.argv[1:])


if __name__ == "__main__":
    faulthandler.enable()  # compiled kernels can end a process without a word; this says where it was
    main()
